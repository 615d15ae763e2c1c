"""Process groups: all ranks, those that share one set of experts, and those that hold the same experts.

Ranks of one expert group are neighbours (0..E-1, E..2E-1, ...), so that the all-to-all stays inside a node
while E is no more than its GPUs. `control` is a gloo group of all ranks: flags and counts travel there
without a GPU sync. A world of one has no groups: whoever communicates asks `groups.world` or
`groups.expert_parallel`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(minutes=30)  # covers a slow first batch or a node that reads its weights last


class ParallelError(RuntimeError):
    """The ranks cannot be arranged as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Groups:
    """Where this rank stands: with n experts a rank, it holds experts [expert_rank * n, (expert_rank + 1)
    * n).
    """

    rank: int
    world: int
    expert_parallel: int
    expert_rank: int
    expert_group: dist.ProcessGroup | None  # shares one set of experts; None when each rank has them all
    expert_data_group: dist.ProcessGroup | None  # holds the same experts: their gradients are averaged here
    data_group: dist.ProcessGroup | None  # all ranks
    control: dist.ProcessGroup | None  # all ranks, over gloo

    @staticmethod
    def single() -> Groups:
        """One process, no communication."""
        return Groups(0, 1, 1, 0, None, None, None, None)

    @staticmethod
    def create(expert_parallel: int = 1) -> Groups:
        """Join the ranks that RANK, WORLD_SIZE, ... name (alone when they are not set); collective.

        Raises ParallelError when expert_parallel does not divide the ranks or the launcher set only some of
        these.
        """
        start()
        rank, world = dist.get_rank(), dist.get_world_size()
        if expert_parallel < 1 or world % expert_parallel:
            raise ParallelError(
                f"moe.expert_parallel is {expert_parallel}, but there are {world} ranks, not a multiple of "
                f"it. Set it to one of {', '.join(str(n) for n in range(1, world + 1) if world % n == 0)}."
            )
        if world == 1:
            return Groups.single()
        # Every rank must take part in making every group, in the same order.
        expert_group, expert_data_group = None, dist.group.WORLD
        if expert_parallel > 1:
            for first in range(0, world, expert_parallel):
                members = list(range(first, first + expert_parallel))
                group = dist.new_group(members, timeout=TIMEOUT)
                expert_group = group if rank in members else expert_group
            for place in range(expert_parallel):
                members = list(range(place, world, expert_parallel))
                group = dist.new_group(members, timeout=TIMEOUT)
                expert_data_group = group if rank in members else expert_data_group
        control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        place = rank % expert_parallel
        return Groups(
            rank, world, expert_parallel, place, expert_group, expert_data_group, dist.group.WORLD, control
        )

    def local_experts(self, experts: int) -> slice:
        """Which of a layer's experts this rank holds."""
        here = experts // self.expert_parallel
        return slice(self.expert_rank * here, (self.expert_rank + 1) * here)

    def agree(self, *flags: bool) -> list[bool]:
        """Whether any rank raised each flag; one small all-reduce, collective."""
        return [bool(count) for count in self.maximum(*(int(flag) for flag in flags))]

    def maximum(self, *values: int) -> list[int]:
        """The largest of each value over all ranks; collective."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return [int(value) for value in tensor]

    def total(self, *values: float) -> list[float]:
        """The sum of each value over all ranks, in float64; collective."""
        if self.world == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return [float(value) for value in tensor]

    def barrier(self) -> None:
        """Wait for all ranks on the control group; unlike an NCCL barrier it holds no GPU."""
        if self.world > 1:
            dist.barrier(group=self.control)


def device() -> torch.device:
    """This rank's GPU (by LOCAL_RANK), or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def start() -> None:
    """Start torch.distributed once: from the launcher's environment, or as a world of one where there is
    none.
    """
    if dist.is_initialized():
        return
    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    backend = "nccl" if here.type == "cuda" else "gloo"
    given = [name for name in RENDEZVOUS if os.environ.get(name)]
    if not {"RANK", "WORLD_SIZE"} & set(given):
        # No launcher: a store in this process needs no port, so two such runs on one machine cannot meet.
        dist.init_process_group(
            backend,
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
            timeout=TIMEOUT,
        )
        return
    missing = [name for name in RENDEZVOUS if name not in given]
    if missing:
        raise ParallelError(
            f"The launcher set {', '.join(given)} but not {', '.join(missing)}. Each rank needs all of "
            f"{', '.join(RENDEZVOUS)} in its environment; with srun: RANK=$SLURM_PROCID, "
            "LOCAL_RANK=$SLURM_LOCALID, WORLD_SIZE=$SLURM_NTASKS, MASTER_ADDR=the first host, "
            "MASTER_PORT=one free port."
        )
    dist.init_process_group(backend, timeout=TIMEOUT)
