"""Samples packed into rows learn what they learn alone, in every language model and by every attention that runs here.

For flash-attn, which needs a GPU, see test_attention.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.backbones import LANGUAGE
from moe.parallel import Groups
from moe.spec import MoESpec
from moe.upcycle import upcycle
from moe.vlm import IGNORE, IMAGE, VLM
from tests.moe.tiny import SIZE, WORDS, model
from tests.moe.tiny import spec as tiny_spec

Sample = tuple[Tensor, Tensor, Tensor]  # ids, labels, images
LENGTHS = ((9, 1), (5, 0), (7, 2), (12, 0))
ROWS = ((0, 1), (2, 3))  # which samples share a row


def samples() -> list[Sample]:
    draw = torch.Generator().manual_seed(0)
    found = []
    for length, images in LENGTHS:
        ids = torch.randint(1, WORDS, (length,), generator=draw)
        ids[1 : 1 + images] = IMAGE
        labels = ids.clone()
        labels[: 1 + images] = IGNORE
        found.append((ids, labels, torch.randn(images, 3, SIZE, SIZE, generator=draw)))
    return found


def alone(vlm: VLM) -> tuple[Tensor, Tensor]:
    outputs = [vlm(ids[None], None, labels[None], x if len(x) else None) for ids, labels, x in samples()]
    return torch.stack([o.ce_sum for o in outputs]).sum(), torch.stack([o.tokens for o in outputs]).sum()


def together(vlm: VLM) -> tuple[Tensor, Tensor]:
    found = samples()
    width = max(sum(len(found[i][0]) for i in row) for row in ROWS) + 2

    def rows(place: int, fill: int) -> Tensor:
        joined = [torch.cat([found[i][place] for i in row]) for row in ROWS]
        return torch.stack([F.pad(row, (0, width - len(row)), value=fill) for row in joined])

    numbers = [torch.cat([torch.full((len(found[i][0]),), n + 1) for n, i in enumerate(row)]) for row in ROWS]
    segments = torch.stack([F.pad(row, (0, width - len(row))) for row in numbers])
    images = torch.cat([x for _, _, x in found])
    output = vlm(rows(0, 0), segments > 0, rows(1, IGNORE), images, segments)
    return output.ce_sum, output.tokens


def learnt(vlm: VLM, way: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    vlm.zero_grad()
    loss, tokens = way(vlm)
    loss = loss / tokens
    loss.backward()
    return loss.detach(), tokens, {n: p.grad for n, p in vlm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("backbone", "window"), [*((name, 0) for name in LANGUAGE), ("mistral", 4)])
def test_packed_samples_learn_what_they_learn_alone(backbone: str, window: int, attention: str) -> None:
    changes = {"config": {**tiny_spec(backbone).config, "sliding_window": window}} if window else {}
    vlm = model(backbone, attention=attention, **changes)
    # Balance is measured over a pass, so packing changes it; what is said of tokens does not change.
    upcycle(vlm, MoESpec(capacity_factor=0.0, aux_loss=0.0, dispatcher="torch"), Groups.single(), seed=0)
    vlm.train()
    loss, tokens, grads = learnt(vlm, alone)
    packed_loss, packed_tokens, packed = learnt(vlm, together)
    assert packed_tokens == tokens
    torch.testing.assert_close(packed_loss, loss, rtol=0, atol=1e-5)
    vlm.recompute()
    _, _, again = learnt(vlm, together)
    assert packed.keys() == grads.keys() == again.keys()
    for name, grad in grads.items():
        for found in (packed, again):
            torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-5, msg=name)
