"""Experts on a CPU: one after the other, some rows at a time, so that what is in the making stays in the cache.

Shapes: e experts, N rows of tokens sorted by expert, D width, H inner width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class OneByOne(torch.autograd.Function):
    """`down(act(gate x) * up x)` of each row's expert, or `down(act(up x))`.

    Keeps what went into the activation, and what came out of a silu, and computes the rest again: three fifths of
    what autograd would keep.
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
        # In silu the exponential is what costs: what it gave is kept too, then.
        keeps = 1 + (gate is not None) + (gate is not None and activation is F.silu)
        out = rows.new_empty(len(rows), down.shape[1])
        (making,) = _room(rows, 1, up.shape[1])
        kept = []  # a tensor for each part, small enough for memory that was used before
        for e, part in _parts(load_e, up.shape[1]):
            x = rows[part]
            here = rows.new_empty(keeps, len(x), up.shape[1])
            inner = _linear(x, up, up_bias, e, here[0])
            if gate is None:
                hidden = activation(inner)
            else:
                before = _linear(x, gate, None, e, here[1])
                after = activation(before) if keeps < 3 else _silu(before, here[2])
                hidden = torch.mul(after, inner, out=making[: len(x)])
            _linear(hidden, down, down_bias, e, out[part])
            kept.append(here)
        ctx.load_e, ctx.activation = load_e, activation
        ctx.save_for_backward(rows, up, gate, down, up_bias, down_bias, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, *others = ctx.saved_tensors  # once: a recomputed pass gives them once
        weights, pieces = others[:5], others[5:]
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
        making = _room(rows, 3, up.shape[1])
        parts = _parts(ctx.load_e, up.shape[1])
        for (e, part), kept in zip(parts, pieces, strict=True):
            x, dy = rows[part], grads[0][part]
            grad_hidden = torch.mm(dy, down[e], out=making[0, : len(dy)])
            hidden, *steps = _activated(ctx.activation, kept, grad_hidden, making[1:, : len(dy)])
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


def _silu(x: Tensor, out: Tensor) -> Tensor:
    torch.ops.aten.silu.out(x, out=out)
    return out


def _activated(
    activation: Callable[[Tensor], Tensor], kept: Tensor, grad: Tensor, room: Tensor
) -> tuple[Tensor, ...]:
    """(what the activation gave, the gradients of what went in: `up x`, `gate x`).

    `kept`: these two, and silu of the second. `grad` and the two in `room` are written over.
    """
    if len(kept) == 3:
        inner, gated, opened = kept
        slope = torch.mul(grad, inner, out=room[0])
        torch.ops.aten.silu_backward.grad_input(slope, gated, grad_input=slope)
        return torch.mul(opened, inner, out=room[1]), grad.mul_(opened), slope
    before = [t.detach().requires_grad_() for t in kept]
    with torch.enable_grad():
        hidden = activation(before[-1])
        if len(before) == 2:
            hidden = hidden * before[0]
    return hidden.detach(), *torch.autograd.grad(hidden, before, grad)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, e: int, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight[e].t(), out=out)
    return torch.addmm(bias[e], x, weight[e].t(), out=out)


class Rooms(threading.local):
    """A thread's own."""

    def __init__(self) -> None:
        self.kept: dict[torch.dtype, Tensor] = {}


_rooms = Rooms()


def _room(like: Tensor, parts: int, inner: int) -> Tensor:
    """[parts, _rows(inner), inner] to be written over, the same at each call of a thread.

    Memory that comes and goes costs the kernel more than what is done in it: of 1k tokens' pass it was 3,300 pages,
    and up to a tenth of the time.
    """
    kept, size = _rooms.kept, parts * _rows(inner) * inner
    if like.dtype not in kept or kept[like.dtype].numel() < size:
        with torch.inference_mode(False):  # or training could not write to it later
            kept[like.dtype] = like.new_empty(size)
    return kept[like.dtype][:size].view(parts, _rows(inner), inner)


def _rows(inner: int) -> int:
    """Two megabytes of what is in the making, in fp32."""
    return max(128, 2**19 // inner)


def _parts(load_e: list[int], inner: int) -> Iterator[tuple[int, slice]]:
    """(expert, some of its rows)."""
    rows, start = _rows(inner), 0
    for e, load in enumerate(load_e):
        for place in range(start, start + load, rows):
            yield e, slice(place, min(place + rows, start + load))
        start += load
