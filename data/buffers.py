"""Memory for pictures, used again: fresh megabytes cost as much in page faults as filling them does.

What was handed out is taken back by itself once nothing refers to it any more, as if it had been freed: NumPy's
views and torch's tensors keep the array alive whose memory they show.
"""

from __future__ import annotations

import sys

import numpy as np

MOST = 64  # pieces that are kept


def _holders(pieces: list[np.ndarray], at: int) -> int:
    return sys.getrefcount(pieces[at])


_ALONE = _holders([np.empty(0, np.uint8)], 0)  # of a piece that only the list has


class Buffers:
    """Arrays of bytes, each item of one shape; for use by one thread."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._pieces: list[np.ndarray] = []

    def take(self, count: int) -> np.ndarray:
        """uint8 [count, ...] of what was there before."""
        free = [at for at in range(len(self._pieces)) if _holders(self._pieces, at) == _ALONE]
        for at in free:
            if len(self._pieces[at]) >= count:
                return self._pieces[at][:count]
        piece = np.empty((count, *self._shape), np.uint8)
        if free:
            self._pieces[free[0]] = piece  # for a smaller one: before long all fit
        elif len(self._pieces) < MOST:
            self._pieces.append(piece)
        return piece[:count]
