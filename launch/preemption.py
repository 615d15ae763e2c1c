"""A warning is noted and nothing more; the trainer asks between steps, and all ranks leave at the same one.

SLURM warns with USR2 (`--signal`, ahead of the walltime, and of a preemption where the site sends it) and with TERM
(preemption with GraceTime 0, its default, and scancel). Both may come at once, twice, and while torch is imported.
Which it was does not matter to a rank: it saves and leaves. Whether the run comes back is decided after srun, by
launch.verdict, which can ask SLURM.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

KILL_WAIT = 30.0  # slurm.conf(5)
VERDICT = 10.0  # left for launch.verdict
LONGEST, SHORTEST = 20.0, 1.0  # what is not told now, the next attempt tells: a node is not held up for it


class Preemption:
    """The held-back warning. Create it before anything slow is imported."""

    WARNINGS = (signal.SIGUSR2, signal.SIGTERM)  # never USR1: NCCL and others use it

    def __init__(self) -> None:
        self.warned = ""
        self.at = 0.0  # when the first warning came, on the monotonic clock
        for warning in self.WARNINGS:
            signal.signal(warning, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Handlers run between any two bytecodes and may be re-entered: nothing here but assignments.
        self.at = self.at or time.monotonic()
        self.warned = signal.Signals(number).name

    def __call__(self) -> bool:
        """Whether a warning came; the trainer's `should_stop`."""
        return bool(self.warned)

    def left(self, grace: float) -> float | None:
        """Seconds that may still be spent after the save; None without a warning.

        SLURM kills `grace` after the warning before a walltime, and KillWait (30 s, unless the site chose another)
        after TERM; the verdict after srun needs some of that, too.
        """
        if not self.warned:
            return None
        allowed = grace if self.warned == "SIGUSR2" else min(grace, KILL_WAIT)
        return min(LONGEST, max(SHORTEST, self.at + allowed - VERDICT - time.monotonic()))
