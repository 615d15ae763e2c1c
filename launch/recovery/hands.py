"""How a drill reaches a run's ranks: as their parent's neighbour on this machine, through scancel on a cluster."""

from __future__ import annotations

import os
import random
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from launch import cluster
from launch.operating.status import batch_of, children
from launch.record import RunFolder
from moe.storage import found

SMALL_FILES = 50_000  # bytes that a rank may write to a file, where its disk is to look full


class Hands(Protocol):
    """What can be done to the ranks of one run; each answers what was done, or nothing where it could not be."""

    def signal(self, number: int, *, one: bool = False) -> str:
        """Signal all ranks, or one of them."""

    def fill(self) -> str:
        """Let the ranks' next save meet a full disk."""


@dataclass
class LocalHands:
    """The ranks of a run on this machine."""

    folder: RunFolder
    dice: random.Random

    def _ranks(self) -> list[int]:
        batch = batch_of(self.folder)
        return sorted(children(int(batch[0]["pid"]))) if batch and "pid" in batch[0] else []

    def signal(self, number: int, *, one: bool = False) -> str:
        ranks = self._ranks()
        if not ranks:
            return ""
        rank = self.dice.randrange(len(ranks))
        for pid in [ranks[rank]] if one else ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        name = signal.Signals(number).name
        return f"{name} to {f'rank {rank}' if one else 'all ranks'}"

    def fill(self) -> str:
        ranks = self._ranks()
        for pid in ranks:
            with suppress(OSError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (SMALL_FILES, SMALL_FILES))
        return f"no file over {SMALL_FILES // 1000} kB" if ranks else ""


@dataclass
class SlurmHands:
    """The ranks of a run that SLURM has. What is sent goes to all of them: scancel knows steps, not processes."""

    folder: RunFolder

    def signal(self, number: int, *, one: bool = False) -> str:
        batch = batch_of(self.folder)
        if not batch or "job" not in batch[0]:
            return ""
        element = f"{batch[0]['job']}_{batch[1]}"
        name = signal.Signals(number).name.removeprefix("SIG")
        if name == "KILL":
            element += ".0"  # the step: the batch script lives on, for the verdict
        try:
            cluster.call("scancel", f"--signal={name}", element)
        except cluster.SlurmError:
            return ""
        return f"scancel --signal={name} {element}"

    def fill(self) -> str:
        return ""


def tear(folder: RunFolder) -> str:
    """Cut the newest checkpoint's largest file in half, as a node that died in a write to a lying disk leaves it."""
    newest = next(iter(found(folder.checkpoints)), None)
    if newest is None:
        return ""
    file = max(
        (path for path in newest.path.iterdir() if path.is_file()), key=lambda path: path.stat().st_size
    )
    os.truncate(file, file.stat().st_size // 2)
    return f"{newest.path.name}/{file.name} cut in half"


@dataclass(frozen=True)
class Kind:
    """One thing that happens to runs; `bound`: the intervals between saves that it may cost, 0 for one step."""

    name: str
    bound: int
    do: Callable[[Hands, RunFolder], str]


def _torn(hands: Hands, folder: RunFolder) -> str:
    sent = hands.signal(signal.SIGKILL)
    torn = tear(folder) if sent else ""
    return f"{torn}, {sent}" if torn else ""


KINDS = {
    kind.name: kind
    for kind in (
        Kind("warning", 0, lambda hands, folder: hands.signal(signal.SIGUSR2)),
        Kind("preemption", 0, lambda hands, folder: hands.signal(signal.SIGTERM)),
        Kind("rank killed", 1, lambda hands, folder: hands.signal(signal.SIGKILL, one=True)),
        Kind("torn checkpoint", 2, _torn),
        Kind("full disk", 1, lambda hands, folder: hands.fill()),
        Kind("hang", 1, lambda hands, folder: hands.signal(signal.SIGSTOP, one=True)),
    )
}
