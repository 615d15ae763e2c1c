"""The experts of one rank, stacked in one tensor a weight and multiplied together.

A checkpoint reads three marks from each parameter to know which part of the whole it is: `expert_dim` (the
dimension that counts experts), `expert_offset` (the first one this rank holds) and `expert_total` (how many
there are over all ranks). Names, and shapes but for that dimension, do not depend on the number of ranks.

Shapes: e experts of this rank, N rows of tokens sorted by expert, D width, H inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.spec import LoraSpec

WEIGHTS = ("gate", "up", "down")  # as nn.Linear stores them: [e, out, in]


class Experts(nn.Module):
    """e times `down(act(up x))`, or with a gate `down(act(gate x) * up x)`; with biases or without.

    Each weight may have LoRA's two factors beside it: `up_lora_a` [e, rank, in] and `up_lora_b` [e, out, rank].
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        activation: Callable[[Tensor], Tensor],
        lora: LoraSpec | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.lora = activation, lora
        self.gate: nn.Parameter | None = None
        self.up_bias: nn.Parameter | None = None
        self.down_bias: nn.Parameter | None = None
        self.up: nn.Parameter
        self.down: nn.Parameter
        for name, weight in weights.items():
            setattr(self, name, nn.Parameter(weight))

    @staticmethod
    def of(dense: nn.Module, total: int, offset: int, held: int, lora: LoraSpec | None = None) -> Experts:
        """`held` copies of a dense FFN of transformers, as experts offset, offset + 1, ... of `total`."""
        weights, activation = dense_weights(dense)
        copies = {name: w.detach()[None].repeat(held, *[1] * w.dim()) for name, w in weights.items()}
        experts = Experts(copies, activation, lora)
        for parameter in experts.parameters():
            mark(parameter, total, offset)
        return experts

    def forward(self, rows: Tensor, load_e: list[int] | Tensor | None) -> Tensor:
        """[N, D] with the experts' row counts, or [e, S, D] without; gives the same shape."""
        multiply: Callable[..., Tensor]
        if load_e is None:
            multiply = _batched
        elif isinstance(load_e, Tensor):
            ends, load = load_e.cumsum(0).to(torch.int32), load_e

            def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                return _grouped(x, weight, bias, load, ends)
        elif rows.is_cuda or self.lora is not None:
            load = torch.tensor(load_e, device=rows.device)
            return self.forward(rows, load)
        else:
            weights = (self.up, self.gate, self.down, self.up_bias, self.down_bias)
            done = OneByOne.apply(rows, *weights, load_e, self.activation)  # type: ignore[no-untyped-call]
            return cast(Tensor, done)

        def linear(x: Tensor, name: str) -> Tensor:
            y = multiply(x, getattr(self, name), getattr(self, f"{name}_bias", None))
            factors = self.factors(name)
            if factors is None or self.lora is None:
                return y
            a, b = (_wide(factor, dim) for factor, dim in zip(factors, (1, 2), strict=True))
            low = multiply(F.dropout(x, self.lora.dropout, self.training), a, None)
            return y + multiply(low, b, None) * self.lora.scale

        inner = linear(rows, "up")
        inner = self.activation(inner) if self.gate is None else self.activation(linear(rows, "gate")) * inner
        return linear(inner, "down")

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """LoRA's factors of a weight: [e, rank, in] and [e, out, rank]."""
        if not hasattr(self, f"{name}_lora_a"):
            return None
        return getattr(self, f"{name}_lora_a"), getattr(self, f"{name}_lora_b")

    @torch.no_grad()
    def merge(self) -> None:
        """Add LoRA's products to the weights and forget the factors."""
        for name in WEIGHTS:
            if (factors := self.factors(name)) is None or self.lora is None:
                continue
            weight = getattr(self, name)
            added = torch.bmm(factors[1].float(), factors[0].float()) * self.lora.scale
            weight.copy_(weight.float() + added)
            delattr(self, f"{name}_lora_a")
            delattr(self, f"{name}_lora_b")
        self.lora = None


class OneByOne(torch.autograd.Function):
    """On a CPU: one expert after the other, some rows at a time: what is in the making stays in the cache.

    Keeps what went into the activation and computes the rest again: half of what autograd would keep.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        up: Tensor,
        gate: Tensor | None,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        load_e: list[int],
        activation: Callable[[Tensor], Tensor],
    ) -> Tensor:
        inner = rows.new_empty(len(rows), up.shape[1])
        gated = torch.empty_like(inner) if gate is not None else None
        out = rows.new_empty(len(rows), down.shape[1])
        for e, part in _parts(load_e, up.shape[1]):
            x = rows[part]
            _linear(x, up, up_bias, e, inner[part])
            if gate is None or gated is None:
                hidden = activation(inner[part])
            else:
                hidden = activation(_linear(x, gate, None, e, gated[part])) * inner[part]
            _linear(hidden, down, down_bias, e, out[part])
        ctx.load_e, ctx.activation = load_e, activation
        ctx.save_for_backward(rows, up, gate, down, up_bias, down_bias, inner, gated)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, *weights, inner, gated = ctx.saved_tensors
        up, gate, down, _, _ = weights
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        found = [
            torch.empty_like(w) if w is not None and wanted else None
            for w, wanted in zip(weights, ctx.needs_input_grad[1:6], strict=True)
        ]
        grad_up, grad_gate, grad_down, grad_up_bias, grad_down_bias = found
        for e, load in enumerate(ctx.load_e):
            for grad in found if not load else ():
                if grad is not None:
                    grad[e].zero_()
        last = -1
        for e, part in _parts(ctx.load_e, up.shape[1]):
            x, dy = rows[part], grads[0][part]
            beside = gated[part] if gated is not None else None
            hidden, *steps = _activated(ctx.activation, inner[part], beside, dy @ down[e])
            for grad, step, seen in (
                (grad_down, dy, hidden),
                (grad_up, steps[0], x),
                (grad_gate, steps[-1], x),
            ):
                if grad is not None and e != last:
                    torch.mm(step.t(), seen, out=grad[e])
                elif grad is not None:
                    grad[e].addmm_(step.t(), seen)
            for bias, step in ((grad_up_bias, steps[0]), (grad_down_bias, dy)):
                if bias is not None:
                    bias[e] = step.sum(0) if e != last else bias[e] + step.sum(0)
            last = e
            if grad_rows is not None:
                torch.mm(steps[0], up[e], out=grad_rows[part])
                if gate is not None:
                    grad_rows[part].addmm_(steps[1], gate[e])
        return (grad_rows, *found, None, None)


def _activated(
    activation: Callable[[Tensor], Tensor], inner: Tensor, gated: Tensor | None, grad: Tensor
) -> tuple[Tensor, ...]:
    """(what the activation gave, the gradients of `inner` and `gated`)."""
    if gated is not None and (activation is F.silu):
        # The exponential is what costs here: once, not once more for the slope.
        sigmoid = gated.sigmoid()
        silu = gated * sigmoid
        slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
        return silu * inner, grad * silu, slope.mul_(grad).mul_(inner)
    before = [t.detach().requires_grad_() for t in (inner, gated) if t is not None]
    with torch.enable_grad():
        hidden = activation(before[-1])
        if gated is not None:
            hidden = hidden * before[0]
    return hidden.detach(), *torch.autograd.grad(hidden, before, grad)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, e: int, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight[e].t(), out=out)
    return torch.addmm(bias[e], x, weight[e].t(), out=out)


def _parts(load_e: list[int], inner: int) -> Iterator[tuple[int, slice]]:
    """(expert, some of its rows): two megabytes of what is in the making."""
    rows, start = max(128, 2**19 // inner), 0
    for e, load in enumerate(load_e):
        for place in range(start, start + load, rows):
            yield e, slice(place, min(place + rows, start + load))
        start += load


def mark(parameter: Tensor, total: int, offset: int) -> None:
    """Say which experts of all a stacked tensor holds."""
    marks = {"expert_dim": 0, "expert_offset": offset, "expert_total": total}
    for name, value in marks.items():
        setattr(parameter, name, value)


def dense_weights(dense: Any) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """A dense FFN's tensors under our names, and its activation: Phi's fc1 and fc2, or a gated one."""
    if hasattr(dense, "fc1"):
        weights = {"up": dense.fc1, "down": dense.fc2}
        activation = dense.activation_fn
    else:
        weights = {"gate": dense.gate_proj, "up": dense.up_proj, "down": dense.down_proj}
        activation = dense.act_fn
        if type(activation).__name__ in ("SiLU", "SiLUActivation"):
            activation = F.silu  # known by name below, for its slope
    found = {name: linear.weight for name, linear in weights.items()}
    for name, linear in weights.items():
        if hasattr(linear, "lora_A"):
            found[f"{name}_lora_a"] = linear.lora_A["default"].weight
            found[f"{name}_lora_b"] = linear.lora_B["default"].weight
    found |= {f"{name}_bias": linear.bias for name, linear in weights.items() if linear.bias is not None}
    return found, activation


def _wide(factor: Tensor, dim: int) -> Tensor:
    """A LoRA factor with a rank that is a multiple of 8: grouped products want rows of whole 16 bytes."""
    missing = -factor.shape[dim] % 8
    if not missing:
        return factor
    return F.pad(factor, (0, missing) if dim == 2 else (0, 0, 0, missing))


def _batched(x_eSD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.bmm(x_eSD, weight.transpose(1, 2))
    return y if bias is None else y + bias[:, None]


def _grouped(x_ND: Tensor, weight: Tensor, bias: Tensor | None, load_e: Tensor, ends_e: Tensor) -> Tensor:
    y = F.grouped_mm(x_ND, weight.transpose(1, 2), offs=ends_e)
    if bias is None:
        return y
    return y + bias.repeat_interleave(load_e, 0, output_size=len(x_ND))
