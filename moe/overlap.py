"""The exchange of tokens between ranks in pieces, each on its way while the experts compute another.

Every expert's queue is cut evenly into pieces, so that sender and receiver find the cuts by the same arithmetic
and exchange no more numbers than without. All pieces are sent off at once; each is waited for when its turn comes,
and what the experts made of it is sent back while they compute the next. The backward pass is the same the other
way round: autograd runs the steps in reverse, so the gradients of all pieces are sent off before the first is needed.

Shapes: T tokens, D width, E experts over all ranks, e on this rank, K choices, R ranks, P pieces, N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from moe.dispatch import Routing, by_expert, gather, weigh
from moe.parallel import Groups

Compute = Callable[
    [Tensor, list[int]], Tensor
]  # rows sorted by expert, each expert's -> the experts' answers


class Travel:
    """One piece on its way: how many rows go to each rank and come from each, and what to wait for."""

    def __init__(self, send: list[int], receive: list[int], group: Any) -> None:
        self.send, self.receive, self.group = send, receive, group

    def back(self) -> Travel:
        """The way back."""
        return Travel(self.receive, self.send, self.group)

    def start(self, rows: Tensor, *, reverse: bool) -> Tensor:
        """Send rows off; what is returned is filled when `wait` returns."""
        send, receive = (self.receive, self.send) if reverse else (self.send, self.receive)
        rows = rows.contiguous()
        got = rows.new_empty(sum(receive), *rows.shape[1:])
        self.work = dist.all_to_all_single(got, rows, receive, send, group=self.group, async_op=True)
        self.moving = got, rows  # both must stay until it has come
        return got

    def wait(self) -> Tensor:
        """What was sent, when it has come; on a GPU its stream waits, not the host."""
        self.work.wait()
        got, _ = self.moving
        del self.work, self.moving
        return got


class Start(torch.autograd.Function):
    """Sends rows off; in the backward pass, waits for their gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, travel: Travel) -> Tensor:
        ctx.travel = travel
        return travel.start(rows, reverse=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.travel.wait(), None  # what comes from `Wait` only says that it is time


class Wait(torch.autograd.Function):
    """Waits for rows; in the backward pass, sends their gradient off, for `Start` to take up."""

    @staticmethod
    def forward(ctx: Any, got: Tensor, travel: Travel) -> Tensor:
        ctx.travel = travel
        travel.wait()
        return got.view_as(got)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.travel.start(grads[0], reverse=True)
        return grads[0], None


def _start(rows: Tensor, travel: Travel) -> Tensor:
    return cast(Tensor, Start.apply(rows, travel))  # type: ignore[no-untyped-call]


def _wait(got: Tensor, travel: Travel) -> Tensor:
    return cast(Tensor, Wait.apply(got, travel))  # type: ignore[no-untyped-call]


def cuts(load: Tensor, pieces: int) -> Tensor:
    """[P + 1, ...]: where each piece of queues of these lengths begins, and the last one ends."""
    return torch.stack([load * piece // pieces for piece in range(pieces + 1)])


def overlapped(x_TD: Tensor, routing: Routing, experts: Compute, groups: Groups, pieces: int) -> Tensor:
    """What dispatching, computing and combining give, for experts spread over ranks; collective over the expert group.

    Exactly the kept choices travel, as with moe.dispatch.TorchDispatcher, and the sums are those.
    """
    tokens, choices = routing.expert_TK.shape
    load_E, slot_TK = routing.load_E, routing.slot_TK
    if routing.capacity is not None:
        load_E = load_E.clamp(max=routing.capacity)
    # Rows lie by piece, then by expert, then by their place in the queue.
    cut_PE = cuts(load_E, pieces)
    size_PE = cut_PE.diff(dim=0)
    first_PE = (size_PE.flatten().cumsum(0) - size_PE.flatten()).view_as(size_PE)
    piece_TK = (slot_TK[None] >= cut_PE[1:-1, routing.expert_TK]).sum(0)
    row_TK = slot_TK + (first_PE - cut_PE[:-1])[piece_TK.clamp(max=pieces - 1), routing.expert_TK]
    ranks = groups.expert_parallel
    send_RE = load_E.view(ranks, -1)
    receive_RE = torch.empty_like(send_RE)
    dist.all_to_all_single(receive_RE, send_RE.contiguous(), group=groups.expert_group)
    both = torch.stack([size_PE.view(pieces, ranks, -1), cuts(receive_RE, pieces).diff(dim=0)]).tolist()
    kept = sum(n for piece in both[0] for rank in piece for n in rank)
    if routing.capacity is not None:
        row_TK = torch.where(slot_TK < routing.capacity, row_TK, -1)
    token_TK = torch.arange(tokens, device=x_TD.device)[:, None].expand(-1, choices)
    token_N = torch.empty(kept + 1, dtype=torch.int64, device=x_TD.device)
    token_N[row_TK] = token_TK  # -1, what is dropped, is one place more than there are rows
    token_N = token_N[:kept]
    rows = gather(x_TD, token_N[:, None], row_TK, routing.capacity is not None)
    there = [
        Travel([sum(rank) for rank in sent], [sum(rank) for rank in received], groups.expert_group)
        for sent, received in zip(*both, strict=True)
    ]
    parts = torch.split(rows, [sum(map(sum, piece)) for piece in both[0]])
    coming = [_start(part, travel) for part, travel in zip(parts, there, strict=True)]
    going = []
    for got, travel, received in zip(coming, there, both[1], strict=True):
        order_N, back_N, loads = by_expert(received, rows.device)
        mine = gather(_wait(got, travel), order_N[:, None], back_N[:, None], False)
        made = gather(experts(mine, loads), back_N[:, None], order_N[:, None], False)
        back = travel.back()
        going.append((_start(made, back), back))
    y_ND = torch.cat([_wait(got, travel) for got, travel in going])
    return weigh(y_ND, routing.weight_TK, row_TK, token_N)
