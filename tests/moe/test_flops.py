"""Counted FLOPs are those that torch counts while the model runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe import flops
from moe.flops import Work
from moe.parallel import Groups
from moe.spec import MoESpec
from moe.stages import STAGES
from moe.upcycle import upcycle
from moe.vlm import train_only
from tests.moe import tiny

LENGTHS, IMAGES = [24, 24, 24], [1, 1, 1]


def measured(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """What torch counts of one forward and backward pass."""

    def added(sum_shape: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
        return int(2 * a[0] * a[1] * b[1])

    in_place = {torch.ops.aten.addmm_: added}  # which torch leaves out
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        output = model(**batch)
        (output.ce_sum + (output.router_loss if output.router_loss is not None else 0)).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("stage", list(STAGES))
def test_counted_flops_are_those_of_torch(stage: str) -> None:
    model, batch = tiny.model("qwen2"), tiny.batch(LENGTHS, IMAGES)
    if STAGES[stage].sparse:
        # The torch dispatcher pads no expert's queue.
        moe = MoESpec(experts=4, top_k=2, capacity_factor=0.0, dispatcher="torch")
        upcycle(model, moe, Groups.single(), seed=1)
    train_only(model, STAGES[stage].trains)
    model.train()
    patches = model.vision.patches
    positions = sum(LENGTHS) + sum(IMAGES) * (patches - 1)
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    work = Work.of(model, patches)
    step = {"positions": positions, "images": sum(IMAGES), "samples": len(LENGTHS), "supervised": supervised}
    attention = (
        work.pair * positions * (positions / len(LENGTHS) / 2)
    )  # torch's own kernel for it is not counted
    assert work.step(**step) - attention == pytest.approx(measured(model, batch), rel=0.01)


def test_a_token_s_own_experts_count_and_no_others() -> None:
    def position(experts: int, top_k: int) -> float:
        model = tiny.model("qwen2")
        upcycle(model, MoESpec(experts=experts, top_k=top_k), Groups.single(), seed=1)
        train_only(model, STAGES["moe"].trains)
        return Work.of(model, 4).position

    router = 2 * 6 * tiny.CONFIG["hidden_size"]  # of two sparse layers, for every expert
    assert position(8, 2) - position(4, 2) == pytest.approx(4 * router)
    one_more = 2 * 6 * 3 * tiny.CONFIG["hidden_size"] * tiny.CONFIG["intermediate_size"]  # type: ignore[operator]
    assert position(4, 2) - position(4, 1) == pytest.approx(one_more)


@pytest.mark.parametrize(
    ("device", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA H200", 989.4), ("NVIDIA H200 NVL", 835.5),
     ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA L40S", 362.0), ("NVIDIA L4", 121.0), ("NVIDIA A40", 149.7)],
)  # fmt: skip
def test_peaks_are_found_by_the_names_devices_give_themselves(device: str, tflops: float) -> None:
    assert flops.peak(device) == tflops * 1e12


@pytest.mark.parametrize("device", ["NVIDIA GeForce GTX 1080", "NVIDIA GB200", "NVIDIA A10G", "NVIDIA A1000"])
def test_an_unknown_device_has_no_peak_though_its_name_holds_a_known_one_s(device: str) -> None:
    assert flops.peak(device) is None
