"""Which experts the held-out questions' text and image tokens go to: routing.json, a picture, and W&B's table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from launch.files import write_json
from launch.record import RunFolder
from moe.parallel import Groups
from moe.pictures import draw, shares

QUESTIONS = 16


def routing(
    folder: RunFolder,
    model: Any,
    prompts: Sequence[Sequence[int]],
    pixels: Sequence[Tensor],
    groups: Groups,
    tracker: Any,
) -> None:
    """Route some prompts and leave what rank 0 saw; all ranks call it, a dense model has nothing to show."""
    if model.moe is None:
        return
    prompts, pixels = prompts[:QUESTIONS], pixels[:QUESTIONS]
    device = next(model.parameters()).device
    ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = True
    found = shares(model, ids.to(device), mask.to(device), torch.cat(list(pixels)).to(device))
    if groups.rank:
        return
    write_json(folder.path / "routing.json", {"shares": [dataclasses.asdict(share) for share in found]})
    picture = folder.path / "routing.png"
    draw(found, picture)
    rows = [[share.layer, share.expert, share.text, share.image] for share in found]
    tracker.table("routing/shares", ["layer", "expert", "share of text", "share of image"], rows)
    tracker.table("routing/picture", ["picture"], [[picture]])
