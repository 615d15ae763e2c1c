"""metrics.jsonl: the record of a run's numbers, one row a step; all else that shows them reads this file.

A killed attempt leaves rows that the next attempt will compute again, and perhaps half a row. Both go when
the next attempt opens the file, so a reader finds each step exactly once, in order.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FSYNC_SECONDS = 30.0  # a crash of the node (not of the process) loses at most this much


class NoTracker:
    """Records nothing: what all ranks but one have. Others leave out what is not theirs."""

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        """Record the numbers of one optimizer step; steps come in order."""

    def publish(self, checkpoint: Any) -> None:
        """Record that the state of `checkpoint.step` is complete in `checkpoint.path`."""

    def use(self, handoff: Mapping[str, Any]) -> None:
        """Record the handoff this run starts from."""

    def publish_handoff(self, handoff: Mapping[str, Any]) -> None:
        """Record the handoff this run leaves."""

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Record a table; a cell that is a Path, or a list of Paths, is shown as pictures."""

    def summary(self, values: Mapping[str, object]) -> None:
        """Record facts about the whole run (data report, goodput)."""

    def asked(self) -> frozenset[str]:
        """What people have asked of the run since it began, by a tag on its W&B page: see online.ORDERS."""
        return frozenset()

    def finish(self, outcome: str, within: float | None = None) -> None:
        """End the attempt: finished, preempted, failed or fenced; in as many seconds, where there are no more."""


class JsonlTracker(NoTracker):
    """Append a row a step to `path`; rows with step > start_step, of a killed attempt, are dropped first.

    The first member of a row is `step`, the second `time` (seconds since 1970). Not-a-number and infinity are
    written as Python's json does (NaN, Infinity). A file system that refuses a row (full, quota) does not
    stop the training: the row waits in memory and is written with the next one.
    """

    def __init__(self, path: Path, *, start_step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_after(path, start_step)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._size = os.fstat(self._file).st_size
        self._waiting = b""
        self._complained = False
        self._synced = time.monotonic()
        self._fsync: threading.Thread | None = None

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        """Write one row; `metrics` holds numbers, texts and lists of numbers."""
        row = {"step": step, "time": round(time.time(), 3), **metrics}
        self._waiting += (json.dumps(row, separators=(",", ":"), default=_plain) + "\n").encode()
        self._write()
        if time.monotonic() - self._synced > FSYNC_SECONDS and not (self._fsync and self._fsync.is_alive()):
            # On a parallel file system fsync can take as long as a step: the training does not wait for it.
            self._synced = time.monotonic()
            self._fsync = threading.Thread(target=_fsync, args=(os.dup(self._file),), daemon=True)
            self._fsync.start()

    def publish(self, checkpoint: Any) -> None:
        """Make the rows up to this checkpoint as durable as the checkpoint is."""
        self._write()
        self._make_durable()

    def finish(self, outcome: str, within: float | None = None) -> None:
        if self._file < 0:
            return
        if outcome != "fenced":  # else what waits would go among the rows of another attempt
            self._write()
            self._make_durable()
        os.close(self._file)
        self._file = -1

    def _write(self) -> None:
        if not self._waiting:
            return
        try:
            written = os.write(self._file, self._waiting)
            if written < len(self._waiting):
                raise OSError("only a part of the row could be written")
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            self._complain(f"{error}; rows wait in memory until there is room")
            return
        self._size += written
        self._waiting = b""

    def _make_durable(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            self._complain(f"{error}; the newest rows may not survive a crash of this node")

    def _complain(self, text: str) -> None:
        if not self._complained:
            self._complained = True
            print(f"{self.path}: {text}", file=sys.stderr)


def rows(path: Path, after: int = 0) -> Iterator[dict[str, Any]]:
    """The complete rows of `path` with step > after; a row still being written is left out."""
    yield from Reader(path, after)


class Reader:
    """Reads on from where it stopped, as the file grows: iterate again for the rows written since."""

    def __init__(self, path: Path, after: int = 0) -> None:
        self.path, self.step, self._offset, self._inode = path, after, 0, -1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            with self.path.open("rb") as file:
                if (inode := os.fstat(file.fileno()).st_ino) != self._inode:
                    self._inode, self._offset = (
                        inode,
                        0,
                    )  # replaced: the steps seen keep rows from coming twice
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    self._offset += len(line)
                    row = parse(line)
                    if row is not None and row["step"] > self.step:
                        self.step = row["step"]
                        yield row
        except FileNotFoundError:
            return


def parse(line: bytes) -> dict[str, Any] | None:
    """A row, or None for a line that is none (torn by a crash)."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def drop_after(path: Path, step: int) -> None:
    """Keep each step up to `step` once, in order; the file is replaced in one piece, if anything goes."""
    if not path.exists():
        return
    kept, last, sound = path.with_name(f".{path.name}.{os.getpid()}"), -1, True
    with path.open("rb") as old, kept.open("wb") as new:
        for line in old:
            row = parse(line) if line.endswith(b"\n") else None
            if row is None or not last < row["step"] <= step:
                sound = False
                continue
            last = row["step"]
            new.write(line)
        new.flush()
        os.fsync(new.fileno())
    if sound:
        kept.unlink()
        return
    kept.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def loads(counts: list[float]) -> tuple[float, float, float]:
    """Largest share, smallest share and evenness of tokens over experts.

    Evenness is the entropy of the shares divided by log E: 1 when all experts get the same, 0 when one
    gets all.
    """
    total = sum(counts)
    if total <= 0:
        return 0.0, 0.0, 0.0
    shares = [count / total for count in counts]
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    return max(shares), min(shares), entropy / math.log(len(shares)) if len(shares) > 1 else 1.0


def scalars(row: Mapping[str, Any], limit: int = 100) -> dict[str, float | int | str]:
    """What a dashboard shows of a row: at most `limit` values, each with a name that groups it.

    Plain names get the prefix `train/`. Token counts of experts (`moe/layer3/counts`) become `max_share`,
    `min_share` and `entropy` of the layer and of all layers together, as do shares of dropped choices; where
    the layers' values do not fit into `limit`, they are shown for every tenth step only. Other lists are left
    to metrics.jsonl.
    """
    values: dict[str, float | int | str] = {}
    layers: dict[str, float] = {}
    stats: list[tuple[float, float, float]] = []
    lost: list[float] = []
    for key, value in row.items():
        if key in ("step", "time"):
            continue
        if key.startswith("moe/layer") and key.endswith("/dropped"):
            layers[key] = float(value)
            lost.append(layers[key])
        elif isinstance(value, (int, float)) or (isinstance(value, str) and len(value) <= 200):
            values[key if "/" in key else f"train/{key}"] = value
        elif key.endswith("/counts") and isinstance(value, list) and value:
            stats.append(loads(value))
            name = key.removesuffix("/counts")
            layers |= zip(
                (f"{name}/max_share", f"{name}/min_share", f"{name}/entropy"), stats[-1], strict=True
            )
    if stats:
        values["moe/max_share"] = max(most for most, _, _ in stats)
        values["moe/min_share"] = min(least for _, least, _ in stats)
        values["moe/entropy"] = sum(entropy for _, _, entropy in stats) / len(stats)
    if lost:
        values["moe/dropped"] = sum(lost) / len(lost)
    if len(values) + len(layers) <= limit or row["step"] % 10 == 0:
        values |= layers
    return dict(list(values.items())[: max(limit, len(layers) + 20)])


def _fsync(file: int) -> None:
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _plain(value: Any) -> Any:
    """Tensors and numpy values, without importing either."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)
