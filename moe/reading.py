"""Ranges of a checkpoint's tensors read into place by several threads, and checked against their digests on the way.

Where a piece of a file is wanted whole, by tensors on the CPU in the type it has there, it goes straight into them;
else through a buffer, and is checked all the same. So every byte that is loaded has been checked, and read once.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe import digests
from moe.fragments import FROZEN, MASTER, Fragment
from moe.pieces import Index, Stored, raw
from moe.storage import CheckpointError, Damaged, altered


class Read(NamedTuple):
    """Elements that lie one after the other in a file, and the 1-D tensor they are for."""

    file: str
    offset: int
    tensor: Tensor
    dtype: torch.dtype  # in the file

    @property
    def end(self) -> int:
        """Where it ends in the file."""
        return self.offset + self.tensor.numel() * self.dtype.itemsize


def fill(pieces: list[Fragment], index: Index, *, strict: bool) -> None:
    """Read every piece's range into place. Raises CheckpointError, in words, before anything is read.

    `strict`: optimizer state must be there for what trains. Otherwise weights alone are wanted, and a frozen
    or a trained tensor's will do alike. Raises Damaged where the bytes are not those that were written.
    """
    reads: list[Read] = []
    missing, misshaped = [], []
    for piece in pieces:
        name, kind = piece.name, piece.kind
        if strict and kind != FROZEN:
            stored = index.get((name, kind))
        else:
            stored = index.get((name, MASTER)) or index.get((name, FROZEN))
        if stored is None:
            missing.append(piece)
        elif stored.shape != piece.shape:
            misshaped.append(f"{name} is {list(stored.shape)} there and {list(piece.shape)} here")
        else:
            _reads(piece, stored, reads)
    if missing or misshaped:
        raise CheckpointError(_mismatch(missing, misshaped, index))
    _read(reads, index)


def _reads(piece: Fragment, stored: Stored, reads: list[Read]) -> None:
    dtype, _, ranges = stored
    place, stop = piece.start, piece.stop
    begin, end, file, offset = ranges[0]
    if begin == place < end == stop:  # as it was written: of thousands, nearly all
        reads.append(Read(file, offset, piece.tensor, dtype))
        return
    first = max(0, bisect.bisect_right(ranges, place, key=lambda entry: entry[0]) - 1)
    for begin, end, file, offset in ranges[first:]:
        if end <= place:
            continue
        if begin > place or place >= stop:
            break
        last = min(end, stop)
        target = piece.tensor
        if (place, last) != (piece.start, stop):
            target = target[place - piece.start : last - piece.start]
        reads.append(Read(file, offset + (place - begin) * dtype.itemsize, target, dtype))
        place = last
    if place < stop:
        raise CheckpointError(
            f"{piece.name} ({piece.kind}): nothing there holds its elements {place} to {stop}; the "
            "checkpoint was written by ranks of different models"
        )


def _mismatch(missing: list[Fragment], misshaped: list[str], index: Index) -> str:
    words = []
    frozen = sorted({p.name for p in missing if (p.name, FROZEN) in index})
    absent = sorted({p.name for p in missing if (p.name, FROZEN) not in index})
    if frozen:
        words.append(
            f"{_some(frozen)} did not train when it was written and do now: continue with the same trained "
            "parts, or start a new run from its weights"
        )
    if absent:
        words.append(f"it has no {_some(absent)}: it is of another model")
    if misshaped:
        words.append(f"{_some(misshaped)}: it is of another model")
    return "; ".join(words)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read(reads: list[Read], index: Index) -> None:
    reads.sort(key=lambda read: read[:2])
    tasks: list[Callable[[], None]] = []
    opened: list[int] = []
    try:
        for name, group in groupby(_merged(reads), key=lambda read: read.file):
            opened.append(os.open(index.path / name, os.O_RDONLY))
            file = File(index, name, opened[-1])
            tasks += file.tasks(list(group))
        digests.spread(_done, tasks)
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _done(task: Callable[[], None]) -> None:
    task()


def _merged(reads: list[Read]) -> Iterator[Read]:
    """Reads joined where file and memory both go on."""
    first: Read | None = None
    count = size = storage = begin = 0
    for read in reads:
        target = read.tensor
        if first is not None and (
            read.offset == first.offset + count * size
            and read.file == first.file
            and read.dtype == first.dtype
            and target.dtype == first.tensor.dtype
            and target.storage_offset() == begin + count
            and target.untyped_storage().data_ptr() == storage
        ):
            count += target.numel()
            continue
        if first is not None:
            yield first._replace(tensor=first.tensor.as_strided((count,), (1,)))
        first, count, size = read, target.numel(), read.dtype.itemsize
        storage, begin = target.untyped_storage().data_ptr(), int(target.storage_offset())
    if first is not None:
        yield first._replace(tensor=first.tensor.as_strided((count,), (1,)))


class File:
    """One file of a checkpoint while it is read; `digest` is None where its contents cannot be checked here."""

    def __init__(self, index: Index, name: str, descriptor: int) -> None:
        self.index, self.name, self.descriptor = index, name, descriptor
        self.size: int = index.files[name]["size"]
        algorithm, _, piece = str(index.files[name]["digest"]).partition(":")[0].partition("/")
        found = digests.named(algorithm) if piece.isdigit() else None
        self.said = bytes.fromhex(index.pieces.get(name, ""))
        self.digest: Callable[..., Any] | None = found[1] if found and self.said else None
        self.piece = int(piece) if self.digest else digests.PIECE

    def tasks(self, reads: list[Read]) -> Iterator[Callable[[], None]]:
        """Work for threads: pieces of the file next to each other, with the reads that want of them."""
        batch = max(1, digests.BATCH // self.piece) * self.piece
        wanted: dict[int, list[Read]] = {}
        for read in reads:
            for first in range(read.offset // batch * batch, read.end, batch):
                wanted.setdefault(first, []).append(read)
        for first, here in wanted.items():
            yield lambda first=first, here=here: self._batch(first, first + batch, here)  # type: ignore[misc]

    def _batch(self, first: int, last: int, reads: list[Read]) -> None:
        parts = [Part.of(read, first, last) for read in reads]
        buffer: Tensor | None = None
        for begin in range(first, min(last, self.size), self.piece):
            end = min(begin + self.piece, self.size)
            here = [part.cut(begin, end) for part in parts if part.begin < end and begin < part.end]
            if not here:
                continue
            views = [part.view for part in here if part.view is not None]
            if len(views) == len(here) and sum(len(view) for view in views) == end - begin:
                self._load(views, begin)
                continue
            buffer = torch.empty(self.piece, dtype=torch.uint8) if buffer is None else buffer
            whole = raw(buffer)[: end - begin]
            self._load([whole], begin)
            for part in here:
                part.take(buffer[part.begin - begin : part.end - begin])

    def _load(self, views: list[memoryview], begin: int) -> None:
        """Read one piece, and see that it is what was written."""
        hasher = self.digest() if self.digest else None
        place = begin
        for stride in _strides(views):
            self._fetch(stride, place)
            for view in stride:
                place += len(view)
                if hasher is not None:
                    hasher.update(view)
        if hasher is not None:
            number, length = begin // self.piece, hasher.digest_size
            if hasher.digest() != self.said[number * length : (number + 1) * length]:
                raise Damaged(altered(self.index.path, self.name))

    def _fetch(self, views: list[memoryview], place: int) -> None:
        views = list(views)
        while views:
            count = os.preadv(self.descriptor, views[:512], place)
            if count == 0:
                raise Damaged(f"{self.index.path / self.name} ends at byte {place}, before its index says")
            place += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if views and count:
                views[0] = views[0][count:]


def _strides(views: list[memoryview]) -> Iterator[list[memoryview]]:
    """The same memory in portions that fit a core's cache."""
    portion: list[memoryview] = []
    room = digests.STRIDE
    for view in views:
        while view:
            portion.append(view[:room])
            view = view[len(portion[-1]) :]
            room -= len(portion[-1])
            if not room:
                yield portion
                portion, room = [], digests.STRIDE
    if portion:
        yield portion


class Part(NamedTuple):
    """Bytes [begin, end) of a file, and the tensor they are for; `view`: its memory, if they can go straight there."""

    begin: int
    end: int
    tensor: Tensor
    dtype: torch.dtype
    view: memoryview | None

    @staticmethod
    def of(read: Read, first: int, last: int) -> Part:
        """What a read wants of a stretch of its file."""
        straight = read.tensor.device.type == "cpu" and read.tensor.dtype == read.dtype
        view = raw(read.tensor.view(torch.uint8)) if straight else None
        return Part(read.offset, read.end, read.tensor, read.dtype, view).cut(first, last)

    def cut(self, first: int, last: int) -> Part:
        """What lies between two places; elements are never cut, for both are multiples of their size."""
        begin, end, size = max(self.begin, first), min(self.end, last), self.dtype.itemsize
        if (begin, end) == (self.begin, self.end):
            return self
        a, b = begin - self.begin, end - self.begin
        view = None if self.view is None else self.view[a:b]
        return Part(
            begin,
            end,
            self.tensor if view is not None else self.tensor[a // size : b // size],
            self.dtype,
            view,
        )

    def take(self, data: Tensor) -> None:
        """Copy its bytes out of a buffer."""
        if self.view is not None:
            self.view[:] = raw(data)
        else:
            self.tensor.copy_(data.view(self.dtype))
