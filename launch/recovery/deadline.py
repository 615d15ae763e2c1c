"""The trainer's own clock: it leaves before the walltime as early as this run's own saves ask for.

SLURM warns `cluster.grace` ahead, a number chosen before anything was measured. Where the slowest save so far, and a
step before it, may take longer than that, rank 0 asks for the stop by itself; the others learn of it as of any warning.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from launch import cluster
from launch.record import RunFolder

MARGIN = 1.5  # times the slowest save lately
SLACK = 30.0  # seconds for ending: the agreement, the journal, SLURM's own rounding
LATELY = 20  # saves that count
ASK_AGAIN = 60.0  # seconds between questions about a walltime that seems over: it may have been extended


def save_seconds(journal: Iterable[Mapping[str, Any]]) -> list[float]:
    """What the newest saves took, oldest first."""
    found = [float(record.get("seconds", 0.0)) for record in journal if record.get("event") == "saved"]
    return [seconds for seconds in found if seconds > 0][-LATELY:]


def needed(saves: Iterable[float], step: float) -> float:
    """Seconds from the decision to leave until the run is saved; 0 as long as no save was measured."""
    slowest = max(saves, default=0.0)
    return slowest * MARGIN + 2 * step + SLACK if slowest else 0.0


def ends(env: Mapping[str, str] = os.environ) -> float:
    """When SLURM ends this job, in seconds since 1970; infinity where nobody says so."""
    if "SLURM_JOB_ID" not in env:
        return float("inf")
    try:
        said = cluster.show(cluster.element_id(env)).get("EndTime", "")
    except cluster.SlurmError:  # no scontrol in a container: the environment has it from SLURM 23.02 on
        said = env.get("SLURM_JOB_END_TIME", "")
    return float(said) if said.isdigit() else float("inf")


class Deadline:
    """The trainer's `should_stop` on rank 0: a warning came, or the walltime is as near as a save is long."""

    def __init__(
        self,
        folder: RunFolder,
        warned: Callable[[], bool],
        slowest_step: Callable[[], float],
        end: Callable[[], float] = ends,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._warned, self._step, self._ask, self._now = warned, slowest_step, end, now
        self._saves = save_seconds(folder.journal)
        self._end = end()
        self._most = 0.5 * (self._end - now())  # of an attempt that is given up for saving
        self._asked = now()
        self._over = False

    @property
    def warned(self) -> str:
        """What made the run stop, for its journal."""
        return str(getattr(self._warned, "warned", "")) or ("walltime" if self._over else "")

    def saved(self, seconds: float) -> None:
        """A save took so long."""
        self._saves = [*self._saves, seconds][-LATELY:]

    def __call__(self) -> bool:
        return self._warned() or self._near()

    def _near(self) -> bool:
        at, need = self._now(), min(needed(self._saves, self._step()), self._most)
        if self._over or not need or self._end - at > need:
            return self._over
        if at - self._asked > ASK_AGAIN:
            self._end, self._asked = self._ask(), at
        self._over = self._end - at <= need
        return self._over
