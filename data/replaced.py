"""Samples that were replaced in a run, counted over all its ranks and attempts without their having to meet.

Each rank writes its own into a file of its own when it happens, which is seldom, and reads the others'. A step that
is computed again replaces the same samples again, so what an earlier attempt noted of it goes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Note(NamedTuple):
    """One replacement: of which step, and why."""

    step: int
    why: str


class Replaced:
    """The run's replaced samples; without a folder those of this rank, of which `earlier` came before."""

    def __init__(self, folder: Path | None, rank: int, world: int) -> None:
        self._folder, self._rank, self._world = folder, rank, world
        self._own: list[Note] = []
        self.earlier = 0

    def begin(self, step: int) -> None:
        """Forget what was noted of this step and later ones: it comes again."""
        self._own = [note for note in self._own if note.step < step]
        if self._folder is None:
            return
        for file in sorted(self._folder.glob("rank_*.jsonl")):
            rank = int(file.stem.removeprefix("rank_"))
            # Nobody else writes these: a rank's own, and those of ranks that there are no more.
            if rank == self._rank or (self._rank == 0 and rank >= self._world):
                kept = [json.dumps(note) + "\n" for note in _notes(file) if note.step < step]
                file.write_text("".join(kept), encoding="utf-8")

    def add(self, step: int, whys: list[str]) -> None:
        """Note a sample that has been replaced, as often as it took."""
        notes = [Note(step, why) for why in whys]
        self._own += notes
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank_{self._rank}.jsonl").open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(note) + "\n" for note in notes))

    def all(self) -> list[Note]:
        """What is known of all ranks, in order; of the other ranks up to what they have written by now."""
        if self._folder is None:
            return list(self._own)
        return sorted(note for file in self._folder.glob("rank_*.jsonl") for note in _notes(file))

    def count(self) -> int:
        """How many there are over the run."""
        return self.earlier + len(self.all())


def _notes(file: Path) -> Iterator[Note]:
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield Note(*json.loads(line))
        except (ValueError, TypeError):
            continue  # torn by a kill: that step is not in a checkpoint, and comes again
