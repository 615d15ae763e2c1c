"""Our checkpoints opened on one device, and Hugging Face folders out; neither needs DeepSpeed.

The reference system's checkpoints come in by `moe.reference`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from moe import backbones, lora
from moe.adapters import InterchangeError
from moe.layer import forget
from moe.parallel import Groups
from moe.reference import load_moe_llava
from moe.spec import ModelSpec, MoESpec
from moe.stages import STAGES
from moe.upcycle import upcycle
from moe.vlm import VLM, build

__all__ = ["InterchangeError", "blueprint", "export_hf", "load_moe_llava", "open_checkpoint", "run_spec"]


def blueprint(vlm: VLM) -> ModelSpec:
    """A spec that builds this very structure from nothing but itself."""
    language, row = vlm.language.config.to_dict(), backbones.LANGUAGE[vlm.spec.backbone].config
    for key in ("model_type", "architectures", "transformers_version", "_name_or_path", "dtype", "use_cache"):
        language.pop(key, None)
    tower = vlm.tower.config.to_dict()
    keys = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size hidden_act"
    )
    kept: dict[str, object] = {key: tower[key] for key in keys.split()}
    kept |= {"select_layer": tower["num_hidden_layers"], "drop_first": vlm.vision.drop_first}
    return ModelSpec(
        backbone=vlm.spec.backbone,
        random=True,
        # None where the row says something else is a statement; elsewhere it is what is said already.
        config={key: value for key, value in language.items() if value is not None or key in row},
        tower=vlm.spec.tower,
        tower_config=kept,
        projector=vlm.spec.projector,
    )


def open_checkpoint(path: Path | str, *, dtype: torch.dtype | None = None) -> tuple[VLM, Any]:
    """(model, tokenizer) of a checkpoint folder inside a run folder, whatever ranks wrote it, on one device.

    The run's spec.json says what the model is, its tokenizer/ how it reads; LoRA's adapters are merged. Raises
    InterchangeError.
    """
    from moe.checkpoint import load_weights

    run, said = _run(path), run_spec(path)
    spec = _section(ModelSpec, said.get("model", {}))
    tokenizer = backbones.load_tokenizer(spec, run / "tokenizer" if (run / "tokenizer").is_dir() else None)
    dtype = dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    vlm = build(spec, vocab_size=len(tokenizer), seed=0, dtype=dtype, filled=False)
    sparse = STAGES[said.get("stage", "instruct")].sparse
    lora.add(vlm, lora.told(said), sparse=sparse, seed=0)
    if sparse:
        moe = dict(said.get("moe", {})) | {"expert_parallel": 1, "dispatcher": "torch"}
        upcycle(vlm, _section(MoESpec, moe), Groups.single(), seed=0)
    load_weights(Path(path), vlm, Groups.single())
    lora.merge(vlm)
    return vlm.eval(), tokenizer


def run_spec(checkpoint: Path | str) -> dict[str, Any]:
    """What the spec.json of a checkpoint's run folder says."""
    path = _run(checkpoint) / "spec.json"
    try:
        said = json.loads(path.read_text())
    except ValueError as wrong:
        raise InterchangeError(f"{path} is no JSON: {wrong}") from None
    sections = [said.get(key, {}) for key in ("model", "moe", "data")] if isinstance(said, dict) else [None]
    if not all(isinstance(section, dict) for section in sections):
        raise InterchangeError(f"{path} is not what a run writes: a mapping with model, moe and data")
    if (stage := said.get("stage", "instruct")) not in STAGES:
        raise InterchangeError(f"{path} says stage {stage!r}, which is none of {', '.join(STAGES)}")
    told: dict[str, Any] = said
    return told


def _run(checkpoint: Path | str) -> Path:
    path = Path(checkpoint).resolve()
    if not path.is_dir():
        why = "is a file, not a checkpoint's folder" if path.exists() else "is not there"
        raise InterchangeError(f"{path} {why}: name a run folder, or one of its checkpoints/step_...")
    for above in path.parents:
        if (above / "spec.json").is_file():
            return above
    raise InterchangeError(
        f"{path} lies in no run folder: none of the folders above it has a spec.json that says what it is"
    )


def _section(kind: type[Any], said: Mapping[str, Any]) -> Any:
    known = {field.name for field in fields(kind)}
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in said.items() if key in known}
    return kind(**values)


def export_hf(source: VLM | Path | str, folder: Path | str, tokenizer: Any = None) -> None:
    """Write a folder that transformers' from_pretrained loads once `moe.hub` has been imported.

    `source`: a checkpoint folder inside a run folder, or a model that holds all its experts. LoRA is merged.
    """
    from moe.hub import wrap

    if isinstance(source, VLM):
        vlm = source
    else:
        vlm, own = open_checkpoint(source)
        tokenizer = tokenizer or own
    if vlm.groups.expert_parallel > 1:
        raise InterchangeError(
            f"this rank holds a part of the experts (expert_parallel {vlm.groups.expert_parallel}); export "
            "from the checkpoint folder instead, on one process"
        )
    if vlm.lora is not None:
        forget(vlm)
        vlm = copy.deepcopy(vlm)
        lora.merge(vlm)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InterchangeError(f"{folder} is a file; name a folder to export to")
    wrap(vlm, asdict(blueprint(vlm)), asdict(vlm.moe) if vlm.moe else None).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
