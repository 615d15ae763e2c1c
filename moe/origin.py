"""The weights of a dense model from a Hugging Face folder, ours or the reference system's, into a model of ours."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from moe.adapters import InterchangeError
from moe.vlm import VLM

VOCABULARY = ("language.model.embed_tokens.weight", "language.lm_head.weight", "language.lm_head.bias")


def fill(folder: Path, vlm: VLM) -> None:
    """Language model and projector from `folder`; the image tower is the spec's own. Raises InterchangeError.

    A vocabulary that the folder's model has padded is cut to the tokenizer's.
    """
    source = _open(folder, next(vlm.parameters()).dtype)
    if source.moe is not None:
        raise InterchangeError(f"{folder} holds experts already; a stage starts from a dense model")
    wanted = {name: tensor for name, tensor in vlm.state_dict().items() if not name.startswith("tower.")}
    found = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("tower.")}
    for name in VOCABULARY:
        if name in found and name in wanted and len(found[name]) > len(wanted[name]):
            found[name] = found[name][: len(wanted[name])]
    bias = VOCABULARY[-1]
    if bias in wanted and bias not in found:  # the reference's phi-2 does without; ours may learn it
        found[bias] = torch.zeros_like(wanted[bias])
    if odd := sorted(set(wanted) ^ set(found)) + [
        n for n in wanted if n in found and _other(wanted[n], found[n])
    ]:
        place = odd[0]
        have, need = (tuple(each[place].shape) if place in each else "missing" for each in (found, wanted))
        raise InterchangeError(
            f"{folder} is another model than the spec's: {len(odd)} tensors differ, {place} is {have} there and "
            f"{need} here; set model.backbone, model.config and model.projector to what its config.json says"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


def _other(one: Tensor, other: Tensor) -> bool:
    return one.shape != other.shape


def _open(folder: Path, dtype: torch.dtype) -> VLM:
    if json.loads((folder / "config.json").read_text()).get("model_type") == "moe_vlm":
        from moe.hub import MoEVLM

        opened: VLM = MoEVLM.from_pretrained(folder, dtype=dtype).vlm
        return opened
    from moe.reference import load_moe_llava

    return load_moe_llava(folder, dtype=dtype)
