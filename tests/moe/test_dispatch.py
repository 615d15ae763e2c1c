"""Dispatchers against a plain loop over tokens, and against each other on several ranks."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe import dispatch
from moe.dispatch import DISPATCHERS, DispatchError, TorchDispatcher, choose
from moe.experts import Experts, mark
from moe.layer import MoELayer
from moe.parallel import Groups
from moe.router import Router
from moe.spec import MoESpec
from tests.ranks import ranks

TUTEL = pytest.param("tutel", marks=pytest.mark.tutel)
WIDTH, INNER = 8, 12
TOKENS = (13, 0, 40, 5)  # by rank: unequal, and one rank without any


@pytest.fixture(autouse=True)
def _needs_tutel(request: pytest.FixtureRequest) -> None:
    if "tutel" in request.keywords and importlib.util.find_spec("tutel") is None:
        pytest.skip("Tutel is not installed")


def layer(name: str, groups: Groups, spec: MoESpec, dtype: torch.dtype = torch.float32) -> MoELayer:
    """The same layer whatever the groups: each rank takes its slice of all experts."""
    total = spec.experts_per_layer[0]
    draw = torch.Generator().manual_seed(5)
    shapes = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER), "down_bias": (WIDTH,)}
    whole = {key: torch.randn(total, *shape, generator=draw).to(dtype) for key, shape in shapes.items()}
    router = Router(WIDTH, total, spec, torch.Generator().manual_seed(1)).to(dtype)
    router.weight.data.mul_(3)  # uneven, so that capacity drops
    held = total // groups.expert_parallel
    offset = groups.expert_rank * held
    experts = Experts({key: w[offset : offset + held].clone() for key, w in whole.items()}, F.silu)
    for parameter in experts.parameters():
        mark(parameter, total, offset)
    return MoELayer(0, router, experts, choose(name, groups))


def tokens(rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(TOKENS[rank], WIDTH, generator=draw).to(dtype).requires_grad_()
    return x, torch.randn(TOKENS[rank], WIDTH, generator=draw).to(dtype)


def by_hand(sparse: MoELayer, x_TD: Tensor) -> Tensor:
    """One token after the other."""
    routing, _ = sparse.router(x_TD)
    experts, rows = sparse.experts, []
    limit = routing.capacity or len(x_TD) * 9
    for t, x in enumerate(x_TD):
        y = x * 0
        for k in range(routing.expert_TK.shape[1]):
            if routing.slot_TK[t, k] >= limit:
                continue
            e = int(routing.expert_TK[t, k])
            inner = F.silu(experts.gate[e] @ x) * (experts.up[e] @ x)
            y = y + routing.weight_TK[t, k] * (experts.down[e] @ inner + experts.down_bias[e])
        rows.append(y)
    return torch.stack(rows)


def gradients(sparse: MoELayer, x: Tensor, y: Tensor, r: Tensor) -> dict[str, Tensor]:
    (y * r).sum().backward()
    found = {name: p.grad.clone() for name, p in sparse.named_parameters()}
    return {**found, "x": x.grad.clone(), "y": y.detach()}


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.25])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("name", ["torch", TUTEL])
def test_a_dispatcher_equals_a_loop_over_tokens(name: str, top_k: int, factor: float) -> None:
    spec = MoESpec(experts=4, top_k=top_k, capacity_factor=factor)
    one, other = layer(name, Groups.single(), spec), layer("torch", Groups.single(), spec)
    x, r = tokens(2)
    got = gradients(one, x, one(x), r)
    x.grad = None
    want = gradients(other, x, by_hand(other, x), r)
    for key, value in want.items():
        assert (got[key] - value).abs().max() <= 2e-6 * value.abs().max(), key


def test_bf16_rounds_once_on_the_way_there_and_once_on_the_way_back() -> None:
    spec = MoESpec(experts=4, top_k=2, capacity_factor=0)
    sparse = layer("torch", Groups.single(), spec, torch.bfloat16)
    x, r = tokens(2, torch.bfloat16)
    got = gradients(sparse, x, sparse(x), r)
    exact = layer("torch", Groups.single(), spec)
    exact.load_state_dict({key: value.float() for key, value in sparse.state_dict().items()})
    x32 = x.detach().float().requires_grad_()
    want = gradients(exact, x32, exact(x32), r.float())
    for key, value in want.items():
        assert (got[key].float() - value).norm() <= 0.02 * value.norm(), key


@pytest.mark.parametrize("name", ["torch", TUTEL])
def test_no_token_at_all(name: str) -> None:
    sparse = layer(name, Groups.single(), MoESpec(experts=4))
    x, r = tokens(1)
    found = gradients(sparse, x, sparse(x), r)
    assert found["y"].shape == (0, WIDTH)
    assert all(not grad.any() for grad in found.values())


def share(names: tuple[str, ...], expert_parallel: int, factor: float) -> list[dict[str, Tensor]]:
    """On every rank: its own tokens through the layer, expert gradients averaged as the engine does."""
    import torch.distributed as dist

    groups = Groups.create(expert_parallel)
    results = []
    for name in names:
        sparse = layer(name, groups, MoESpec(experts=4, top_k=2, capacity_factor=factor))
        x, r = tokens(groups.rank)
        found = gradients(sparse, x, sparse(x), r)
        for key, grad in found.items():
            if key.startswith("experts."):
                dist.all_reduce(grad, group=groups.expert_data_group)
                parts = [torch.empty_like(grad) for _ in range(groups.expert_parallel)]
                if groups.expert_parallel > 1:
                    dist.all_gather(parts, grad, group=groups.expert_group)
                    found[key] = torch.cat(parts)
            elif key.startswith("router."):
                dist.all_reduce(grad)
        results.append(found)
    return results


@pytest.mark.parametrize("factor", [0.0, 0.75])
def test_any_number_of_ranks_gives_the_same_numbers(factor: float) -> None:
    names = ("torch", "tutel") if importlib.util.find_spec("tutel") else ("torch",)
    world = len(TOKENS)
    want = ranks(world)(share, names[:1], 1, factor)
    for expert_parallel in (2, 4):
        got = ranks(world)(share, names, expert_parallel, factor)
        for rank in range(world):
            for name, found in zip(names, got[rank], strict=True):
                for key, value in want[rank][0].items():
                    scale = value.abs().max().clamp(min=1e-3) if value.numel() else 1
                    worst = (found[key] - value).abs().max() / scale if value.numel() else 0
                    assert worst <= 1e-6, f"{name}, {expert_parallel} ranks share experts, rank {rank}: {key}"


def two_dimensional() -> list[dict[str, Tensor]]:
    import os

    os.environ["LOCAL_WORLD_SIZE"] = "2"  # two nodes of two ranks
    chosen: Any = choose("tutel", Groups.create(4))
    assert chosen.two_dimensional
    return share(("tutel",), 4, 0.0)


@pytest.mark.tutel
def test_tutels_two_dimensional_exchange_gives_the_same_numbers() -> None:
    want, got = ranks(4)(share, ("torch",), 4, 0.0), ranks(4)(two_dimensional)
    for rank in range(4):
        for key, value in want[rank][0].items():
            torch.testing.assert_close(got[rank][0][key], value, rtol=1e-5, atol=1e-5)


def test_auto_is_tutel_where_it_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.util.find_spec("tutel") is not None
    assert type(choose("auto", Groups.single())) is DISPATCHERS["tutel" if installed else "torch"]

    class Missing:
        def __init__(self, groups: Groups) -> None:
            raise DispatchError("not here")

    monkeypatch.setattr(dispatch, "TutelDispatcher", Missing)
    assert isinstance(choose("auto", Groups.single()), TorchDispatcher)


def test_without_tutel_asking_for_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tutel", None)
    with pytest.raises(
        DispatchError, match=r"not installed here; see README.md#tutel, or set moe.dispatcher=torch"
    ):
        choose("tutel", Groups.single())


@pytest.mark.tutel
def test_tutel_refuses_fp16_which_poisons_its_kernels() -> None:
    sparse = layer("tutel", Groups.single(), MoESpec(experts=4), torch.float16)
    x, _ = tokens(2, torch.float16)
    with pytest.raises(DispatchError, match="train in bf16 or fp32"):
        sparse(x)


def test_the_spec_names_the_dispatchers_there_are() -> None:
    from typing import get_args, get_type_hints

    assert set(get_args(get_type_hints(MoESpec)["dispatcher"])) == {"auto", *DISPATCHERS}
