"""Routing under the reference's rules against DeepSpeed's own gating functions, run here on the same draws.

What 0.9.5 and the version installed differ in is not compared: the latter counts second choices too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.router import Router, balance, route
from moe.spec import MoESpec


def logits_of(kind: str, tokens: int, experts: int, draw: torch.Generator) -> Tensor:
    logits = torch.randn(tokens, experts, generator=draw)
    if kind == "ties":
        return logits.round()
    if kind == "saturated":
        return logits * 60
    if kind == "close":  # apart, but not once they are probabilities
        return logits * 1e-8
    return logits * 3 if kind == "skewed" else logits


def cases() -> list[tuple[str, int, int, float, int, int]]:
    kinds = ("even", "ties", "saturated", "close", "skewed")
    sizes = ((1, 2), (2, 3), (7, 8), (16, 4), (33, 8), (50, 8), (64, 2))
    factors = (1.0, 1.2, 1.5, 0.5, 2.0)
    return [
        (kind, tokens, experts, factors[(at + place) % 5], (0, 0, 4)[(at + place) % 3], 10 * at + place)
        for at, kind in enumerate(kinds)
        for place, (tokens, experts) in enumerate(sizes)
    ]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("random", [False, True])
def test_routing_is_deepspeeds(top_k: int, random: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.moe import sharded_moe

    for kind, tokens, experts, factor, least, seed in cases():
        draw = torch.Generator().manual_seed(seed)
        logits = logits_of(kind, tokens, experts, draw)
        drawn = torch.rand(tokens, experts, generator=draw)
        noise = -(-drawn.log()).log() if random else torch.zeros_like(drawn)
        least = min(least, tokens) if top_k == 1 else least  # it refuses fewer tokens than that
        spec = MoESpec(rules="moe_llava", top_k=top_k, experts=experts, min_capacity=least)
        if top_k == 2:
            monkeypatch.setattr(sharded_moe, "gumbel_rsample", lambda shape, device, n=noise: n)
            l_aux, combine_TEC, _, _ = sharded_moe.top2gating(logits.clone(), factor, least)
            routing, report = route(logits, spec, factor, noise if random else None)
        else:
            draws: dict[Any, Any] = {logits.device: lambda shape, u=drawn: u}
            monkeypatch.setattr(sharded_moe, "exp_selection_uniform_map", draws)
            l_aux, combine_TEC, _, counts = sharded_moe.top1gating(logits, factor, least, use_rts=random)
            routing, report = route(logits, spec, factor, None, drawn if random else None)
            assert report.counts_E.tolist() == counts.tolist()
        where = (kind, tokens, experts, factor, least)
        assert routing.capacity == combine_TEC.shape[2], where
        assert balance(report).item() == pytest.approx(l_aux.item(), abs=1e-6), where
        assert int(report.dropped) == sum(
            max(0, int(n) - routing.capacity) for n in torch.bincount(routing.expert_TK.flatten())
        )
        if top_k == 1 and not random and report.dropped:
            continue  # who survives is torch.topk's order among equals there
        kept_TK = routing.slot_TK < routing.capacity
        ours_TEC = torch.zeros_like(combine_TEC)
        for t, k in kept_TK.nonzero().tolist():
            ours_TEC[t, routing.expert_TK[t, k], routing.slot_TK[t, k]] = routing.weight_TK[t, k]
        torch.testing.assert_close(ours_TEC, combine_TEC, rtol=0, atol=1e-6, msg=str(where))


def test_a_router_takes_recorded_draws() -> None:
    """One a token, or as DeepSpeed records them: one a token and expert."""
    spec = MoESpec(rules="moe_llava", top_k=1, experts=2, capacity_factor=0.5)
    router = Router(4, 2, spec).train()
    x_TD = torch.ones(8, 4)  # all want the same expert, which takes two
    best = int(router.weight.sum(1).argmax())
    drawn_TE = torch.full((8, 2), 0.5)
    drawn_TE[:, best] = torch.tensor([0.1, 0.9, 0.2, 0.3, 0.0, 0.8, 0.4, 0.6])
    for drawn in (drawn_TE, drawn_TE[:, best]):
        router.uniform = lambda logits, drawn=drawn: drawn
        routing, _ = router(x_TD)
        assert routing.slot_TK[:, 0].tolist()[1::4] == [0, 1]
        assert (routing.weight_TK[:, 0] > 0).nonzero()[:, 0].tolist() == [1, 5]
