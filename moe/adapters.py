"""LoRA in the reference system's checkpoints: its factors multiplied out and added to the weights, as they are read.

A dense model's folder has peft's adapter_config.json and adapter_model.*, and non_lora_trainables.bin with what
trained whole. A sparse one's has everything in one state dict, and the scale in config.json's `lora`
(moellava/train/train.py, moellava/model/builder.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe import weights

Pairs = Iterator[tuple[str, Tensor]]
_REFUSED = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")


class InterchangeError(ValueError):
    """A checkpoint that cannot be read or written, in words."""


def beside(folder: Path) -> bool:
    """Whether a folder holds adapters apart from the weights they are for."""
    return (folder / "adapter_config.json").is_file()


def scale(folder: Path, said: Mapping[str, Any]) -> float | None:
    """What a sparse checkpoint's factors are multiplied with; None where its config.json knows no LoRA."""
    lora = said.get("lora") or {}
    if not lora.get("lora_enable"):
        return None
    try:
        return float(lora["lora_alpha"]) / float(lora["lora_r"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise InterchangeError(
            f"{folder}/config.json: `lora` has no lora_alpha and lora_r that give a scale"
        ) from None


def merged(
    pairs: Callable[[], Pairs], factor: float | None, factors: dict[str, Tensor] | None = None
) -> Pairs:
    """Every weight, with its factors' product added; `factors` lie apart, or among the pairs, read twice then."""
    if factors is None:
        factors = {key: tensor for key, tensor in pairs() if ".lora_" in key}
    if factors and factor is None:
        raise InterchangeError(
            f"{next(iter(factors))} is a LoRA factor, but config.json has no `lora` that says its scale; merge "
            "the checkpoint first, or put back the config.json it was saved with"
        )
    halves = {_place(key): tensor for key, tensor in factors.items()}
    unused = {name for name, _ in halves}
    for key, tensor in pairs():
        if ".lora_" in key:
            continue
        name = _plain(key)
        if (name, "A") in halves and (name, "B") in halves:
            product = halves[name, "B"].float() @ halves[name, "A"].float()
            if product.shape != tensor.shape:
                raise InterchangeError(
                    f"{key} is {tuple(tensor.shape)}, but its LoRA factors make {tuple(product.shape)}"
                )
            tensor = (tensor.float() + (factor or 0.0) * product).to(tensor.dtype)
            unused.discard(name)
        yield key.replace(".base_layer.", "."), tensor
    if unused:
        raise InterchangeError(
            f"{len(unused)} pairs of LoRA factors find no weight, {sorted(unused)[0]} first: they are for another "
            "model, or half of a pair is missing"
        )


def dense(folder: Path, language: str) -> Pairs:
    """The weights of the model that adapters were trained for, merged, and over them what trained whole."""
    said = json.loads((folder / "adapter_config.json").read_text())
    if odd := [key for key in _REFUSED if said.get(key)]:
        raise InterchangeError(
            f"{folder}/adapter_config.json sets {', '.join(odd)}, which is not plain LoRA; merge it with peft first"
        )
    base = language or str(said.get("base_model_name_or_path") or "")
    if not base:
        raise InterchangeError(
            f"{folder} holds LoRA adapters without the weights they are for, and adapter_config.json names none; "
            "give their folder as `language`"
        )
    if not (Path(base).is_dir() or language) and (found := folder.parent / Path(base).name).is_dir():
        base = str(found)
    factors = {_plain(key): tensor for key, tensor in _state(folder, "adapter_model")}
    over = {_plain(key): tensor for key, tensor in _state(folder, "non_lora_trainables")}

    def pairs() -> Pairs:
        for key, tensor in weights.tensors(weights.folder_of(base)):
            if _plain(key) not in over:
                yield _plain(key), tensor
        yield from over.items()

    return merged(pairs, float(said["lora_alpha"]) / float(said["r"]), factors)


def _state(folder: Path, stem: str) -> Pairs:
    if (folder / f"{stem}.safetensors").is_file():
        from safetensors.torch import load_file

        yield from load_file(folder / f"{stem}.safetensors").items()
    elif (folder / f"{stem}.bin").is_file():
        state = torch.load(folder / f"{stem}.bin", map_location="cpu", weights_only=True)
        yield from state.items()
    else:
        raise InterchangeError(
            f"{folder} has an adapter_config.json, but neither {stem}.bin nor .safetensors"
        )


def _plain(key: str) -> str:
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _place(key: str) -> tuple[str, str]:
    """The weight a factor is for, and which half it is: ...fc1.lora_A.default.weight or ...fc1.lora_A.weight."""
    layer, _, rest = _plain(key).partition(".lora_")
    return f"{layer}.weight", rest[0]
