"""What a check remembers of a million records: findings on the disk, pictures by eight bytes each."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from data.findings import Finding

IN_MEMORY = 1 << 20  # bytes of a spool before it goes to the disk
FIRST = 5  # findings of a kind that are kept at hand
RECENT = 1 << 16  # keys kept apart before they are sorted in


class Spool:
    """JSON values in a temporary file, which nobody else sees and which goes with the process."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115  closed when the spool goes
        weakref.finalize(self, self._file.close)
        self._at_end = True

    def put(self, value: Any) -> int:
        """Keep a value; its place. OSError where the disk of temporary files is full."""
        if not self._at_end:
            self._file.seek(0, os.SEEK_END)
            self._at_end = True
        place = self._file.tell()
        self._file.write(json.dumps(value).encode() + b"\n")
        return place

    def get(self, place: int) -> Any:
        """The value at a place."""
        self._at_end = False
        self._file.seek(place)
        return json.loads(self._file.readline())

    def __iter__(self) -> Iterator[Any]:
        """All values, in order; none may be added or asked for meanwhile."""
        self._at_end = False
        self._file.seek(0)
        for line in self._file:
            yield json.loads(line)


class Findings:
    """Findings in the order in which they were told; `first` holds the first few of each kind."""

    def __init__(self) -> None:
        self._spool = Spool()
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[Finding]] = {}

    def append(self, finding: Finding) -> None:
        """Tell one more."""
        self.counts[finding.kind] += 1
        told = self.first.setdefault(finding.kind, [])
        if len(told) < FIRST:
            told.append(finding)
        self._spool.put(finding)

    def __len__(self) -> int:
        return self.counts.total()

    def __iter__(self) -> Iterator[Finding]:
        return (Finding(*values) for values in self._spool)


class Seen:
    """Which 64-bit keys have been seen: eight bytes each, but for the latest ones."""

    def __init__(self) -> None:
        # Not NumPy's search: it lets go of the interpreter, and for one key waits long to have it back.
        self._sorted = array("Q")
        self._recent: set[int] = set()

    def new(self, key: int) -> bool:
        """Whether a key is seen for the first time, which from now on it is not."""
        if key in self._recent:
            return False
        at = bisect_left(self._sorted, key)
        if at < len(self._sorted) and self._sorted[at] == key:
            return False
        self._recent.add(key)
        if len(self._recent) > max(RECENT, len(self._sorted) // 8):
            self._sorted.extend(self._recent)
            np.frombuffer(self._sorted, np.uint64).sort()
            self._recent.clear()
        return True


def repeated(keys: np.ndarray) -> Iterator[tuple[int, int]]:
    """Each position whose value stands before, and the first position of that value; by position."""
    order = np.argsort(keys, kind="stable")
    again = np.empty(len(keys), dtype=bool)
    again[:1] = False
    np.equal(keys[order[1:]], keys[order[:-1]], out=again[1:])
    # The last position before that starts a run of equal values is the first of its value.
    starts = np.maximum.accumulate(np.where(again, 0, np.arange(len(keys))))
    places, firsts = order[again], order[starts[again]]
    for at in np.argsort(places, kind="stable").tolist():
        yield int(places[at]), int(firsts[at])
