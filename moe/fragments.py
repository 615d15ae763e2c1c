"""Training state as flat pieces of named tensors, whatever the world size, expert groups and ZeRO stage.

Experts are stacked along the first dimension and a rank holds neighbours, so a rank's slice of an expert
tensor is one flat range of the whole, and so is each part that ZeRO cuts from it. A piece is therefore a
name, a kind and a range of the whole flattened tensor; two layouts differ only in where they cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe import digests
from moe.optim import is_expert
from moe.parallel import Groups

MASTER = "master"  # the fp32 copy of a trainable parameter
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's averages of it
COPY = 8 << 20  # elements a thread copies at once
FROZEN = "frozen"  # a parameter that does not train, or a buffer


class Fragment(
    NamedTuple
):  # thousands are made at each save: a frozen dataclass would take five times as long
    """A rank's part of one tensor: `tensor` is a 1-D view of the live state."""

    name: str  # of the parameter in the model
    kind: str
    shape: tuple[int, ...]  # of the whole tensor, all experts
    start: int  # where the part begins in the whole, flattened
    tensor: Tensor
    replica: int = 0  # which of the ranks that hold the same part this is,
    replicas: int = 1  # and how many there are

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()


def held(model: nn.Module, optimizer: Any, adam: torch.optim.Optimizer, groups: Groups) -> list[Fragment]:
    """All state this rank holds, in the order it lies in memory where DeepSpeed has flattened it."""
    named = list(model.named_parameters())
    names = {id(parameter): name for name, parameter in named}
    by_kind: dict[str, list[Fragment]] = {kind: [] for kind in (MASTER, *MOMENTS)}  # each one run of memory
    for parameter, parts, start, replicated in _trained(model, optimizer, adam):
        name = names[id(parameter)]
        shape, base, replica, replicas = _place(parameter, groups)
        if not replicated:
            replica, replicas = 0, 1
        for (kind, pieces), part in zip(by_kind.items(), parts, strict=True):
            pieces.append(Fragment(name, kind, shape, base + start, part, replica, replicas))
    return [piece for pieces in by_kind.values() for piece in pieces] + _frozen(model, named, groups)


def frozen(model: nn.Module, groups: Groups) -> list[Fragment]:
    """The parameters that do not train, and the buffers a state dict keeps."""
    return _frozen(model, list(model.named_parameters()), groups)


def _frozen(model: nn.Module, named: list[tuple[str, nn.Parameter]], groups: Groups) -> list[Fragment]:
    tensors: dict[str, Tensor] = {name: tensor for name, tensor in named if not tensor.requires_grad}
    kept = model.state_dict(keep_vars=True)
    tensors |= {name: tensor for name, tensor in kept.items() if not isinstance(tensor, nn.Parameter)}
    return [
        _whole(name, FROZEN, tensor, groups) for name, tensor in tensors.items() if torch.is_tensor(tensor)
    ]


def weights(model: nn.Module, groups: Groups) -> list[Fragment]:
    """Every parameter and buffer of a model no engine has touched yet, as kind MASTER or FROZEN may fill
    it.
    """
    own = [_whole(name, MASTER, parameter, groups) for name, parameter in model.named_parameters()]
    names = {piece.name for piece in own}
    return own + [piece for piece in frozen(model, groups) if piece.name not in names]


def shared_out(pieces: list[Fragment]) -> list[Fragment]:
    """What this rank writes: its cut of what others hold too, so that all ranks write about as much.

    The replicated pieces, laid end to end, are cut evenly; every replica sees the same pieces and finds its
    cut alone.
    """
    mine: list[Fragment] = [piece for piece in pieces if piece.replicas == 1]
    for replica, replicas in sorted({(p.replica, p.replicas) for p in pieces if p.replicas > 1}):
        alike = [piece for piece in pieces if (piece.replica, piece.replicas) == (replica, replicas)]
        total = sum(piece.tensor.numel() for piece in alike)
        first, last = total * replica // replicas, total * (replica + 1) // replicas
        place = 0
        for piece in alike:
            left, right = max(first - place, 0), min(last - place, piece.tensor.numel())
            if left < right:
                mine.append(piece._replace(start=piece.start + left, tensor=piece.tensor[left:right]))
            place += piece.tensor.numel()
    return mine


def refresh(optimizer: Any, adam: torch.optim.Optimizer) -> None:
    """Copy the fp32 masters into the weights the model computes with, and gather these where they are cut
    up.
    """
    if hasattr(
        optimizer, "parallel_partitioned_bit16_groups"
    ):  # ZeRO 1 and 2; its own way copies on one thread
        for group, parts in enumerate(optimizer.parallel_partitioned_bit16_groups):
            ranks = optimizer.real_dp_process_group[group]
            mine = parts[dist.get_rank(ranks)]
            copy([(mine.data, adam.param_groups[group]["params"][0].data)])
            if len(parts) > 1:
                dist.all_gather_into_tensor(
                    optimizer.bit16_groups_flat[group].data, mine.data.clone(), group=ranks
                )
    elif hasattr(optimizer, "update_lp_params"):  # BF16_Optimizer
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        whole = [p for p in optimizer.module.parameters() if p.ds_status.name == "AVAILABLE"]
        for parameter in whole:
            parameter.partition(
                has_been_updated=False
            )  # drop what was gathered before the parts were written
        if whole:
            whole[0].all_gather(whole)
    elif hasattr(optimizer, "fp32_groups"):  # bf16 without ZeRO
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for weight, master in zip(low, high, strict=True):
                weight.data.copy_(master.data)


def copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy second into first, flat tensors both; on a CPU by several threads: one does not fill memory's bandwidth."""
    parts = [
        (target[first : first + COPY], source[first : first + COPY])
        for target, source in pairs
        for first in range(0, target.numel(), COPY)
    ]
    if any(tensor.device.type != "cpu" for pair in pairs for tensor in pair):
        for target, source in parts:
            target.copy_(source, non_blocking=True)
    else:
        digests.spread(_copied, parts)


def _copied(pair: tuple[Tensor, Tensor]) -> None:
    pair[0].copy_(pair[1])


def masters(optimizer: Any, adam: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors Adam updates here."""
    cut: list[Tensor] | None = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3
    return cut if cut is not None else [tensor for group in adam.param_groups for tensor in group["params"]]


Trained = tuple[nn.Parameter, list[Tensor], int, bool]


def _trained(model: nn.Module, optimizer: Any, adam: torch.optim.Optimizer) -> Iterator[Trained]:
    """Parameter, its parts here of the fp32 copy and of Adam's averages, where in it they begin, whether
    replicated.
    """
    flat_groups = getattr(optimizer, "bit16_groups", None) or getattr(optimizer, "bf16_groups", None)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3: each parameter cut evenly over all ranks
        flats = [_state(flat, adam) for flat in optimizer.fp32_partitioned_groups_flat]
        for parameter in (p for p in model.parameters() if p.requires_grad):
            group, first, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, count = _part(parameter)
            yield parameter, [flat[first : first + count] for flat in flats[group]], start, False
        return
    if flat_groups is not None:  # ZeRO 1 and 2: one flat fp32 tensor a group, cut evenly over its ranks
        for group, parameters in enumerate(flat_groups):
            flats = [_state(adam.param_groups[group]["params"][0], adam)]
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is None:  # no part of it is here
                    continue
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                last = here.start + here.numel
                yield parameter, [flat[here.start : last] for flat in flats[0]], there.start, False
    elif hasattr(optimizer, "fp32_groups"):  # bf16 without ZeRO
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(low, high, strict=True):
                yield parameter, _state(master, adam), 0, True
    else:
        for parameter in model.parameters():
            if parameter.requires_grad:
                yield parameter, _state(parameter, adam), 0, True


def _state(master: Tensor, adam: torch.optim.Optimizer) -> list[Tensor]:
    """A tensor Adam updates and its averages, flat."""
    averages = adam.state[master]
    return [master.detach().view(-1), *(averages[kind].view(-1) for kind in MOMENTS)]


def _part(parameter: Any) -> tuple[int, int]:
    """ZeRO 3: where this rank's part of a flattened parameter begins, and its length without padding."""
    start = dist.get_rank(parameter.ds_process_group) * parameter.partition_numel()
    return start, max(0, min(parameter.partition_numel(), parameter.ds_numel - start))


def _place(tensor: Any, groups: Groups) -> tuple[tuple[int, ...], int, int, int]:
    """Of a local tensor: the shape of the whole that all experts' ranks make up, where in it this begins (but
    for ZeRO 3's cut), which of the ranks that hold the same this is, and how many there are.
    """
    if hasattr(tensor, "ds_tensor"):  # ZeRO 3
        return tuple(tensor.ds_shape), 0, 0, 1
    shape = tuple(tensor.shape)
    if groups.expert_parallel > 1 and isinstance(tensor, nn.Parameter) and is_expert(tensor):
        whole = (tensor.expert_total, *shape[1:])  # type: ignore[attr-defined]
        first: int = tensor.expert_offset * math.prod(shape[1:])  # type: ignore[attr-defined]
        return (
            whole,
            first,
            groups.rank // groups.expert_parallel,
            groups.world // groups.expert_parallel,
        )
    return shape, 0, groups.rank, groups.world


def _whole(name: str, kind: str, tensor: Tensor, groups: Groups) -> Fragment:
    """All that is here of a tensor."""
    shape, start, replica, replicas = _place(tensor, groups)
    flat: Any = tensor.detach()
    if hasattr(tensor, "ds_tensor"):  # ZeRO 3
        start, count = _part(tensor)
        flat = tensor.ds_tensor.detach().view(-1)[:count]
    return Fragment(name, kind, shape, start, flat.view(-1), replica, replicas)
