"""A warning is noted and nothing more; the trainer asks between steps, and all ranks leave at the same one.

SLURM warns with USR2 (`--signal`, ahead of the walltime, and of a preemption where the site sends it) and with TERM
(preemption with GraceTime 0, its default, and scancel). Both may come at once, twice, and while torch is imported.
Which it was does not matter to a rank: it saves and leaves. Whether the run comes back is decided after srun, by
launch.verdict, which can ask SLURM.
"""

from __future__ import annotations

import signal
from types import FrameType


class Preemption:
    """The held-back warning. Create it before anything slow is imported."""

    WARNINGS = (signal.SIGUSR2, signal.SIGTERM)  # never USR1: NCCL and others use it

    def __init__(self) -> None:
        self.warned = ""
        for warning in self.WARNINGS:
            signal.signal(warning, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Handlers run between any two bytecodes and may be re-entered: keep this one assignment.
        self.warned = signal.Signals(number).name

    def __call__(self) -> bool:
        """Whether a warning came; the trainer's `should_stop`."""
        return bool(self.warned)
