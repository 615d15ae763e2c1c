"""The run folder: every path rule, the journal of attempts, and writes that a kill cannot tear.

A run is its folder, from its start on: before, it is an entry of its batch (launch.batches), and reads as if it had
one. What other programs read later is JSON written beside and renamed; what grows is one line a record, so that a
reader after a kill drops at most the last line.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.batches import Batches, Entry, entry_of


def write_text(path: Path, text: str, *, flush: bool = True) -> None:
    """Write a small file so that a reader sees all of it or none, whatever is killed when; `flush`: and a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if flush:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if flush:
        sync_folder(path.parent)


def flush_all(paths: Iterable[Path]) -> None:
    """Bring files that were written without a flush, and their folders, to the disk: many at once are soon done."""
    from concurrent.futures import ThreadPoolExecutor  # 10 ms that no look at the runs should wait for

    files = list(paths)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(sync_folder, files))
        list(pool.map(sync_folder, {path.parent for path in files}))


def write_json(path: Path, value: object, *, flush: bool = True) -> None:
    """`write_text` for a JSON value, keys in order so that equal values are equal files."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n", flush=flush)


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's mapping, or None where there is no such file or no JSON mapping in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def append_line(path: Path, record: Mapping[str, object], *, flush: bool = True) -> None:
    """Add one record to a journal with a single write; records of several writers do not mix.

    A line that a full disk or a crash cut short is ended first, so that it takes no whole one with it. Without `flush`
    the caller sees to it that it is on the disk (`flush_all`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record, sort_keys=True) + "\n").encode()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        while line := line[os.write(handle, line) :]:
            pass  # a short write: the next one says why, or completes the line
        if flush:
            os.fsync(handle)
    finally:
        os.close(handle)


def begin_journal(path: Path, record: Mapping[str, object], *, flush: bool = True) -> bool:
    """Begin a journal with a record, unless there is one; of several who try one does, and nobody sees it empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        beside.unlink(missing_ok=True)
        append_line(beside, record, flush=flush)
        os.link(beside, path)
    except FileExistsError:
        return False
    except OSError:
        if path.exists():
            return False
        os.replace(beside, path)  # a file system without links
    finally:
        beside.unlink(missing_ok=True)
    if flush:
        sync_folder(path.parent)
    return True


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The journal's records; a line torn by a kill is no record."""
    try:
        # A missing file is an empty journal; what a broken disk made of a line is no record, and takes no other along.
        file = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115
    except OSError:
        return
    with file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def newest_lines(path: Path | str, block: int = 4096) -> Iterator[bytes]:
    """The file's lines from its end to its start, without line ends; nothing where there is no file.

    What grows without bound is read as far back as the reader asks, in blocks that double.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return
        at = os.fstat(handle).st_size
        rest = b""
        while at:
            size = min(block, at)
            at -= size
            lines = (os.pread(handle, size, at) + rest).split(b"\n")
            rest = lines[0]  # its start may lie before this block
            yield from reversed(lines[1:])
            block *= 2
        yield rest
    finally:
        os.close(handle)


def newest_records(path: Path | str, skip: bytes = b"") -> Iterator[dict[str, Any]]:
    """The journal's records, newest first; lines with `skip` in them are passed over unread."""
    for line in newest_lines(path):
        if not line or (skip and skip in line):
            continue
        try:
            record = json.loads(line.decode())
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder`, or what is in a file, survive a power cut; file systems that cannot are left alone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


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
