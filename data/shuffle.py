"""A random order of a million samples of which only the places asked for are worked out.

A Feistel network over the next power of four is a permutation; places that fall outside are put through it again
until they fall inside (cycle walking: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
"""

from __future__ import annotations

import numpy as np

ROUNDS = 6
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # SplitMix64 (Steele, Lea, Flood, 2014)


class Shuffle:
    """A permutation of 0..count-1 that `words` decide; indexed by an array of places."""

    def __init__(self, count: int, *words: int) -> None:
        self.count = count
        self._bits = np.uint64(max(1, (max(count - 1, 0).bit_length() + 1) // 2))  # of each half
        self._keys = np.random.SeedSequence(list(words)).generate_state(ROUNDS, np.uint64)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """int64, what stands at these places."""
        values = self._once(places.astype(np.uint64))
        while (outside := np.flatnonzero(values >= self.count)).size:
            values[outside] = self._once(values[outside])
        return values.astype(np.int64)

    def _once(self, values: np.ndarray) -> np.ndarray:
        bits = self._bits
        low = (np.uint64(1) << bits) - np.uint64(1)
        left, right = values >> bits, values & low
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & low)
        both: np.ndarray = (left << bits) | right
        return both


def _mixed(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
