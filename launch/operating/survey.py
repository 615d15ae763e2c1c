"""What the files of a run say, without asking SLURM; of thousands of runs in less than a second.

The journal and the metrics are the truth, and are read from their ends. What was read is kept beside the
runs, under the sizes and times of the files that it was read from, so that the next look reads only what
has changed. That file saves time, and nothing else: it may be removed, and where it cannot be written, no
harm.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.batches import Batches, Entry
from launch.files import newest_lines, newest_records, read_json
from launch.once import uncollected
from launch.record import RunFolder

KEPT = ".survey.json"
VERSION = 2  # of Facts and the file
FILES = ("run.json", "attempts.jsonl", "metrics.jsonl", "handoff.json")
# What of a journal's lines tells the state; launch.record writes them so.
EVENT = b'"event": "'
SAVED = b'"event": "saved"'  # all but a few of them
ENDING = (b"verdict", b"cancelled")
TELLING = frozenset({*ENDING, b"submitting", b"start"})
LINE_OF_STEP = b'\n "step": '  # of a handoff, as write_json writes it
STEP = re.compile(rb'\n "step": (\d+)')
SMALL = 1 << 16  # bytes of a journal that is read whole
WORTH_KEEPING = 200  # runs; fewer are read as fast as the file is


class Facts(NamedTuple):
    """What a run folder says of itself; JSON values throughout."""

    id: str = ""
    name: str = ""
    stage: str = ""
    parent: str = ""  # its folder
    batch: str = ""  # the newest batch's folder; empty before the first submission
    element: int = 0  # the run's index in it
    asked: float = 0.0  # when the newest submission was, seconds since 1970
    started: bool = False  # an attempt began after the newest submission
    attempts: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    done: int | None = None  # the handoff's step
    said: str = ""  # the newest of: verdict, submitting, cancelled
    verdict: str = ""
    reason: str = ""
    by: str = ""
    made: bool = False  # the run has a folder

    @classmethod
    def read(cls, folder: str, batches: Batches | None = None) -> Facts:
        """Read them from the folder's files; from its batch, where the run has no folder yet."""
        run = _mapping(_whole(f"{folder}/run.json"))
        row = next(newest_records(f"{folder}/metrics.jsonl"), {})
        found: dict[str, dict[str, Any]] = {}
        starts, started = 0, False
        for line in _telling(f"{folder}/attempts.jsonl"):
            # Most lines are history: their event is read from the text, and they are not parsed.
            at = line.find(EVENT)
            if at >= 0:
                name = line[at + len(EVENT) : line.find(b'"', at + len(EVENT))]
                if name not in TELLING or (name in ENDING and "said" in found):
                    continue
                if name == b"start" and "number" in found.get("start", ()):
                    continue
            record = _mapping(line)
            event = str(record.get("event"))
            if event in ("verdict", "submitting", "cancelled"):
                found.setdefault("said", record)
            if event == "start":
                starts += 1
                started = started or "submitting" not in found
            if event in ("start", "submitting"):
                found.setdefault(event, record)
            if "submitting" in found and "number" in found.get("start", {}):
                break  # all before is history
        said, start, submitting = (found.get(key, {}) for key in ("said", "start", "submitting"))
        if not run and (entry := (batches or Batches()).entry(folder)):
            return cls.waiting(entry)
        return cls(
            id=str(run.get("id", "")),
            name=str(run.get("name", "")),
            stage=str(run.get("stage", "")),
            parent=str(run.get("parent") or ""),
            batch=str(submitting.get("batch", "")),
            element=int(submitting.get("index") or 0),
            asked=float(submitting.get("time") or 0.0),
            started=started,
            attempts=int(start["number"]) + 1 if "number" in start else starts,
            step=int(row.get("step") or 0),
            steps=int(start.get("steps", 0)),
            loss=row.get("loss"),
            done=handoff_step(folder),
            said=str(said.get("event", "")),
            verdict=str(said.get("verdict", "")),
            reason=str(said.get("reason", "")) + (f" ({said['held']})" if said.get("held") else ""),
            by=str(said.get("by", "")),
            made=bool(run),
        )

    @classmethod
    def waiting(cls, entry: Entry) -> Facts:
        """Of a run that has no folder yet."""
        run = entry.run
        return cls(
            id=run["id"],
            name=run["name"],
            stage=run["stage"],
            parent=run["parent"] or "",
            batch=entry.batch,
            element=entry.index,
            asked=entry.plan["time"],
            said="submitting",
        )


def handoff_step(folder: str) -> int | None:
    """The step of the run's handoff, None where there is no whole one. Its list of shards is not parsed."""
    text = _whole(f"{folder}/handoff.json")
    if not text.startswith(b"{") or not text.rstrip().endswith(b"}"):
        return None
    if match := STEP.search(text, max(0, text.find(LINE_OF_STEP))):
        return int(match[1])
    handoff = _mapping(text)
    return int(handoff.get("step") or 0) if handoff else None


def _telling(path: str) -> Iterable[bytes]:
    """A journal's lines, newest first, but for those that say that a step was saved."""
    try:
        size = os.stat(path).st_size
    except OSError:
        return ()
    if size <= SMALL:  # in one piece, without a call a line
        return [line for line in reversed(_whole(path).split(b"\n")) if SAVED not in line]
    return (line for line in newest_lines(path) if SAVED not in line)


def _whole(path: str) -> bytes:
    """A small file's content; empty where there is none. Two calls fewer a file than `open` makes."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        parts = [os.read(handle, 1 << 16)]
        while len(parts[-1]) == 1 << 16:
            parts.append(os.read(handle, 1 << 16))
        return b"".join(parts)
    except OSError:
        return b""
    finally:
        os.close(handle)


def _mapping(text: bytes) -> dict[str, Any]:
    """The JSON mapping, empty for anything else."""
    try:
        value = json.loads(text.decode()) if text else None
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def survey(folders: Sequence[RunFolder], root: Path) -> list[Facts]:
    """The facts of each run, in the order given; those unchanged since the last look are not read again."""
    paths = [str(folder.path) for folder in folders]
    waiting = Batches().waiting(str(root))
    waiting = {path: waiting[path] for path in paths if path in waiting and not _made(path)}
    facts = dict(
        zip(left := [path for path in paths if path not in waiting], _began(left, str(root)), strict=True)
    )
    return [Facts.waiting(waiting[path]) if path in waiting else facts[path] for path in paths]


def read_all(folders: Sequence[str], batches: Batches) -> list[Facts]:
    """The facts of runs of which most may have yet to be submitted: what is not there costs nothing."""
    present, none = there(folders), Facts()
    found = []
    for folder in folders:
        if folder in present:
            found.append(Facts.read(folder, batches))
        else:
            entry = batches.entry(folder)
            found.append(Facts.waiting(entry) if entry else none)
    return found


def there(folders: Iterable[str]) -> set[str]:
    """Those of the folders that exist, by one look at each folder above them."""
    names: dict[str, set[str]] = {}
    found = set()
    for folder in folders:
        above, _, last = folder.rpartition("/")
        if above not in names:
            try:
                names[above] = set(os.listdir(above))
            except OSError:
                names[above] = set()
        if last in names[above]:
            found.add(folder)
    return found


def _made(folder: str) -> bool:
    return os.path.exists(f"{folder}/run.json")


def _began(folders: Sequence[str], top: str) -> list[Facts]:
    """The facts of runs that have their folders."""
    if len(folders) < WORTH_KEEPING:
        return [Facts.read(folder) for folder in folders]
    with uncollected():
        return _survey(folders, top)


def _survey(folders: Sequence[str], top: str) -> list[Facts]:
    kept = _load(top)
    found, fresh = [], 0
    for path in folders:
        mark = _mark(path)
        entry = kept.get(path)
        if entry and entry[0] == mark:
            found.append(Facts(*entry[1]))
            continue
        fresh += 1
        facts = Facts.read(path)
        kept[path] = [mark, facts]
        found.append(facts)
    if fresh > len(folders) // 50:
        _save(top, kept)
    return found


def _mark(folder: str) -> list[int]:
    """Sizes and times of the files that facts are read from; 0 where there is none."""
    mark = []
    for name in FILES:
        try:
            stat = os.stat(f"{folder}/{name}")
        except OSError:
            mark += [0, 0]
        else:
            mark += [stat.st_size, stat.st_mtime_ns]
    return mark


def _load(top: str) -> dict[str, Any]:
    kept = read_json(Path(top, KEPT)) or {}
    runs = kept.get("runs")
    return runs if kept.get("version") == VERSION and isinstance(runs, dict) else {}


def _save(top: str, runs: dict[str, Any]) -> None:
    beside = f"{top}/{KEPT}.{os.uname().nodename}.{os.getpid()}"
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(json.dumps({"version": VERSION, "runs": runs}))
        os.replace(beside, f"{top}/{KEPT}")
    except OSError:
        if os.path.exists(beside):
            os.unlink(beside)
