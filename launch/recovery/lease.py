"""Which execution of a run may write: the one that started last.

SLURM takes a node that is cut off for dead and starts the run elsewhere, while the ranks there go on. When the node is
back, what they would still write belongs to the other attempt. A slurmctld that dies and forgets that it started a job
starts it once more under the same attempt's name, while the first one's ranks go on: the name alone tells nothing.
"""

from __future__ import annotations

import uuid

from launch.files import read_json, write_json
from launch.record import RunFolder


class FencedError(RuntimeError):
    """A later execution has taken the run over; this one may neither save nor log any more."""

    verdict = "fenced"

    def __init__(self, message: str, namesake: bool = False) -> None:
        super().__init__(message)
        self.namesake = (
            namesake  # it has this attempt's name, and its files: its end is not this one's to tell
        )


class Lease:
    """This process's hold on a run; making one ends the hold of whoever had it."""

    def __init__(self, folder: RunFolder, attempt: str) -> None:
        self.folder, self.attempt, self.token = folder, attempt, uuid.uuid4().hex
        write_json(folder.lease_file, {"attempt": attempt, "token": self.token})

    def ending(self) -> str:
        """How an attempt ends that has raised: its failure may not be told of a run that is another's by now."""
        try:
            self.guard()
        except FencedError as error:
            return error.verdict
        return "failed"

    def guard(self) -> None:
        """Raise FencedError unless the hold is still this one."""
        found = read_json(self.folder.lease_file) or {}
        if found.get("token") != self.token:
            holder = found.get("attempt")
            again = "another execution of " * (holder == self.attempt)
            words = f"{again}attempt {holder} has taken {self.folder.path} over; {self.attempt} stops"
            raise FencedError(words, holder == self.attempt)
