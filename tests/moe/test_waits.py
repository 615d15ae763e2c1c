"""A step's forward pass reads no value from the device: on `meta`, which has none, reading one is an error."""

from __future__ import annotations

import pytest
from torch import Tensor

from moe.objective import Objective
from moe.parallel import Groups
from moe.spec import MoESpec
from moe.stages import STAGES
from moe.upcycle import upcycle
from moe.vlm import train_only
from tests.moe import tiny


def packed() -> dict[str, Tensor]:
    batch = tiny.batch([12, 20], [1, 2])
    segments = batch["attention_mask"].long()
    segments[:, 6:] *= 2
    return batch | {"segments": segments}


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("backbone", ["phi2", "stablelm", "qwen2"])
def test_the_host_never_waits_for_the_device(backbone: str, kind: str) -> None:
    vlm = tiny.model(backbone)
    upcycle(vlm, MoESpec(capacity_factor=0.0, dispatcher="torch"), Groups.single(), seed=0)
    train_only(vlm, STAGES["moe"].trains)
    vlm.bfloat16().to("meta").train()
    batch = tiny.batch([12, 20], [1, 2]) if kind == "padded" else packed()
    batch["pixel_values"] = batch["pixel_values"].to("meta")
    loss = Objective(vlm)(**batch)
    assert loss.device.type == "meta"
    loss.backward()
    assert all(p.grad is not None for p in vlm.parameters() if p.requires_grad)
