"""Stacked experts against one FFN after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.activations import NewGELUActivation

from moe import one_by_one
from moe.experts import Experts, _grouped, dense_weights
from tests.moe.tiny import model

LOADS = [5, 0, 7]


@pytest.fixture(params=["phi2", "stablelm"])
def experts(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, Experts]:
    dense = model(request.param).layers()[0].mlp
    stacked = Experts.of(dense, 6, 3, 3)
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return dense, stacked


def alone(dense: torch.nn.Module, stacked: Experts, expert: int, x: Tensor) -> Tensor:
    found, _ = dense_weights(dense)
    with torch.no_grad():
        for name, weight in found.items():
            weight.copy_(getattr(stacked, name)[expert])
    return dense(x)


def test_each_row_meets_its_expert(experts: tuple[torch.nn.Module, Experts]) -> None:
    dense, stacked = experts
    x = torch.randn(sum(LOADS), 32)
    want = torch.cat([alone(dense, stacked, e, rows) for e, rows in enumerate(x.split(LOADS))])
    torch.testing.assert_close(stacked(x, LOADS), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stacked(x, torch.tensor(LOADS)), want, rtol=1e-5, atol=1e-6)
    queues = torch.zeros(3, 7, 32)
    for e, rows in enumerate(x.split(LOADS)):
        queues[e, : len(rows)] = rows
    got = stacked(queues, None)
    torch.testing.assert_close(
        torch.cat([got[e, :n] for e, n in enumerate(LOADS)]), want, rtol=1e-5, atol=1e-6
    )


def test_grouped_and_looped_experts_have_the_same_gradients(experts: tuple[torch.nn.Module, Experts]) -> None:
    _, stacked = experts
    found = []
    for loads in (LOADS, torch.tensor(LOADS)):
        stacked.zero_grad()
        x = torch.randn(12, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        stacked(x, loads).square().sum().backward()
        found.append([x.grad, *[p.grad.clone() for p in stacked.parameters()]])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_grouped_product_of_no_rows_is_empty() -> None:
    none = torch.zeros(2, dtype=torch.int64)
    assert _grouped(torch.zeros(0, 8), torch.ones(2, 4, 8), None, none, none.int()).shape == (0, 4)


def test_no_rows_at_all_leave_gradients_of_zero(experts: tuple[torch.nn.Module, Experts]) -> None:
    _, stacked = experts
    for loads in ([0, 0, 0], torch.zeros(3, dtype=torch.int64)):
        stacked.zero_grad()
        x = torch.zeros(0, 32, requires_grad=True)
        stacked(x, loads).sum().backward()
        assert x.grad is not None
        assert all(p.grad is not None and not p.grad.any() for p in stacked.parameters())


def test_a_device_that_leaves_the_gradient_of_an_idle_expert_unwritten_is_made_up_for(
    experts: tuple[torch.nn.Module, Experts], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stacked = experts
    multiply = torch.nn.functional.grouped_mm

    def as_on_blackwell(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        product = multiply(a, b, offs=offs)
        if b.dim() == 2:
            product[1] = torch.nan  # LOADS has no row for it
        return product

    def gradients() -> list[Tensor]:
        names = dict(stacked.named_parameters())
        loss = stacked(torch.ones(12, 32), torch.tensor(LOADS)).square().sum()
        return list(torch.autograd.grad(loss, [names["up"], names["down"]]))

    want = gradients()
    monkeypatch.setattr("torch.nn.functional.grouped_mm", as_on_blackwell)
    assert gradients()[0][1].isnan().all()
    monkeypatch.setattr("moe.experts._leaves_empty_groups", lambda _: True)
    for got, sound in zip(gradients(), want, strict=True):
        assert torch.equal(got, sound)
        assert not got[1].any()


def test_room_kept_from_an_answer_can_be_trained_in(experts: tuple[torch.nn.Module, Experts]) -> None:
    _, stacked = experts
    one_by_one._rooms.kept.clear()
    with torch.inference_mode():
        stacked(torch.randn(12, 32), LOADS)
    x = torch.randn(12, 32, requires_grad=True)
    want = torch.autograd.grad(stacked(x, torch.tensor(LOADS)).square().sum(), x)
    got = torch.autograd.grad(stacked(x, LOADS).square().sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_parameters_say_which_experts_they_hold(experts: tuple[torch.nn.Module, Experts]) -> None:
    _, stacked = experts
    for parameter in stacked.parameters():
        assert (parameter.expert_dim, parameter.expert_offset, parameter.expert_total) == (0, 3, 6)
        assert parameter.shape[0] == 3


def test_phis_activation_keeps_one_tensor_and_gives_transformers_numbers() -> None:
    found = model("phi2").layers()[0].mlp.activation_fn  # type: ignore[union-attr]
    x, kept = torch.linspace(-6, 6, 101, requires_grad=True), set[int]()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = found(x)
    assert len(kept) == 1
    torch.testing.assert_close(y, NewGELUActivation()(x), rtol=1e-5, atol=1e-6)
