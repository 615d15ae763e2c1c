"""The experts of one rank, stacked in one tensor a weight and multiplied together.

A checkpoint reads three marks from each parameter to know which part of the whole it is: `expert_dim` (the
dimension that counts experts), `expert_offset` (the first one this rank holds) and `expert_total` (how many
there are over all ranks). Names, and shapes but for that dimension, do not depend on the number of ranks.

Shapes: e experts of this rank, N rows of tokens sorted by expert, D width, H inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.one_by_one import OneByOne
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
    y = cast(Tensor, Grouped.apply(x_ND, weight, ends_e))  # type: ignore[no-untyped-call]
    if bias is None:
        return y
    return y + bias.repeat_interleave(load_e, 0, output_size=len(x_ND))


class Grouped(torch.autograd.Function):
    """torch's grouped product of rows and each expert's own [e, out, in]; no rows are fine, also backward.

    Keeps the parameter itself, not a view of it: ZeRO 3 takes its memory away between forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight: Tensor, ends_e: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight, ends_e)
        if not len(x_ND):
            return x_ND.new_zeros(0, weight.shape[1])
        return F.grouped_mm(x_ND, weight.transpose(1, 2), offs=ends_e)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_ND, weight, ends_e = ctx.saved_tensors
        grad = grads[0].contiguous()
        if not len(x_ND):
            return torch.zeros_like(x_ND), torch.zeros_like(weight), None
        grad_x = F.grouped_mm(grad, weight, offs=ends_e) if ctx.needs_input_grad[0] else None
        grad_w = F.grouped_mm(grad.t(), x_ND, offs=ends_e) if ctx.needs_input_grad[1] else None
        if grad_w is not None and _leaves_empty_groups(grad_w.device):
            empty_e = ends_e.diff(prepend=ends_e.new_zeros(1)) == 0
            grad_w.masked_fill_(empty_e[:, None, None], 0)
        return grad_x, grad_w, None


@cache
def _leaves_empty_groups(device: torch.device) -> bool:
    """Whether the weights' gradient of an expert without rows is whatever its memory held.

    So it is on Blackwell (pytorch issue 172439), and not on Hopper, nor on a CPU.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10
