"""The rules of routing: choice, order, capacity, weights, balance."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.router import Router, Traffic, balance, capacity, route
from moe.spec import MoESpec

REFERENCE = MoESpec(rules="moe_llava")
# Six tokens, four experts, and what DeepSpeed 0.9.5 made of them with its Gumbel noise at zero.
LOGITS = torch.tensor(
    [[2, 1, 0, 0], [2, 0, 1, 0], [2, 0, 0, 1], [1, 2, 0, 0], [0, 0, 3, 1], [3, 2, 1, 0]]
).float()
A, B, C, D = 0.7311, 0.2689, 0.8808, 0.1192
ALL = [{0: A, 1: B}, {0: A, 2: B}, {0: A, 3: B}, {1: A, 0: B}, {2: C, 3: D}, {0: A, 1: B}]


@pytest.mark.parametrize(
    ("factor", "places", "weights"),
    [
        (2.0, 6, ALL),
        (1.5, 5, ALL),
        (1.0, 3, [*ALL[:3], {1: 1.0}, ALL[4], {1: 1.0}]),
        (0.5, 2, [*ALL[:2], {3: 1.0}, {1: 1.0}, ALL[4], {}]),
    ],
)
def test_the_references_rules_on_six_tokens(
    factor: float, places: int, weights: list[dict[int, float]]
) -> None:
    routing, report = route(LOGITS, REFERENCE, factor)
    assert routing.capacity == places
    assert report.counts_E.tolist() == [4, 1, 1, 0]
    for expert_K, weight_K, want in zip(routing.expert_TK, routing.weight_TK, weights, strict=True):
        got = {int(e): w.item() for e, w in zip(expert_K, weight_K, strict=True) if w}
        assert got == pytest.approx(want, abs=5e-5)
    assert balance(report).item() == pytest.approx(1.511661, abs=1e-6)


def test_capacity_is_deepspeeds() -> None:
    assert capacity(6, 4, 2, 1.5, 0) == math.ceil(6 / 4 * 1.5 * 2) == 5
    assert capacity(6, 4, 1, 1.0, 4) == 4


def test_noise_moves_only_choices_beyond_the_first() -> None:
    noise = torch.tensor([[0.0, 0, 0, 9]]).expand(6, 4)
    clean, _ = route(LOGITS, REFERENCE, 0)
    noisy, _ = route(LOGITS, REFERENCE, 0, noise)
    assert torch.equal(clean.expert_TK[:, 0], noisy.expert_TK[:, 0])
    assert noisy.expert_TK[:, 1].tolist() == [3] * 6
    # Weights are of the clean scores.
    want = LOGITS.softmax(-1).gather(1, noisy.expert_TK)
    torch.testing.assert_close(noisy.weight_TK, want / want.sum(1, keepdim=True))


def test_noise_and_random_order_are_off_in_evaluation() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 8)
    for spec in (
        replace(REFERENCE, noise="gumbel"),
        replace(REFERENCE, top_k=1, capacity_factor=0.5, eval_capacity_factor=0.5),
    ):
        router = Router(8, 4, spec)
        router.train()
        drawn = [router(x)[0] for _ in range(2)]
        assert any(
            not torch.equal(getattr(drawn[0], k), getattr(drawn[1], k)) for k in ("expert_TK", "slot_TK")
        )
        router.eval()
        first, second = (router(x)[0] for _ in range(2))
        assert torch.equal(first.expert_TK, second.expert_TK)
        assert torch.equal(first.slot_TK, second.slot_TK)


def test_a_random_order_serves_the_highest_draws() -> None:
    logits = torch.tensor([[5.0, 0.0]]).expand(4, 2)
    spec = replace(REFERENCE, top_k=1, experts=2)
    routing, report = route(logits, spec, 1.0, None, torch.tensor([0.1, 0.9, 0.2, 0.8]))
    assert routing.slot_TK[:, 0].tolist() == [2, 0, 3, 1]  # survivors as they came
    assert [bool(w) for w in routing.weight_TK[:, 0]] == [False, True, False, True]
    assert int(report.dropped) == 2


def test_a_single_choice_weighs_its_probability_or_one() -> None:
    logits = LOGITS.clone().requires_grad_()
    spec = MoESpec(top_k=1)
    routing, _ = route(logits, spec, 0)
    assert routing.weight_TK.tolist() == [[1.0]] * 6
    (grad,) = torch.autograd.grad(routing.weight_TK.sum(), logits)
    want = torch.autograd.grad(logits.softmax(-1).max(-1).values.log().sum(), logits)[0]
    torch.testing.assert_close(grad, want)
    routing, _ = route(logits, replace(spec, rules="moe_llava"), 0)
    torch.testing.assert_close(routing.weight_TK[:, 0], LOGITS.softmax(-1).max(-1).values)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 3),
    factor=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    seed=st.integers(0, 999),
)
def test_every_queue_is_full_without_gaps(
    tokens: int, experts: int, top_k: int, factor: float, seed: int
) -> None:
    top_k = min(top_k, experts)
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    routing, report = route(logits, MoESpec(experts=experts, top_k=top_k), factor)
    for expert in range(experts):
        slots = routing.slot_TK[routing.expert_TK == expert].sort().values
        assert slots.tolist() == list(range(len(slots)))
        assert int(routing.load_E[expert]) == len(slots)
        # First choices come before second ones, each in the order of tokens.
        order = [
            int(routing.slot_TK[t, k])
            for k in range(top_k)
            for t in range(tokens)
            if routing.expert_TK[t, k] == expert
        ]
        assert order == sorted(order)
    kept = torch.ones_like(routing.slot_TK, dtype=torch.bool)
    if routing.capacity is not None:
        kept = routing.slot_TK < routing.capacity
    assert int((~kept).sum()) == int(report.dropped)
    assert not routing.weight_TK[~kept].any()
    some = kept.any(1)
    torch.testing.assert_close(routing.weight_TK.sum(1)[some], torch.ones(int(some.sum())))
    assert all(len(set(row)) == top_k for row in routing.expert_TK.tolist())
    assert report.counts_E.sum() == tokens * top_k


def test_an_even_router_has_a_balance_of_one_and_z_is_the_squared_logsumexp() -> None:
    logits = torch.eye(4).repeat(5, 1)
    _, report = route(logits, MoESpec(z_loss=0.1), 0)
    assert balance(report).item() == pytest.approx(1.0)
    assert report.z.item() == pytest.approx(logits.logsumexp(-1).square().mean().item())


def test_a_pass_knows_its_real_tokens() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert Traffic.of(mask, None) is None
    assert Traffic.of(mask, MoESpec()).real.tolist() == [0, 1, 3]
    assert Traffic.of(mask[:, :1], MoESpec()).real is None
    assert Traffic.of(mask, REFERENCE).real is None  # the reference routes padding


@pytest.mark.parametrize("factor", [0.0, 1.5])
@pytest.mark.parametrize("top_k", [1, 2])
def test_routing_needs_no_number_from_the_device(top_k: int, factor: float) -> None:
    """On the meta device there is none to be had; on a GPU the host would wait for it."""
    logits = torch.randn(16, 4, device="meta", requires_grad=True)
    order = torch.rand(16, device="meta") if top_k == 1 else None
    spec = MoESpec(rules="moe_llava", top_k=top_k)
    routing, report = route(logits, spec, factor, torch.zeros_like(logits), order)
    (balance(report) + routing.weight_TK.sum()).backward()
    assert routing.load_E.shape == report.first_E.shape == (4,)
