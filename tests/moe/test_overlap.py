"""Tokens that travel in pieces arrive as those that travel at once: outputs, gradients, under recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.overlap import cuts
from moe.parallel import Groups
from moe.spec import MoESpec
from moe.upcycle import upcycle
from moe.vlm import train_only
from tests.moe import tiny
from tests.moe.test_dispatch import gradients, layer, tokens
from tests.ranks import ranks


def both_ways(expert_parallel: int, pieces: int, recompute: bool) -> list[dict[str, Any]]:
    """At once, and in pieces, over capacities and numbers of choices."""
    groups = Groups.create(expert_parallel)
    found = []
    for factor, top_k in ((0.0, 2), (0.5, 2), (1.25, 1)):
        results = []
        for cut in (1, pieces):
            sparse = layer("torch", groups, MoESpec(experts=4, top_k=top_k, capacity_factor=factor))
            sparse.groups, sparse.pieces = groups, cut
            x, r = tokens(groups.rank)
            y = checkpoint(sparse, x, use_reentrant=False) if recompute else sparse(x)
            results.append({name: g.numpy() for name, g in gradients(sparse, x, y, r).items()})
        found.append({"at once": results[0], "in pieces": results[1]})
    return found


@pytest.mark.parametrize(
    ("world", "expert_parallel", "pieces", "recompute"), [(4, 4, 3, False), (4, 2, 2, True), (2, 2, 8, False)]
)
def test_pieces_give_the_same_numbers(world: int, expert_parallel: int, pieces: int, recompute: bool) -> None:
    for rank in ranks(world)(both_ways, expert_parallel, pieces, recompute):
        for case in rank:
            assert case["at once"].keys() == case["in pieces"].keys()
            for name, want in case["at once"].items():
                got = case["in pieces"][name]
                torch.testing.assert_close(
                    torch.tensor(got),
                    torch.tensor(want),
                    rtol=1e-5,
                    atol=1e-5,
                    msg=lambda m, n=name: f"{n}: {m}",
                )


def on_the_way() -> list[str]:
    """What happens in which order on a rank."""
    groups = Groups.create(2)
    seen: list[str] = []
    sparse = layer("torch", groups, MoESpec(experts=4, capacity_factor=0.0))
    sparse.groups, sparse.pieces = groups, 3
    experts, exchange = sparse.experts.forward, dist.all_to_all_single

    def computing(rows: Tensor, load_e: list[int]) -> Tensor:
        seen.append("compute")
        return experts(rows, load_e)

    def sending(*args: Any, async_op: bool = False, **rest: Any) -> Any:
        seen.append("send" if async_op else "count")
        return exchange(*args, async_op=async_op, **rest)

    sparse.experts.forward = computing  # type: ignore[method-assign]
    dist.all_to_all_single = sending  # type: ignore[assignment]
    x, r = tokens(0)
    (sparse(x) * r).sum().backward()
    return seen


def test_all_pieces_are_on_their_way_before_the_first_is_computed() -> None:
    for seen in ranks(2)(on_the_way):
        assert seen[:4] == ["count", "send", "send", "send"]
        assert seen[4:10] == ["compute", "send"] * 3  # answers go back while the next piece is computed
        assert seen[10:] == ["send"] * 6  # gradients: in, and on


def test_queues_are_cut_evenly_and_wholly() -> None:
    found = cuts(torch.tensor([0, 1, 7, 9]), 3)
    assert found.tolist() == [[0, 0, 0, 0], [0, 0, 2, 3], [0, 0, 4, 6], [0, 1, 7, 9]]


def whole_model(pieces: int) -> list[float]:
    groups = Groups.create(2)
    vlm = tiny.model()
    spec = MoESpec(overlap=pieces, expert_parallel=2)
    upcycle(vlm, spec, groups, seed=0)
    train_only(vlm, ["experts", "router"])
    vlm.train()
    vlm.recompute()
    output = vlm(**tiny.batch([11, 6 + groups.rank], [1, 0], seed=groups.rank))
    output.loss.backward()
    grads = [p.grad.double().abs().sum().item() for _, p in vlm.named_parameters() if p.grad is not None]
    return [output.loss.item(), *grads]


def test_a_whole_model_by_its_spec() -> None:
    tiny.model()
    for one, three in zip(ranks(2)(whole_model, 1), ranks(2)(whole_model, 3), strict=True):
        assert len(one) > 3
        assert three == pytest.approx(one, rel=1e-5)


def test_overlap_is_pytorchs() -> None:
    [(field, words, _)] = MoESpec(overlap=2, dispatcher="tutel").check()
    assert field == "overlap"
    assert "what is overlapped is PyTorch's" in words
    assert [field for field, _, _ in MoESpec(overlap=0).check()] == ["overlap"]
