"""Digests of files by pieces of some megabytes: several threads can take them, and what is read of a file can be
checked.

A file's digest is that of its pieces' digests, one after the other; it says how long these are, so that another
length reads as well. Standard library only but for xxhash.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

xxhash: Any
try:  # 10 times faster than the standard library's, and enough against faults of disks and networks
    import xxhash
except ImportError:
    xxhash = None

# Bytes of a piece. While a save is written beside a training loop, each of its calls has to wait for the
# interpreter, up to 5 ms: few long ones.
PIECE = 8 << 20
STRIDE = 512 << 10  # bytes: stay in a core's cache between being read and being digested
BATCH = 16 << 20  # bytes a thread takes at once
Task = TypeVar("Task")
Result = TypeVar("Result")


def named(algorithm: str = "") -> tuple[str, Callable[..., Any]] | None:
    """(name, what makes a hasher): the fastest here, or the named one; None where that is not installed."""
    algorithm = algorithm or ("xxh3_128" if xxhash else "blake2b")
    if algorithm == "xxh3_128":
        return (algorithm, xxhash.xxh3_128) if xxhash else None
    if algorithm == "blake2b":
        return algorithm, lambda data=b"": hashlib.blake2b(data, digest_size=16)
    return None


class Tree:
    """The digest of a file that is being written, and those of its pieces."""

    def __init__(self) -> None:
        found = named()
        assert found is not None  # the standard library's is always there
        self._name, self._new = found
        self._pieces: list[bytes] = []
        self._hasher, self._taken = self._new(), 0

    def update(self, data: memoryview) -> None:
        """Take in more bytes."""
        while data:
            part, data = data[: PIECE - self._taken], data[PIECE - self._taken :]
            self._hasher.update(part)
            self._taken += len(part)
            if self._taken == PIECE:
                self._end()

    def finish(self) -> tuple[str, str]:
        """(`algorithm/piece:hexadecimal` of all, the pieces' in hexadecimal)."""
        if self._taken:
            self._end()
        pieces = b"".join(self._pieces)
        return f"{self._name}/{PIECE}:{self._new(pieces).hexdigest()}", pieces.hex()

    def _end(self) -> None:
        self._pieces.append(self._hasher.digest())
        self._hasher, self._taken = self._new(), 0


def same(data: bytes, said: str) -> bool | None:
    """As `check`, of a file that has been read."""
    found = _understood(said)
    if found is None:
        return None
    new, length, value = found
    pieces = [new(data[first : first + length]).digest() for first in range(0, len(data), length)]
    return bool(new(b"".join(pieces)).hexdigest() == value)


def _understood(said: str) -> tuple[Callable[..., Any], int, str] | None:
    algorithm, _, value = said.partition(":")
    algorithm, _, piece = algorithm.partition("/")
    found = named(algorithm)
    return (found[1], int(piece), value) if found and piece.isdigit() else None


def check(path: Path, said: str, size: int) -> bool | None:
    """Whether a file's contents are what their digest says, read by several threads; None: cannot be known here.

    Raises OSError for a file that cannot be read.
    """
    found = _understood(said)
    if found is None:
        return None
    new, length, value = found
    descriptor = os.open(path, os.O_RDONLY)
    try:
        batch = max(1, BATCH // length) * length
        spans = [(first, min(first + batch, size)) for first in range(0, size, batch)]

        def pieces(span: tuple[int, int]) -> bytes:
            return b"".join(_pieces(descriptor, new, *span, length))

        return bool(new(b"".join(spread(pieces, spans))).hexdigest() == value)
    finally:
        os.close(descriptor)


def _pieces(descriptor: int, new: Callable[..., Any], first: int, last: int, length: int) -> Iterator[bytes]:
    buffer = memoryview(bytearray(min(STRIDE, length)))
    for begin in range(first, last, length):
        hasher, place, end = new(), begin, min(begin + length, last)
        while place < end:
            count = os.preadv(descriptor, [buffer[: end - place]], place)
            if not count:
                return  # shorter than it was: the digest will differ
            hasher.update(buffer[:count])
            place += count
        yield hasher.digest()


def spread(work: Callable[[Task], Result], tasks: Iterable[Task]) -> list[Result]:
    """`work` done on each task by as many threads as there are cores for this process, at most four; in order."""
    tasks = list(tasks)
    threads = min(4, len(os.sched_getaffinity(0)), len(tasks))
    if threads < 2:
        return [work(task) for task in tasks]
    with ThreadPoolExecutor(threads, thread_name_prefix="bytes") as pool:
        return list(pool.map(work, tasks))
