"""A vision-language model small enough for any test, and batches for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe.spec import ModelSpec
from moe.vlm import IMAGE, VLM, build

WORDS, SIZE = 120, 28
CONFIG: dict[str, object] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
TOWER: dict[str, object] = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 14,
}
FEW_HEADS = ("qwen2", "qwen2_5", "qwen3", "mistral", "openchat")


def spec(backbone: str = "stablelm", **changes: Any) -> ModelSpec:
    config = dict(CONFIG)
    if backbone == "phi2":
        config["partial_rotary_factor"] = 0.5  # of 8: phi-2's own share would be odd
    else:
        config["num_key_value_heads"] = 2 if backbone in FEW_HEADS else 4
    if backbone == "qwen3":
        config["head_dim"] = 8
    values: dict[str, Any] = {"backbone": backbone, "random": True, "config": config, "tower_config": TOWER}
    return ModelSpec(**{**values, **changes})


def model(backbone: str = "stablelm", seed: int = 3, **changes: Any) -> VLM:
    return build(spec(backbone, **changes), vocab_size=WORDS, seed=seed, dtype=torch.float32)


def batch(lengths: list[int], images: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Right-padded samples of these lengths, each with that many images at its second place."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    labels = torch.full_like(ids, -100)
    for row, (length, count) in enumerate(zip(lengths, images, strict=True)):
        ids[row, :length] = torch.randint(1, WORDS, (length,), generator=draw)
        labels[row, length // 2 : length] = ids[row, length // 2 : length]
        ids[row, 1 : 1 + count] = IMAGE
        labels[row, 1 : 1 + count] = -100
        mask[row, :length] = True
    pixels = torch.randn(sum(images), 3, SIZE, SIZE, generator=draw)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}
