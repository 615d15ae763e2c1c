"""Fragments on disk: laid end to end as plain bytes, with an index by name.

Neighbours in a file that are neighbours in memory too are written and read as one: thousands of small
tensors that DeepSpeed has flattened cost no more than one large one.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe import digests
from moe.fragments import Fragment, copy
from moe.storage import Damaged, altered

BOUNCE = 64 << 20  # bytes moved at once from a GPU
PIECES = "pieces"  # what an index calls the digests of its files' pieces: no file's name


@contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection: thousands of small objects set it off, and it walks through all of torch's."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


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
    for tensor in joined([piece.tensor for piece in pieces]):
        flat = tensor.view(torch.uint8)
        if flat.device.type == "cpu":
            yield raw(flat)
        else:
            for first in range(0, flat.numel(), BOUNCE):
                yield raw(flat[first : first + BOUNCE].cpu())


def staged(pieces: list[Fragment], buffer: Tensor | None) -> tuple[Tensor, list[memoryview]]:
    """Pieces copied to host memory, after which they may change, and their bytes there.

    The buffer is kept for the next save: new memory costs more than the copy.
    """
    size = sum(piece.tensor.numel() * piece.tensor.element_size() for piece in pieces)
    on_gpu = any(piece.tensor.device.type == "cuda" for piece in pieces)
    if buffer is None or buffer.numel() < size:
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
    copies, place = [], 0
    for tensor in joined([piece.tensor for piece in pieces]):
        flat = tensor.view(torch.uint8)
        copies.append((buffer[place : place + flat.numel()], flat))
        place += flat.numel()
    copy(copies)
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    return buffer, [raw(buffer)[:size]]


def raw(flat: Tensor) -> memoryview:
    """The memory of a uint8 tensor on the CPU."""
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def joined(tensors: list[Tensor]) -> Iterator[Tensor]:
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


class Stored(NamedTuple):
    """One tensor of a checkpoint: ranges [start, stop) of it, the file each lies in and where, ordered by start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    ranges: list[tuple[int, int, str, int]]


class Index(dict[tuple[str, str], Stored]):
    """All tensors of a checkpoint by name and kind, and what the contents of its files are checked against."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        super().__init__()
        self.path = path
        self.files: dict[str, dict[str, Any]] = record["files"]
        self.pieces: dict[str, str] = {}  # file -> its pieces' digests, in hexadecimal

    @staticmethod
    def read(path: Path, record: dict[str, Any]) -> Index:
        """Merge what all ranks wrote. Raises CheckpointError or OSError."""
        index = Index(path, record)
        dtypes: dict[str, torch.dtype] = {}
        for rank in range(record["world"]):
            name = f"index_{rank:05d}.json"
            text = (path / name).read_bytes()
            if digests.same(text, record["files"][name]["digest"]) is False:
                raise Damaged(altered(path, name))
            for file, names in json.loads(text).items():
                if file == PIECES:
                    index.pieces |= names
                    continue
                for tensor, kinds in names.items():
                    for kind, (dtype, shape, *ranges) in kinds.items():
                        key = (tensor, kind)
                        stored = index.get(key)
                        if stored is None:
                            if dtype not in dtypes:
                                dtypes[dtype] = getattr(torch, dtype)
                            stored = index[key] = Stored(dtypes[dtype], tuple(shape), [])
                        for start, stop, offset in ranges:
                            stored.ranges.append((start, stop, file, offset))
        for stored in index.values():
            if len(stored.ranges) > 1:
                stored.ranges.sort(key=lambda entry: entry[:2])
        return index
