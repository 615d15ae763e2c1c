"""Tokens to the ranks that hold their experts, and back: by Tutel, or by PyTorch alone.

Both move the same tokens and give the same numbers. They differ in what travels: Tutel packs every expert's
queue to the longest one's length and multiplies the padding too, PyTorch sends what there is and sorts it by
expert. The queues' common length is agreed on inside (an all-reduce MAX over the expert group), so ranks with
different numbers of tokens, or none, neither hang nor change each other's results.

Shapes: T tokens, D width, E experts over all ranks, e experts on this rank, K choices a token, R ranks of the
expert group, N rows: choices that are kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from moe.parallel import Groups


class DispatchError(RuntimeError):
    """A dispatcher that cannot be had, in words."""


@dataclass(frozen=True)
class Routing:
    """Where the router sends each token."""

    expert_TK: Tensor  # int64, the expert of each of a token's choices
    slot_TK: Tensor  # int64, the choice's place in that expert's queue on this rank; >= capacity: dropped
    weight_TK: Tensor  # fp32, how much it counts, 0 where dropped; has a gradient
    experts: int  # E
    capacity: int | None  # choices an expert takes from this rank; None: all
    load_E: Tensor  # int64, the queues' lengths before any choice is dropped


@dataclass(frozen=True)
class Sent:
    """Tokens where their experts are."""

    rows: Tensor  # [N, D] sorted by expert of this rank, or [e, S, D] with queues of one length
    load_e: list[int] | Tensor | None  # rows of each expert; None: the second shape
    ticket: Any  # what the dispatcher needs to bring them back


class Dispatcher(Protocol):
    """Has no parameters; `combine` takes what the experts made of `rows`, in the same shape."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Sent: ...

    def combine(self, y: Tensor, sent: Sent) -> Tensor: ...


# ------------------------------------------------------------------ PyTorch


class Gather(torch.autograd.Function):
    """out[n] = sum over k of rows[index_NK[n, k]], where -1 is a row of zeros.

    `back_MJ` is the same map from the other end: the places of `out` that row m went to. With it the backward
    pass is a gather as well: no scattered additions, so it is fast, and deterministic on a GPU.
    `holes`: whether either map may hold -1.
    """

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, index_NK: Tensor, back_MJ: Tensor, holes: bool) -> Tensor:
        ctx.holes = holes
        ctx.save_for_backward(back_MJ)
        return _take(rows_MD, index_NK, holes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _take(grads[0].contiguous(), ctx.saved_tensors[0], ctx.holes), None, None, None


def _take(rows_MD: Tensor, index_NK: Tensor, holes: bool) -> Tensor:
    if not len(rows_MD) or not index_NK.numel():
        return rows_MD.new_zeros(len(index_NK), rows_MD.shape[1])
    out = None
    for index_N in index_NK.unbind(1):
        if holes:
            part = rows_MD.index_select(0, index_N.clamp(min=0)).masked_fill_((index_N < 0)[:, None], 0)
        else:
            part = rows_MD.index_select(0, index_N)
        out = part if out is None else out.add_(part)
    assert out is not None
    return out


class Weigh(torch.autograd.Function):
    """out[t] = sum over k of weight[t, k] * rows[row_TK[t, k]]; multiplied and summed in fp32."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weight_TK: Tensor, row_TK: Tensor, token_N: Tensor) -> Tensor:
        ctx.save_for_backward(rows_ND, weight_TK, row_TK, token_N)
        out = torch.zeros(len(row_TK), rows_ND.shape[1], device=rows_ND.device)
        if len(rows_ND):
            # A dropped choice weighs 0, so any row will do for it.
            for row_T, weight_T in zip(row_TK.clamp(min=0).unbind(1), weight_TK.unbind(1), strict=True):
                out.addcmul_(rows_ND.index_select(0, row_T), weight_T[:, None])
        return out.to(rows_ND.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_ND, weight_TK, row_TK, token_N = ctx.saved_tensors
        grad_ND = grads[0].index_select(0, token_N)
        # One place more than there are rows: -1, where a choice was dropped, means the last.
        weight_N = weight_TK.new_zeros(len(rows_ND) + 1)
        weight_N[row_TK] = weight_TK
        each_N = weight_TK.new_zeros(len(rows_ND) + 1)
        torch.linalg.vecdot(grad_ND.float(), rows_ND.float(), out=each_N[:-1])
        return grad_ND.mul_(weight_N[:-1, None]), each_N[row_TK], None, None


class Exchange(torch.autograd.Function):
    """all_to_all_single with uneven parts; the backward pass is the same exchange the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        ctx.parts = send, receive, group
        return _exchange(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive, group = ctx.parts
        return _exchange(grads[0], receive, send, group), None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    got = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(got, rows.contiguous(), receive, send, group=group)
    return got


def gather(rows_MD: Tensor, index_NK: Tensor, back_MJ: Tensor, holes: bool) -> Tensor:
    """As `Gather`."""
    return cast(Tensor, Gather.apply(rows_MD, index_NK, back_MJ, holes))  # type: ignore[no-untyped-call]


def weigh(rows_ND: Tensor, weight_TK: Tensor, row_TK: Tensor, token_N: Tensor) -> Tensor:
    """As `Weigh`."""
    return cast(Tensor, Weigh.apply(rows_ND, weight_TK, row_TK, token_N))  # type: ignore[no-untyped-call]


def exchange(rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    """As `Exchange`."""
    return cast(Tensor, Exchange.apply(rows, send, receive, group))  # type: ignore[no-untyped-call]


def by_expert(received: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """From (rank, expert) order to (expert, rank) order, back, and each expert's rows."""
    ranks, local = len(received), len(received[0])
    rows = torch.arange(sum(map(sum, received)), device=device)
    by_rank = torch.split(rows, [n for rank in received for n in rank])
    order_N = torch.cat([by_rank[r * local + e] for e in range(local) for r in range(ranks)])
    back_N = torch.empty_like(order_N)
    back_N[order_N] = rows
    return order_N, back_N, [sum(rank[e] for rank in received) for e in range(local)]


class TorchDispatcher:
    """Sends exactly the kept choices, sorted by expert; needs nothing but PyTorch."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Sent:
        tokens, choices = routing.expert_TK.shape
        load_E, row_TK = routing.load_E, routing.slot_TK
        if routing.capacity is not None:
            load_E = load_E.clamp(max=routing.capacity)
        row_TK = row_TK + (load_E.cumsum(0) - load_E)[routing.expert_TK]
        kept = tokens * choices
        if routing.capacity is not None:
            row_TK = torch.where(routing.slot_TK < routing.capacity, row_TK, -1)
            kept = int(load_E.sum())
        token_TK = torch.arange(tokens, device=x_TD.device)[:, None].expand(-1, choices)
        # One place more than there are rows, for what is dropped.
        token_N = torch.empty(kept + 1, dtype=torch.int64, device=x_TD.device)
        token_N[row_TK] = token_TK
        token_N = token_N[:kept]
        rows = gather(x_TD, token_N[:, None], row_TK, routing.capacity is not None)
        ticket = (routing.weight_TK, row_TK, token_N)
        if self.groups.expert_parallel == 1:
            return Sent(rows, load_E.tolist() if x_TD.device.type == "cpu" else load_E, (*ticket, None))
        # How many rows go where: the ranks' only exchange of numbers, and a GPU's only wait for its host.
        ranks, group = self.groups.expert_parallel, self.groups.expert_group
        send_RE = load_E.view(ranks, -1)
        receive_RE = torch.empty_like(send_RE)
        dist.all_to_all_single(receive_RE, send_RE.contiguous(), group=group)
        both = torch.stack([send_RE, receive_RE]).tolist()
        send, receive = ([sum(experts) for experts in side] for side in both)
        rows = exchange(rows, send, receive, group)
        order_N, back_N, loads = by_expert(both[1], rows.device)
        rows = gather(rows, order_N[:, None], back_N[:, None], False)
        return Sent(rows, loads, (*ticket, (send, receive, order_N, back_N)))

    def combine(self, y: Tensor, sent: Sent) -> Tensor:
        weight_TK, row_TK, token_N, travel = sent.ticket
        if travel is not None:
            send, receive, order_N, back_N = travel
            y = gather(y, back_N[:, None], order_N[:, None], False)
            y = exchange(y, receive, send, self.groups.expert_group)
        return weigh(y, weight_TK, row_TK, token_N)


# ------------------------------------------------------------------ Tutel


class TutelDispatcher:
    """Tutel's encode and decode kernels and its all-to-all (two-dimensional over whole nodes).

    Of Tutel only `fast_encode`, `fast_decode` and exchanges whose backward pass keeps to their group are
    used:
    `net.all_to_all` on a group smaller than the world sends gradients to the wrong ranks
    (tutel/impls/communicate.py, RestoreBackward.apply without its group).
    """

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        try:
            os.environ.setdefault("USE_NVRTC", "1")  # no fork() of a compiler inside a training process
            from tutel import moe, net
        except ImportError as missing:
            raise DispatchError(
                "moe.dispatcher is tutel, but tutel is not installed here; see README.md#tutel, "
                "or set moe.dispatcher=torch"
            ) from missing
        self.moe, self.net = moe, net
        # 2DH: first inside the node, then between nodes. Tutel builds its groups from the whole world.
        node = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
        world = groups.world
        self.two_dimensional = groups.expert_parallel == world and 1 < node < world and world % node == 0
        if self.two_dimensional:
            os.environ["LOCAL_SIZE"] = str(node)

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Sent:
        if x_TD.dtype == torch.float16:
            raise DispatchError("tutel mixes up fp16 with other precisions; train in bf16 or fp32")
        length = routing.load_E.max()
        if routing.capacity is not None:
            length = length.clamp(max=routing.capacity)
        if self.groups.expert_parallel > 1:
            dist.all_reduce(length, op=dist.ReduceOp.MAX, group=self.groups.expert_group)
        common = max(int(length), 1)
        slot_TK = routing.slot_TK
        if routing.capacity is not None:
            slot_TK = torch.where(slot_TK < routing.capacity, slot_TK, common)
        critical = (
            routing.experts,
            [column.contiguous() for column in routing.expert_TK.unbind(1)],
            [column.contiguous() for column in slot_TK.unbind(1)],
            [column.contiguous() for column in routing.weight_TK.unbind(1)],
            common,
            None,
        )
        if len(x_TD):
            rows_ECD = self.moe.fast_encode(x_TD.contiguous(), critical)
        else:  # no kernel for no tokens; the gradient's way back stays open
            rows_ECD = x_TD.new_zeros(routing.experts, common, x_TD.shape[1]) + x_TD.sum()
        return Sent(self._there(rows_ECD), None, (critical, len(x_TD)))

    def combine(self, y: Tensor, sent: Sent) -> Tensor:
        critical, tokens = sent.ticket
        rows_ECD = self._back(y, critical[0])
        if not tokens:
            weights = sum(column.sum() for column in critical[3])
            none: Tensor = rows_ECD.reshape(-1, rows_ECD.shape[-1])[:0] + weights.to(y.dtype)
            return none
        out: Tensor = self.moe.fast_decode(rows_ECD.contiguous(), critical)
        return out

    def _there(self, rows_ECD: Tensor) -> Tensor:
        ranks = self.groups.expert_parallel
        if ranks == 1:
            return rows_ECD
        if self.two_dimensional:
            there: Tensor = self.net.all_to_all(rows_ECD, 1, 0, use_2dh=True)
            return there
        experts, length, width = rows_ECD.shape
        got = self.net.all_to_all_single(rows_ECD.contiguous(), group=self.groups.expert_group)
        # [R, e, C, D] by sender -> [e, R * C, D]
        return cast(
            Tensor,
            got.view(ranks, experts // ranks, length, width)
            .transpose(0, 1)
            .reshape(-1, ranks * length, width),
        )

    def _back(self, y_eSD: Tensor, experts: int) -> Tensor:
        ranks = self.groups.expert_parallel
        if ranks == 1:
            return y_eSD
        if self.two_dimensional:
            back: Tensor = self.net.all_to_all(y_eSD, 0, 1, use_2dh=True)
            return back
        local, rows, width = y_eSD.shape
        by_rank = y_eSD.view(local, ranks, rows // ranks, width).transpose(0, 1).contiguous()
        got: Tensor = self.net.all_to_all_single(by_rank, group=self.groups.expert_group)
        return got.view(experts, rows // ranks, width)


DISPATCHERS: dict[str, Callable[[Groups], Dispatcher]] = {"torch": TorchDispatcher, "tutel": TutelDispatcher}


def choose(name: str, groups: Groups) -> Dispatcher:
    """The dispatcher of that name; `auto` is Tutel where it can be imported, else PyTorch.

    Raises DispatchError for one that is not installed.
    """
    if name != "auto":
        return DISPATCHERS[name](groups)
    try:
        return TutelDispatcher(groups)
    except DispatchError:
        return TorchDispatcher(groups)
