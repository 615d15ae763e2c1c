"""Pack samples into sequences of the model's length, so that few slots stay empty.

A sequence takes samples as they come until two more would fill it, then the pair that fills it best: among
thousands of samples some pair does so exactly. That leaves fewer gaps than best fit, which runs out of small
samples. A window is packed when the stream reaches it, so the first batch does not wait for the epoch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.mixture import Mixture, permutation
from data.shuffle import Shuffle

WINDOW = 16_384  # samples packed together
FIRST = 1024  # samples of an epoch's first window, so that the first batch comes at once
SLACK = 16  # slots that a closing pair may leave empty


class _Shelf:
    """Samples by length. Bit l of `there` says that one of length l is left; `mirrored` has bit capacity
    - l.
    """

    def __init__(self, lengths: Sequence[int], capacity: int) -> None:
        self.lengths, self.capacity = lengths, capacity
        self.stacks: dict[int, list[int]] = {}
        for index in range(len(lengths) - 1, -1, -1):
            self.stacks.setdefault(lengths[index], []).append(index)
        self.there = sum(1 << length for length in self.stacks)
        self.mirrored = sum(1 << (capacity - length) for length in self.stacks)

    def take(self, length: int) -> int:
        """The next sample of that length, in the given order."""
        stack = self.stacks[length]
        index = stack.pop()
        if not stack:
            self.there ^= 1 << length
            self.mirrored ^= 1 << (self.capacity - length)
        return index

    def longest(self, room: int) -> int:
        """The greatest length up to `room`; 0 when there is none."""
        return max((self.there & ((2 << room) - 1)).bit_length() - 1, 0)

    def pair(self, room: int) -> tuple[int, int] | None:
        """Two lengths that leave at most SLACK of `room`, least first."""
        for total in range(room, max(room - SLACK, 0) - 1, -1):
            halves = self.there & (self.mirrored >> (self.capacity - total))
            while halves:
                length = halves.bit_length() - 1
                if 2 * length != total or len(self.stacks[length]) > 1:
                    return length, total - length
                halves ^= 1 << length
        return None


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices whose lengths add up to at most `capacity`; ValueError for a length above it."""
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit into {capacity}")
    if lengths and min(lengths) < 1:
        raise ValueError("a sample without tokens cannot be packed")
    shelf = _Shelf(lengths, capacity)
    taken = bytearray(len(lengths))
    bins: list[list[int]] = []
    first = 0  # all samples before it are taken
    while shelf.there:
        room, members = capacity, []
        while length := shelf.longest(room):
            most = shelf.there.bit_length() - 1
            if room <= 2 * most and (found := shelf.pair(room)):
                picked = list(found)
            elif room > 2 * most:
                while taken[first]:
                    first += 1
                # Of one length the earliest is on top, so this takes sample `first` itself.
                picked = [lengths[first]]
            else:
                picked = [length]
            for length in picked:
                index = shelf.take(length)
                taken[index] = 1
                members.append(index)
                room -= length
        bins.append(members)
    return bins


class PackedStream:
    """The packed sequences of each step, as lists of samples; `size` sequences a step, over all ranks.

    Steps must be asked for in order from a `cursor` on; a cursor is [step, epoch, window, sequence].
    """

    def __init__(self, mixture: Mixture, capacity: int, size: int, seed: int) -> None:
        self._mixture, self._capacity, self._size, self._seed = mixture, capacity, size, seed
        self._packed: tuple[tuple[int, int], list[list[int]]] = ((-1, -1), [])
        self._cursors: dict[int, list[int]] = {0: [0, 0, 0, 0]}

    def cursor(self, step: int) -> list[int]:
        """Where a step starts that has been asked for, or is next."""
        return self._cursors[step]

    def go(self, cursor: list[int]) -> None:
        """Go on from a cursor."""
        self._cursors = {cursor[0]: list(cursor)}

    def step(self, step: int) -> list[list[int]]:
        """The sequences of a step."""
        _, epoch, window, at = self._cursors[step]
        taken: list[list[int]] = []
        while len(taken) < self._size:
            bins = self._window(epoch, window)
            part = bins[at : at + self._size - len(taken)]
            taken += part
            at += len(part)
            if at == len(bins):
                window, at = window + 1, 0
                if window == self._windows:
                    epoch, window = epoch + 1, 0
        self._cursors[step + 1] = [step + 1, epoch, window, at]
        for old in [key for key in self._cursors if key < step - 64]:
            del self._cursors[old]
        return taken

    def sequences(self) -> int:
        """Sequences of the first epoch; packs all of it."""
        return sum(len(self._window(0, window)) for window in range(self._windows))

    @property
    def _windows(self) -> int:
        return 1 + max(0, -(-(self._mixture.samples - FIRST) // WINDOW))

    def _window(self, epoch: int, window: int) -> list[list[int]]:
        if self._packed[0] == (epoch, window):
            return self._packed[1]
        start = FIRST + (window - 1) * WINDOW if window else 0
        stop = min(FIRST + window * WINDOW, self._mixture.samples)
        order = Shuffle(self._mixture.samples, self._seed, 7, epoch)
        samples = self._mixture.members(epoch, self._seed, order[np.arange(start, stop)])
        bins = pack(self._mixture.lengths(samples).tolist(), self._capacity)
        mixed = permutation(len(bins), self._seed, 8, epoch, window)
        self._packed = ((epoch, window), [samples[bins[at]].tolist() for at in mixed])
        return self._packed[1]


def positions(segments: Tensor) -> Tensor:
    """Position ids [B, S] that start at 0 in each segment; `segments` [B, S] counts a row's samples from
    1.
    """
    steps = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return steps - torch.where(starts, steps, 0).cummax(dim=1).values
