"""What wandb's own files of a run (`run-ID.wandb`) hold, read without wandb.

The files say what is recorded, and after a kill up to where: the next attempt goes on from there, and the
syncer compares them with what the server has. Format: a LevelDB log
(https://github.com/google/leveldb/blob/main/doc/log_format.md) with 7 bytes of W&B's own at the head, of
protobuf records (wandb/proto/wandb_internal.proto).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 32768
RECORD_HISTORY, RECORD_EXIT = 2, 18  # fields of Record
HISTORY_ITEM, HISTORY_STEP = 1, 2  # fields of HistoryRecord
ITEM_KEY, ITEM_VALUE_JSON = 1, 16  # fields of HistoryItem
STEP_NUMBER = 1  # field of HistoryStep


@dataclass(frozen=True)
class Segment:
    """One file: what one process recorded of the run."""

    path: Path
    rows: int = 0
    first: int = -1  # step; -1: no rows
    last: int = -1
    closed: bool = False  # the run was ended in it
    empty: bool = True  # not one whole record: killed before the first was written


def find(folder: Path) -> list[Path]:
    """The files of a run folder, in the order they were begun."""
    return sorted((folder / "wandb").glob("*run-*/run-*.wandb"), key=_begun)


def _begun(path: Path) -> str:
    return path.parent.name.partition("run-")[2]


def last_step(folder: Path) -> int:
    """The last step in the files of a run folder; -1 for none."""
    for path in reversed(find(folder)):
        if (found := scan(path)).rows:
            return found.last
    return -1


def scan(path: Path) -> Segment:
    """Read one file as far as it is whole."""
    rows, first, last, closed, empty = 0, -1, -1, False, True
    for record in _records(path):
        empty = False
        for field, value in _fields(record):
            if field == RECORD_HISTORY:
                last = _step(value)
                first = last if rows == 0 else first
                rows += 1
            elif field == RECORD_EXIT:
                closed = True
    return Segment(path, rows, first, last, closed, empty)


def _step(history: bytes) -> int:
    counted = 0
    for field, value in _fields(history):
        if field == HISTORY_STEP:
            counted = next((int.from_bytes(n, "little") for f, n in _fields(value) if f == STEP_NUMBER), 0)
        elif field == HISTORY_ITEM:
            item = dict(_fields(value))
            if item.get(ITEM_KEY) == b"_step":
                return int(item[ITEM_VALUE_JSON])
    return counted


def _records(path: Path) -> Iterator[bytes]:
    """The records: a piece has 7 bytes of checksum, length and type (whole, first, middle, last) first."""
    parts = b""
    with path.open("rb") as file:
        place = len(file.read(7))
        while True:
            if BLOCK - place % BLOCK < 7:
                place += len(file.read(BLOCK - place % BLOCK))
            header = file.read(7)
            if len(header) < 7:
                return
            size, kind = int.from_bytes(header[4:6], "little"), header[6]
            data = file.read(size)
            place += 7 + size
            if len(data) < size or kind not in (1, 2, 3, 4):
                return
            parts = data if kind in (1, 2) else parts + data
            if kind in (1, 4):
                yield parts


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The top fields of a protobuf message; a varint comes as the bytes of its value, little end first."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            number, place = _varint(message, place)
            yield field, number.to_bytes(10, "little")
        else:
            if wire == 2:
                size, place = _varint(message, place)
            else:
                size = {1: 8, 5: 4}[wire]
            yield field, message[place : place + size]
            place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = message[place]
        place += 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number, place
