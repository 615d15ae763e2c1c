"""The run folder: every path rule, and the journal of attempts.

A run is its folder, from its start on: before, it is an entry of its batch (launch.batches), and reads as if it had
one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.batches import Batches, Entry, entry_of
from launch.files import (
    append_line,
    begin_journal,
    flush_all,
    newest_records,
    read_json,
    read_lines,
    write_json,
)


@dataclass(frozen=True)
class RunFolder:
    """Where everything of one run lies."""

    path: Path

    @property
    def run_file(self) -> Path:
        return self.path / "run.json"

    @property
    def spec_file(self) -> Path:
        return self.path / "spec.json"

    @property
    def journal_file(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def handoff_file(self) -> Path:
        return self.path / "handoff.json"

    @property
    def eval_file(self) -> Path:
        return self.path / "eval.json"

    @property
    def data_file(self) -> Path:
        """What the run has drawn from its data so far."""
        return self.path / "data.json"

    @property
    def replaced(self) -> Path:
        """The folder in which the ranks note the samples they had to replace."""
        return self.path / "replaced"

    @property
    def lease_file(self) -> Path:
        return self.path / "lease.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    def logs(self, attempt: str) -> Path:
        """The folder of one attempt's logs, a file a rank."""
        return self.path / "logs" / attempt

    def log_of(self, attempt: str, rank: int) -> Path:
        return self.logs(attempt) / f"rank_{rank}.log"

    @property
    def made(self) -> bool:
        """Whether it is there, rather than an entry of its batch; run.json is what is written last."""
        return os.path.exists(self.run_file)

    @property
    def entry(self) -> Entry | None:
        """What a batch says of a run that has no folder yet."""
        return None if self.made else Batches().entry(str(self.path))

    @property
    def run(self) -> dict[str, Any]:
        """What the run is: id, name, experiment, stage, identity, parent; empty for no run."""
        return read_json(self.run_file) or (entry.run if (entry := self.entry) else {})

    @property
    def spec(self) -> dict[str, Any]:
        """The run's settings; empty for no run."""
        return (entry.spec if (entry := self.entry) else read_json(self.spec_file)) or {}

    def make(self, entry: Entry | None = None, *, flush: bool = True) -> bool:
        """Make the folder of a run that has none, from what its batch says; whether there was need, and a batch.

        Safe to be done by several at once, and again after a kill: run.json comes last.
        """
        if self.made or not (entry := entry or self.entry):
            return False
        write_json(self.spec_file, entry.spec, flush=flush)
        if not begin_journal(self.journal_file, entry.submitting, flush=flush):
            # Another is making it, or one of an earlier submission was killed at this.
            begun = next((r for r in newest_records(self.journal_file) if r.get("event") == "submitting"), {})
            if begun.get("batch") != entry.batch:
                append_line(self.journal_file, entry.submitting, flush=flush)
        write_json(self.run_file, entry.run, flush=flush)
        entry.mark()
        return True

    def note(self, event: str, **facts: object) -> None:
        """Add an event to the journal: submitted, start, warned, saved, ended, verdict."""
        self.make()
        append_line(self.journal_file, {"event": event, "time": round(time.time(), 3), **facts})

    @property
    def journal(self) -> list[dict[str, Any]]:
        told = [record for record in read_lines(self.journal_file) if _is_event(record)]
        return told or ([entry.submitting] if (entry := self.entry) else [])

    def last(self, *events: str) -> dict[str, Any] | None:
        """The newest record of one of the events."""
        records = newest_records(self.journal_file) if self.made else reversed(self.journal)
        found = (record for record in records if _is_event(record))
        return next((record for record in found if record["event"] in events), None)

    def last_metrics(self) -> dict[str, Any]:
        """The newest whole row of metrics, read from the file's end; empty before the first step."""
        return next(newest_records(self.metrics_file), {})


def _is_event(record: Mapping[str, Any]) -> bool:
    """Whether a record says what happened and when, as `note` writes it."""
    return isinstance(record.get("event"), str) and isinstance(record.get("time"), (int, float))


def note_all(folders: Sequence[RunFolder], event: str, **facts: object) -> None:
    """Add an event to the journals of many runs, on the disk when this returns."""
    make_all(folders)
    record = {"event": event, "time": round(time.time(), 3), **facts}
    for folder in folders:
        append_line(folder.journal_file, record, flush=False)
    flush_all(folder.journal_file for folder in folders)


def make_all(folders: Iterable[RunFolder]) -> None:
    """Make those of the folders that have yet to be made."""
    made = [folder for folder in folders if folder.make(flush=False)]
    if made:
        flush_all(f for folder in made for f in (folder.spec_file, folder.journal_file, folder.run_file))


def of_element(batch: Path, index: str) -> RunFolder:
    """Where the run of an array's element has its folder; LookupError where that is another's, or cannot be read."""
    plan = read_json(batch / "plan.json")
    if plan is None:
        raise LookupError(
            f"{batch / 'plan.json'} cannot be read on {os.uname().nodename}; is the file system shared?"
        )
    folder, entry = RunFolder(Path(plan["runs"][index])), entry_of(str(batch), index)
    found = folder.run.get("identity") if entry and folder.made else None
    if entry and found and found != entry.run["identity"]:
        raise LookupError(
            f"{folder.path} holds another run than the one that this job was submitted for: "
            "that one was submitted after this job had been given up; nothing is done here"
        )
    return folder


def find_runs(root: Path) -> list[RunFolder]:
    """All runs below `root`, by name; run folders hold no other run folders."""
    found = [*Batches().waiting(str(root))]  # first: what is made meanwhile is in one of the two
    stack = [top := str(root)]
    while stack:
        folder = stack.pop()
        if os.path.exists(f"{folder}/run.json"):
            found.append(folder)
            continue
        try:
            entries = list(os.scandir(folder))
        except OSError:
            continue
        stack += [
            entry.path
            for entry in entries
            if entry.is_dir(follow_symlinks=False)
            and not entry.name.startswith(".")
            and not (folder == top and entry.name in ("code", "batches"))
        ]
    return [RunFolder(Path(folder)) for folder in sorted(set(found), key=lambda path: path.split("/"))]
