"""A rank's pulse: what it is doing, in a small file of its own that the watch on the batch host reads.

The trainer's call is an assignment; a thread writes the file now and then, so that a step pays nothing and a shared
file system little. The thread runs on while the rank waits in a collective, and does not where the whole process
stands still (stopped, or stuck in C with Python's lock held): that is how the watch tells the silent rank from those
that wait for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

SIZE = 256  # bytes of the file; written over in place
ORDER = ("load", "data", "step", "agree", "save", "evaluate", "end")  # of phases, within one step


@dataclass(frozen=True)
class Beat:
    """What a rank last wrote."""

    rank: int
    node: str
    pid: int
    phase: str
    step: int  # steps begun
    count: int  # changes of phase so far
    alive: int  # times written: grows as long as the process runs
    slowest: float  # seconds of its slowest step lately; 0 before the first

    @property
    def place(self) -> tuple[int, int]:
        """How far it is, to compare ranks by."""
        return self.step, ORDER.index(self.phase) if self.phase in ORDER else len(ORDER)


class Pulse:
    """This rank's; `pulse(phase, step)` says what it does from now on."""

    def __init__(self, folder: Path, rank: int, node: str, every: float = 5.0) -> None:
        """`every`: seconds between writes, at most."""
        self.rank, self.node, self.every = rank, node, every
        self._now = ("load", 0, 0)
        self._began, self._slowest, self._alive = 0.0, 0.0, 0
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / f"beat_{rank}", os.O_WRONLY | os.O_CREAT, 0o644)
        self._write()
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def __call__(self, phase: str, step: int) -> None:
        """The rank begins `phase` of step number `step`."""
        at = time.monotonic()
        if phase == "data":
            self._began = at
        elif phase == "agree" and self._began:
            # The slowest lately: an old one counts less with each step, and is forgotten after some hundred.
            self._slowest = max(at - self._began, 0.99 * self._slowest)
        self._now = (phase, step, self._now[2] + 1)

    @property
    def slowest(self) -> float:
        """Seconds of this rank's slowest step lately; 0 before the first."""
        return self._slowest

    def _run(self) -> None:
        while True:
            time.sleep(self.every)
            with contextlib.suppress(
                OSError
            ):  # a full disk or an absent server: the next write may go through
                self._write()

    def _write(self) -> None:
        phase, step, count = self._now
        self._alive += 1
        text = json.dumps(
            [self.rank, self.node, os.getpid(), phase, step, count, self._alive, round(self._slowest, 6)]
        )
        os.pwrite(self._file, text.ljust(SIZE - 1).encode()[: SIZE - 1] + b"\n", 0)
        os.fsync(self._file)


def beats(folder: Path) -> dict[int, Beat]:
    """The ranks' last words by rank; one that is being written just now is left out."""
    found = {}
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return {}
    for entry in entries:
        if entry.name.startswith("beat_"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                beat = Beat(*json.loads(Path(entry.path).read_bytes()))
                found[beat.rank] = beat
    return found
