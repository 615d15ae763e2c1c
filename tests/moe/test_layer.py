"""A sparse layer inside a decoder layer: padding, gradients of the balancing loss, residual experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe.layer import MoELayer
from moe.parallel import Groups
from moe.router import Traffic
from moe.spec import MoESpec
from moe.upcycle import upcycle
from moe.vlm import VLM, train_only
from tests.bench import moe_layer, moe_layer_counts
from tests.bench.moe_layer_peers import Weights, ours
from tests.moe.tiny import batch, model


def sparse(dispatcher: str = "torch", **changes: Any) -> VLM:
    vlm = model()
    upcycle(vlm, MoESpec(dispatcher=dispatcher, **changes), Groups.single(), seed=0)
    return vlm


def test_padding_is_neither_routed_nor_counted() -> None:
    vlm = sparse(capacity_factor=0).train()
    given = batch([9, 5], [0, 0])
    rows = [
        {key: value[i : i + 1, :n] for key, value in given.items() if value.dim() == 2}
        for i, n in ((0, 9), (1, 5))
    ]
    together, alone = vlm(**given), [vlm(**row) for row in rows]
    assert together.mask.sum() < together.mask.numel()
    for layer in (0, 1):
        assert together.expert_counts[layer].sum() == (9 + 5) * 2
        each = [output.expert_counts[layer] for output in alone]
        assert together.expert_counts[layer].tolist() == (each[0] + each[1]).tolist()
    # Balance is of the real tokens: the sum of both rows' scores and choices, over 14.
    vlm.layers()[0].mlp.traffic = traffic = Traffic.of(together.mask, vlm.moe)
    hidden = torch.randn(2, 9, 32)
    out = vlm.layers()[0].mlp(hidden)
    assert traffic.reports[0].tokens == 14
    assert not out[1, 5:].any()
    assert out[1, :5].all(-1).all()


def test_the_reference_routes_and_counts_padding() -> None:
    vlm = sparse(rules="moe_llava").train()
    output = vlm(**batch([9, 5], [0, 0]))
    assert [int(counts.sum()) for counts in output.expert_counts] == [18, 18]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rules", ["default", "moe_llava"])
def test_the_balancing_loss_reaches_the_router(rules: str, recompute: bool) -> None:
    vlm = sparse(rules=rules).train()
    vlm.recompute(recompute)
    output = vlm(**batch([9, 7], [1, 0]))
    aux = torch.stack(output.aux_losses).sum()
    if rules == "moe_llava" and recompute:
        assert not aux.requires_grad  # as in the reference
        return
    aux.backward()
    for layer in (0, 2):
        assert vlm.layers()[layer].mlp.router.weight.grad.abs().sum() > 0


def test_recomputing_changes_no_gradient_of_a_sparse_model() -> None:
    given, found = batch([9, 6, 12], [1, 0, 1]), []
    for on in (False, True):
        vlm = sparse(capacity_factor=0.7, z_loss=0.001).train()
        vlm.recompute(on)
        output = vlm(**given)
        output.loss.backward()
        assert sum(int(d) for d in output.dropped) > 0
        found.append({n: p.grad for n, p in vlm.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_two_passes_before_one_backward_keep_their_own_padding() -> None:
    """Recomputation happens after the second pass has gone through the same layers."""
    one, other, found = batch([9, 4], [0, 1]), batch([3, 8], [1, 0], seed=1), []
    for on in (False, True):
        vlm = sparse().train()
        vlm.recompute(on)
        (vlm(**one).loss + vlm(**other).loss).backward()
        found.append({n: p.grad for n, p in vlm.named_parameters() if p.grad is not None})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_the_loss_adds_the_coefficients() -> None:
    vlm, logits = sparse(aux_loss=0.5, z_loss=0.25).train(), []
    for layer in (0, 2):
        router = vlm.layers()[layer].mlp.router
        router.register_forward_hook(lambda module, given, _: logits.append(given[0] @ module.weight.t()))
    output = vlm(**batch([9, 6], [1, 0]))
    ce = output.ce_sum / output.tokens
    z = sum(
        each.exp().sum(-1).log().square().mean() for each in logits
    )  # of the real tokens, over both layers
    assert len(logits) == 2
    want = ce + 0.5 * sum(output.aux_losses) + 0.25 * z
    assert output.loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert output.router_loss.item() == pytest.approx((want - ce).item(), rel=1e-5)


def test_residual_experts_mix_two_halves() -> None:
    layer: Any = sparse(residual=True).layers()[0].mlp
    assert isinstance(layer, MoELayer)
    x = torch.randn(2, 3, 32)
    share = layer.coefficient(x).softmax(-1)
    both = layer.residual(x)
    torch.testing.assert_close(share.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(layer(x), both, rtol=1e-4, atol=1e-5)  # experts are copies still
    with torch.no_grad():
        layer.experts.down.zero_()
    torch.testing.assert_close(layer(x), both * share[..., 1:], rtol=1e-4, atol=1e-5)


def test_a_frozen_router_and_frozen_experts_stay_as_they_are() -> None:
    vlm = sparse().train()
    train_only(vlm, ["projector"])
    vlm(**batch([9], [1])).loss.backward()
    assert vlm.projector[0].weight.grad is not None
    assert all(p.grad is None for p in vlm.layers().parameters())


def test_our_layer_computes_and_sends_no_more_than_it_must() -> None:
    """The benchmark's exact gates; that its contenders compute the same is shown first."""
    assert {"ours, torch", "einsum (0.9.5)", "loop", "transformers"} <= set(moe_layer.prove("cpu"))
    weights = Weights.draw(64, 96, 4, 1.0, "cpu", torch.float32)
    assert moe_layer_counts.executed(ours(weights), 512, weights) <= 1.05
    sent = moe_layer_counts.exchange()
    assert sent["torch, skew 0"] <= 1.05
    assert sent["torch, skew 1"] <= 1.05
