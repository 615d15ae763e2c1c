"""A sparse model is its dense parent at first, on any number of ranks."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe.backbones import LANGUAGE
from moe.parallel import Groups
from moe.spec import MoESpec
from moe.stages import STAGES
from moe.upcycle import UpcycleError, sparse_layers, upcycle
from moe.vlm import train_only
from tests.moe.tiny import batch, model
from tests.ranks import ranks

SPECS = {
    "plain": MoESpec(),
    "one choice": MoESpec(top_k=1),
    "three of five": MoESpec(experts=5, top_k=3),
    "residual": MoESpec(residual=True),
    "numbers by layer": MoESpec(experts=(2, 6), layers=(3, 1)),
    "the reference's rules": MoESpec(rules="moe_llava", eval_capacity_factor=2.0),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dispatcher", ["torch", pytest.param("tutel", marks=pytest.mark.tutel)])
@pytest.mark.parametrize("backbone", ["phi2", "stablelm"])
def test_the_first_step_equals_the_dense_parent(backbone: str, dispatcher: str, name: str) -> None:
    if dispatcher == "tutel" and importlib.util.find_spec("tutel") is None:
        pytest.skip("Tutel is not installed")
    vlm = model(backbone).eval()
    given = batch([11, 6, 9], [1, 0, 2])
    dense = vlm(**given)
    upcycle(vlm, replace(SPECS[name], dispatcher=dispatcher), Groups.single(), seed=0)
    vlm.eval()
    sparse = vlm(**given)
    real = sparse.mask[..., None]
    torch.testing.assert_close(sparse.logits * real, dense.logits * real, rtol=1e-4, atol=1e-5)
    assert sparse.ce_sum.item() == pytest.approx(dense.ce_sum.item(), rel=1e-5)


@pytest.mark.parametrize("backbone", LANGUAGE)
def test_every_backbone_can_be_made_sparse(backbone: str) -> None:
    vlm = model(backbone).eval()
    given = batch([7, 5], [1, 0])
    dense = vlm(**given).ce_sum.item()
    upcycle(vlm, MoESpec(dispatcher="torch"), Groups.single(), seed=0)
    assert vlm.eval()(**given).ce_sum.item() == pytest.approx(dense, rel=1e-5)


@pytest.mark.parametrize(
    ("layers", "want"),
    [
        ("first_half", (0, 1, 2)),
        ("second_half", (3, 4, 5, 6)),
        ("sparse", (0, 2, 4, 6)),
        ("dense", (0, 1, 2, 3, 4, 5, 6)),
        ((5, 1), (1, 5)),
    ],
)
def test_which_of_seven_layers(layers: Any, want: tuple[int, ...]) -> None:
    assert sparse_layers(layers, 7) == want


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (MoESpec(layers=(0, 4)), r"moe.layers names layer \[4\], but the model has layers 0 to 3"),
        (
            MoESpec(experts=(2, 2, 2)),
            r"names 3 numbers of experts, but moe.layers=sparse makes 2 layers sparse",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_words(spec: MoESpec, said: str) -> None:
    with pytest.raises(UpcycleError, match=said):
        upcycle(model(), spec, Groups.single(), seed=0)


def test_experts_must_divide_over_the_ranks() -> None:
    three = replace(Groups.single(), expert_parallel=3)
    with pytest.raises(
        UpcycleError, match=r"moe.experts \(4\) must be a multiple of moe.expert_parallel \(3\)"
    ):
        upcycle(model(), MoESpec(dispatcher="torch"), three, seed=0)


def test_a_sparse_model_is_not_made_sparse_again() -> None:
    vlm = model()
    upcycle(vlm, MoESpec(), Groups.single(), seed=0)
    with pytest.raises(UpcycleError, match="sparse already"):
        upcycle(vlm, MoESpec(), Groups.single(), seed=0)


def test_gates_follow_from_seed_and_layer_alone() -> None:
    def gates(seed: int, layers: Any) -> dict[str, Tensor]:
        vlm = model()
        upcycle(vlm, MoESpec(layers=layers), Groups.single(), seed=seed)
        return {n: p.detach() for n, p in vlm.named_parameters() if ".router." in n}

    few, many, other = gates(1, "sparse"), gates(1, "dense"), gates(2, "sparse")
    for name, gate in few.items():
        assert torch.equal(gate, many[name])
        assert not torch.equal(gate, other[name])
        assert gate.abs().max() <= 32**-0.5
    assert len({gate.sum().item() for gate in many.values()}) == 4


# ------------------------------------------------------------------ one rank, two, four

# A rank's micro-batch: lengths and images, all unequal, one rank without any image.
PARTS = [([11, 6], [1, 0]), ([5], [0]), ([9, 8, 14], [2, 1, 0]), ([7], [1])]


def train(expert_parallel: int, dispatcher: str, spec: MoESpec) -> tuple[float, dict[str, Tensor]]:
    """The loss and every gradient of the four parts as one step, whatever the number of ranks."""
    groups = Groups.create(expert_parallel)
    vlm = model()
    upcycle(vlm, replace(spec, dispatcher=dispatcher), groups, seed=0)
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if ".experts." in name:  # no longer copies; the same whoever holds them
                first = parameter.expert_offset
                for place in range(len(parameter)):
                    draw = torch.Generator().manual_seed(first + place)
                    parameter[place] += 0.05 * torch.randn(parameter.shape[1:], generator=draw)
    train_only(vlm, STAGES["moe"].trains)
    vlm.train()
    vlm.recompute()
    batches = [batch(*part, seed=place) for place, part in enumerate(PARTS)]
    tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    value, gradients = torch.zeros(()), {}
    for given in batches[groups.rank :: groups.world]:
        output = vlm(**given)
        loss = output.ce_sum * groups.world / tokens + output.router_loss * groups.world / len(batches)
        loss.backward()
        value += loss.detach() / groups.world
    for name, parameter in vlm.named_parameters():
        if not parameter.requires_grad:
            continue
        grad = parameter.grad / groups.world
        if groups.world > 1:
            dist.all_reduce(grad, group=groups.expert_data_group if ".experts." in name else None)
        if groups.expert_parallel > 1 and ".experts." in name:
            slices = [torch.empty_like(grad) for _ in range(groups.expert_parallel)]
            dist.all_gather(slices, grad, group=groups.expert_group)
            grad = torch.cat(slices)
        gradients[name] = grad
    if groups.world > 1:
        dist.all_reduce(value)
    return value.item(), gradients


def equal(
    got: tuple[float, dict[str, Tensor]], want: tuple[float, dict[str, Tensor]], tolerance: float
) -> None:
    assert got[0] == pytest.approx(want[0], rel=tolerance)
    assert got[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        assert (got[1][name] - grad).norm() <= tolerance * grad.norm(), name


@pytest.mark.parametrize("capacity_factor", [0.0, 0.6])
@pytest.mark.parametrize("dispatcher", ["torch", pytest.param("tutel", marks=pytest.mark.tutel)])
def test_one_two_and_four_ranks_train_alike(dispatcher: str, capacity_factor: float) -> None:
    """Expert parallel 1, 2 and 4 over as many ranks, of unequal tokens; dropless and with tokens dropped."""
    if dispatcher == "tutel" and importlib.util.find_spec("tutel") is None:
        pytest.skip("Tutel is not installed")
    spec = MoESpec(experts=4, capacity_factor=capacity_factor, z_loss=0.001)
    want = ranks(1)(train, 1, "torch", spec)[0]
    for world, expert_parallel in ((2, 2), (4, 2), (4, 4)):
        for result in ranks(world)(train, expert_parallel, dispatcher, spec):
            equal(result, want, 1e-6)
