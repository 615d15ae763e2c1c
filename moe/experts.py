"""The experts of one rank, stacked in one tensor a weight and multiplied together.

A checkpoint reads three marks from each parameter to know which part of the whole it is: `expert_dim` (the
dimension that counts experts), `expert_offset` (the first one this rank holds) and `expert_total` (how many
there are over all ranks). Names, and shapes but for that dimension, do not depend on the number of ranks.

Shapes: e experts of this rank, N rows of tokens sorted by expert, D width, H inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = ("gate", "up", "down")  # as nn.Linear stores them: [e, out, in]


class Experts(nn.Module):
    """e times `down(act(up x))`, or with a gate `down(act(gate x) * up x)`; with biases or without."""

    def __init__(self, weights: dict[str, Tensor], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.gate: nn.Parameter | None = None
        self.up_bias: nn.Parameter | None = None
        self.down_bias: nn.Parameter | None = None
        self.up: nn.Parameter
        self.down: nn.Parameter
        for name, weight in weights.items():
            setattr(self, name, nn.Parameter(weight))

    @staticmethod
    def of(dense: nn.Module, total: int, offset: int, held: int) -> Experts:
        """`held` copies of a dense FFN of transformers, as experts offset, offset + 1, ... of `total`."""
        weights, activation = dense_weights(dense)
        copies = {name: w.detach()[None].repeat(held, *[1] * w.dim()) for name, w in weights.items()}
        experts = Experts(copies, activation)
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
        elif rows.is_cuda:
            load = torch.tensor(load_e, device=rows.device)
            return self.forward(rows, load)
        else:
            return self._loop(rows, load_e)
        inner = multiply(rows, self.up, self.up_bias)
        if self.gate is not None:
            inner = self.activation(multiply(rows, self.gate, None)) * inner
        else:
            inner = self.activation(inner)
        return multiply(inner, self.down, self.down_bias)

    def _loop(self, rows: Tensor, load_e: list[int]) -> Tensor:
        """On a CPU one expert after the other keeps what it works on in the cache."""
        none: list[Tensor | None] = [None] * len(load_e)
        each = [
            w.unbind() if w is not None else none
            for w in (self.up, self.gate, self.down, self.up_bias, self.down_bias)
        ]
        done = []
        for x, up, gate, down, up_bias, down_bias in zip(rows.split(load_e), *each, strict=True):
            inner = F.linear(x, up, up_bias)
            inner = self.activation(inner) if gate is None else self.activation(F.linear(x, gate)) * inner
            done.append(F.linear(inner, down, down_bias))
        return torch.cat(done)


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
    found = {name: linear.weight for name, linear in weights.items()}
    found |= {f"{name}_bias": linear.bias for name, linear in weights.items() if linear.bias is not None}
    return found, activation


def _batched(x_eSD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.bmm(x_eSD, weight.transpose(1, 2))
    return y if bias is None else y + bias[:, None]


def _grouped(x_ND: Tensor, weight: Tensor, bias: Tensor | None, load_e: Tensor, ends_e: Tensor) -> Tensor:
    y = F.grouped_mm(x_ND, weight.transpose(1, 2), offs=ends_e)
    if bias is None:
        return y
    return y + bias.repeat_interleave(load_e, 0, output_size=len(x_ND))
