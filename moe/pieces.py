"""Fragments on disk: laid end to end as plain bytes, with an index by name; read back by ranges.

Neighbours in a file that are neighbours in memory too are written and read as one: thousands of small
tensors that DeepSpeed has flattened cost no more than one large one.
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.fragments import FROZEN, MASTER, Fragment
from moe.storage import CheckpointError

BOUNCE = 64 << 20  # bytes moved at once between a GPU and a file


def layout(pieces: list[Fragment], file: str) -> dict[str, Any]:
    """The index of pieces written end to end to one file: {file: {name: {kind: [dtype, shape, [start,
    stop, offset]...]}}}.
    """
    names: dict[str, dict[str, list[Any]]] = {}
    offset = 0
    for piece in pieces:
        dtype = str(piece.tensor.dtype).removeprefix("torch.")
        kinds = names.setdefault(piece.name, {})
        entry = kinds.setdefault(piece.kind, [dtype, list(piece.shape)])
        entry.append([piece.start, piece.stop, offset])
        offset += piece.tensor.numel() * piece.tensor.element_size()
    return {file: names}


def runs(pieces: list[Fragment]) -> Iterator[memoryview]:
    """The bytes of pieces, in order; on a CPU without a copy."""
    for tensor in _joined([piece.tensor for piece in pieces]):
        flat = tensor.view(torch.uint8)
        if flat.device.type == "cpu":
            yield _bytes(flat)
        else:
            for first in range(0, flat.numel(), BOUNCE):
                part = flat[first : first + BOUNCE]
                yield _bytes(part.cpu())


def staged(pieces: list[Fragment], buffer: Tensor | None) -> tuple[Tensor, list[memoryview]]:
    """Pieces copied to host memory, after which they may change, and their bytes there.

    The buffer is kept for the next save: new memory costs more than the copy.
    """
    size = sum(piece.tensor.numel() * piece.tensor.element_size() for piece in pieces)
    on_gpu = any(piece.tensor.device.type == "cuda" for piece in pieces)
    if buffer is None or buffer.numel() < size:
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
    place = 0
    for tensor in _joined([piece.tensor for piece in pieces]):
        flat = tensor.view(torch.uint8)
        buffer[place : place + flat.numel()].copy_(flat, non_blocking=True)
        place += flat.numel()
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    return buffer, [_bytes(buffer)[:size]]


def _bytes(flat: Tensor) -> memoryview:
    """The memory of a uint8 tensor on the CPU."""
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def _joined(tensors: list[Tensor]) -> Iterator[Tensor]:
    """1-D tensors, neighbours in one storage joined."""
    first: Tensor | None = None
    count = 0
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        if (
            first is not None
            and tensor.dtype == first.dtype
            and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and tensor.storage_offset() == first.storage_offset() + count
        ):
            count += tensor.numel()
            continue
        if first is not None:
            yield first.as_strided((count,), (1,))
        first, count = tensor, tensor.numel()
    if first is not None:
        yield first.as_strided((count,), (1,))


@dataclass
class Stored:
    """One tensor of a checkpoint: ranges [start, stop) of it, where each lies, ordered by start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    ranges: list[tuple[int, int, Path, int]] = field(default_factory=list)


class Index(dict[tuple[str, str], Stored]):
    """All tensors of a checkpoint by name and kind."""

    @staticmethod
    def read(path: Path, record: dict[str, Any]) -> Index:
        """Merge what all ranks wrote. Raises CheckpointError or OSError."""
        index = Index()
        for rank in range(record["world"]):
            text = (path / f"index_{rank:05d}.json").read_text()
            for file, names in json.loads(text).items():
                for name, kinds in names.items():
                    for kind, (dtype, shape, *ranges) in kinds.items():
                        stored = index.setdefault((name, kind), Stored(getattr(torch, dtype), tuple(shape)))
                        stored.ranges += [
                            (start, stop, path / file, offset) for start, stop, offset in ranges
                        ]
        for stored in index.values():
            stored.ranges.sort(key=lambda entry: entry[:2])
        return index


def fill(pieces: list[Fragment], index: Index, *, strict: bool) -> None:
    """Read every piece's range into place. Raises CheckpointError, in words, before anything is read.

    `strict`: optimizer state must be there for what trains. Otherwise weights alone are wanted, and a frozen
    or a trained tensor's will do alike.
    """
    reads: list[tuple[Path, int, Tensor, torch.dtype]] = []
    missing, misshaped = [], []
    for piece in pieces:
        kinds: tuple[str, ...] = (piece.kind,)
        if piece.kind == FROZEN or not strict:
            kinds = (MASTER, FROZEN)
        stored = next((index[piece.name, kind] for kind in kinds if (piece.name, kind) in index), None)
        if stored is None:
            missing.append(piece)
        elif stored.shape != piece.shape:
            misshaped.append(f"{piece.name} is {list(stored.shape)} there and {list(piece.shape)} here")
        else:
            reads += _reads(piece, stored)
    if missing or misshaped:
        raise CheckpointError(_mismatch(missing, misshaped, index))
    _read(reads)


def _reads(piece: Fragment, stored: Stored) -> Iterator[tuple[Path, int, Tensor, torch.dtype]]:
    size = stored.dtype.itemsize
    place = piece.start
    first = max(0, bisect.bisect_right(stored.ranges, piece.start, key=lambda entry: entry[0]) - 1)
    for start, stop, file, offset in stored.ranges[first:]:
        if stop <= place:
            continue
        if start > place or place >= piece.stop:
            break
        end = min(stop, piece.stop)
        target = piece.tensor[place - piece.start : end - piece.start]
        yield file, offset + (place - start) * size, target, stored.dtype
        place = end
    if place < piece.stop:
        raise CheckpointError(
            f"{piece.name} ({piece.kind}): nothing there holds its elements {place} to {piece.stop}; the "
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


def _read(reads: list[tuple[Path, int, Tensor, torch.dtype]]) -> None:
    """Carry out reads, one pass a file, joined where file and memory both go on."""
    reads.sort(key=lambda read: (read[0], read[1]))
    place = 0
    while place < len(reads):
        file = reads[place][0]
        stop = place
        while stop < len(reads) and reads[stop][0] == file:
            stop += 1
        descriptor = os.open(file, os.O_RDONLY)
        try:
            for offset, target, dtype in _merged(reads[place:stop]):
                _read_into(descriptor, file, offset, target, dtype)
        finally:
            os.close(descriptor)
        place = stop


def _merged(reads: list[tuple[Path, int, Tensor, torch.dtype]]) -> Iterator[tuple[int, Tensor, torch.dtype]]:
    at, first, count, dtype = 0, reads[0][2], 0, reads[0][3]
    for _, offset, target, stored in reads:
        joins = (
            count > 0
            and stored == dtype
            and offset == at + count * dtype.itemsize
            and target.dtype == first.dtype
            and target.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and target.storage_offset() == first.storage_offset() + count
        )
        if joins:
            count += target.numel()
            continue
        if count:
            yield at, first.as_strided((count,), (1,)), dtype
        at, first, count, dtype = offset, target, target.numel(), stored
    if count:
        yield at, first.as_strided((count,), (1,)), dtype


def _read_into(descriptor: int, file: Path, offset: int, target: Tensor, dtype: torch.dtype) -> None:
    if target.device.type == "cpu" and target.dtype == dtype:
        _read_bytes(descriptor, file, offset, target.view(torch.uint8))
        return
    step = max(1, BOUNCE // dtype.itemsize)
    bounce = torch.empty(min(step, target.numel()), dtype=dtype)
    for first in range(0, target.numel(), step):
        part = target[first : first + step]
        here = bounce[: part.numel()]
        _read_bytes(descriptor, file, offset + first * dtype.itemsize, here.view(torch.uint8))
        part.copy_(here)


def _read_bytes(descriptor: int, file: Path, offset: int, target: Tensor) -> None:
    view = _bytes(target)
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise CheckpointError(f"{file} ends at byte {offset}, before its index says")
        view, offset = view[count:], offset + count
