"""The order of an epoch's samples: the reference's length and modality groups, but seeded, and made lazily.

Rules: LLaVA's trainer (llava_trainer.py), as MoE-LLaVA has it too. A megabatch is what one optimizer step
takes over all ranks; it is sorted by length and dealt into chunks of about equal length, one a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def even_chunks(indices: Sequence[int], lengths: Sequence[int], chunks: int) -> list[list[int]]:
    """Deal indices, longest first, each into the chunk that is shortest so far; all chunks get equally many.

    `lengths` is indexed by the indices. What cannot be dealt evenly is dealt in turns.
    """
    if len(indices) % chunks:
        return [list(indices[start::chunks]) for start in range(chunks)]
    each = len(indices) // chunks
    dealt: list[list[int]] = [[] for _ in range(chunks)]
    totals = [0.0] * chunks
    for index in indices:
        shortest = totals.index(min(totals))
        dealt[shortest].append(index)
        totals[shortest] = totals[shortest] + lengths[index] if len(dealt[shortest]) < each else float("inf")
    return dealt


class Order(Sequence[list[int]]):
    """An epoch's megabatches; each is put in order when it is asked for. All but the last are full."""

    def __init__(
        self, groups: list[np.ndarray], lengths: np.ndarray, chunks: int, last: Sequence[list[int]] = ()
    ) -> None:
        self._groups, self._lengths, self._chunks, self._last = groups, lengths, chunks, last

    def __len__(self) -> int:
        return len(self._groups) + len(self._last)

    def __getitem__(self, at):  # type: ignore[no-untyped-def]
        if at >= len(self):
            raise IndexError(at)
        if at >= len(self._groups):
            return self._last[at - len(self._groups)]
        group = self._groups[at]
        lengths = self._lengths[group]
        longest = np.argsort(-lengths, kind="stable")
        chunks = even_chunks(longest.tolist(), lengths.tolist(), self._chunks)
        return group[[place for chunk in chunks for place in chunk]].tolist()

    def flat(self) -> list[int]:
        """All indices in their order."""
        return [index for megabatch in self for index in megabatch]


def by_length(
    lengths: np.ndarray | Sequence[int], batch: int, chunks: int, generator: torch.Generator | None = None
) -> Order:
    """Megabatches of `batch * chunks` samples of a random order, each sorted and dealt into `chunks`.

    `generator` None: torch's global one.
    """
    return Order(_cut(_permutation(len(lengths), generator), batch * chunks), np.asarray(lengths), chunks)


def by_modality(
    lengths: np.ndarray | Sequence[int],
    batch: int,
    chunks: int,
    generator: torch.Generator | None = None,
    inner: torch.Generator | None = None,
) -> Order:
    """As `by_length` for samples with images and text-only ones apart; negative lengths mark the latter.

    `inner` orders the samples of a modality, `generator` its megabatches. The last megabatch of each
    modality, even a full one, goes into one that ends the epoch, sorted by index. ValueError for a length of
    0.
    """
    lengths = np.asarray(lengths)
    if (lengths == 0).any():
        raise ValueError("a sample of length 0 belongs to no modality")
    if (lengths > 0).all() or (lengths < 0).all():
        return by_length(lengths, batch, chunks, generator)
    groups: list[np.ndarray] = []
    last: list[np.ndarray] = []
    for kind in (np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)):
        *full, end = _cut(kind[_permutation(len(kind), inner)], batch * chunks)
        groups += full
        last.append(end)
    groups = [groups[at] for at in _permutation(len(groups), generator)]
    ends = _cut(np.sort(np.concatenate(last)), batch * chunks)
    return Order(groups, np.abs(lengths), chunks, [end.tolist() for end in ends])


def _permutation(count: int, generator: torch.Generator | None) -> np.ndarray:
    return torch.randperm(count, generator=generator).numpy()


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]
