"""The global, seeded, endless stream of samples: which ones each optimizer step takes.

A step is a megabatch of `size` samples. An epoch takes each sample as often as its weight says. Where an
epoch is no multiple of `size`, its last step is filled from the next one, which then goes on with the rest:
no sample is lost and none comes twice, and all other steps keep the order that the grouping wants.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from data.index import Index
from data.sampler import by_modality

PART = 1 << 16  # records looked at together
WINDOW = 64  # megabatches among which group_by: length sorts


class Place(NamedTuple):
    """A sample: a record of a source."""

    source: int
    record: int


@dataclass(frozen=True)
class Source:
    """A data set in the mixture."""

    name: str
    index: Index
    weight: float


class Mixture:
    """Samples by number; each source's follow one another, records that cannot be trained on are left out."""

    def __init__(self, sources: Sequence[Source], patches: int, longest: int) -> None:
        self.sources = list(sources)
        self._more, self._longest = np.int32(patches - 1), longest
        self._records: list[np.ndarray | range] = []
        self.too_long: list[np.ndarray] = []  # of each source: records whose first answer does not fit at all
        self.overlong = 0  # samples that are cut
        for source in self.sources:
            columns = source.index.columns
            images = columns["images"]
            # This runs at each start, over all records; of most of them nothing else need be read.
            long, least = self._longer(images, columns["tokens"])
            before = columns["head"][long] + columns["head_images"][long] * self._more
            lost = long[(before >= longest) & (images[long] >= 0)]
            self.too_long.append(lost)
            self.overlong += int((images[long] >= 0).sum()) - len(lost)
            if len(lost) or least < 0:
                fits = images >= 0
                fits[lost] = False
                self._records.append(np.flatnonzero(fits).astype(np.int32))
            else:
                self._records.append(range(len(images)))
        self.starts = np.concatenate([[0], np.cumsum([len(records) for records in self._records])])
        self.draws = [
            max(1, round(source.weight * len(records))) if len(records) else 0
            for source, records in zip(self.sources, self._records, strict=True)
        ]

    def _longer(self, images: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, int]:
        """The records that are too long, and the least number of images; in parts that stay in a processor's cache."""
        found, least = [np.empty(0, np.int64)], 0
        for at in range(0, len(images), PART):
            part = images[at : at + PART]
            least = min(least, int(part.min()))
            total = np.multiply(part, self._more, dtype=np.int32)
            total += tokens[at : at + PART]
            if total.max() > self._longest:
                found.append(at + np.flatnonzero(total > self._longest))
        return np.concatenate(found), least

    def lengths(self, samples: np.ndarray) -> np.ndarray:
        """Tokens of some samples, int32, patches included."""
        found = np.empty(len(samples), np.int32)
        for number, (source, records) in enumerate(zip(self.sources, self._records, strict=True)):
            mine = np.flatnonzero((samples >= self.starts[number]) & (samples < self.starts[number + 1]))
            inside = samples[mine] - self.starts[number]
            chosen = inside if isinstance(records, range) else records[inside]
            columns = source.index.columns
            total = np.multiply(columns["images"][chosen], self._more, dtype=np.int32)
            found[mine] = np.minimum(total + columns["tokens"][chosen], self._longest)
        return found

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return sum(self.draws)

    @property
    def digest(self) -> str:
        """What decides which samples there are: the contents of the files and their weights."""
        parts = [[source.index.meta["sha256"], source.weight] for source in self.sources]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @functools.cached_property
    def words(self) -> np.ndarray:
        """Each sample's words, negative when it is text only: the length of the reference's sampler."""
        parts = [np.empty(0, np.int32)]
        for source, records in zip(self.sources, map(np.asarray, self._records), strict=True):
            columns = source.index.columns
            signs = np.where(columns["images"][records] > 0, 1, -1).astype(np.int32)
            parts.append(signs * np.maximum(columns["words"][records], 1))
        return np.concatenate(parts)

    def place(self, sample: int) -> Place:
        """Where a sample is."""
        source = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return Place(source, int(self._records[source][sample - self.starts[source]]))

    def members(self, epoch: int, seed: int, places: np.ndarray | None = None) -> np.ndarray:
        """An epoch's samples, int32, or those at some places: each source as often as its weight has whole numbers,
        and a further part of it.

        The parts go round one fixed shuffle: none comes twice before all have come, and none is drawn twice.
        """
        places = np.arange(self.samples) if places is None else places
        found = np.empty(len(places), np.int32)
        first = 0
        for number, (draws, records) in enumerate(zip(self.draws, self._records, strict=True)):
            mine = np.flatnonzero((places >= first) & (places < first + draws))
            if len(mine):
                inside, count = places[mine] - first, len(records)
                whole, rest = divmod(draws, count)
                part = inside >= whole * count
                inside[~part] %= count
                if part.any():
                    at = (epoch * rest + inside[part] - whole * count) % count
                    inside[part] = permutation(count, seed, 1, number)[at]
                found[mine] = inside + self.starts[number]
            first += draws
        return found


class Stream:
    """The samples of each step. `chunks` is the number of micro-batches that a step is dealt into."""

    def __init__(
        self,
        mixture: Mixture,
        group_by: Literal["none", "length", "modality"],
        size: int,
        chunks: int,
        seed: int,
    ) -> None:
        self._mixture, self._group_by, self._size, self._chunks, self._seed = (
            mixture,
            group_by,
            size,
            chunks,
            seed,
        )
        self._epoch = -1
        self._head = np.empty(0, np.int32)
        self._order: Sequence[list[int]] = []
        self._members = self._head

    def step(self, step: int) -> list[int]:
        """The samples of a step, micro-batch after micro-batch."""
        samples: list[int] = []
        total = self._mixture.samples
        while len(samples) < self._size:
            epoch, at = divmod(step * self._size + len(samples), total)
            self._enter(epoch)
            want = self._size - len(samples)
            if at < len(self._head):
                samples += self._head[at : at + want].tolist()
            else:
                group, inside = divmod(at - len(self._head), self._size)
                samples += self._members[self._order[group][inside : inside + want]].tolist()
        return samples

    def _enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        members = self._mixture.members(epoch, self._seed)
        # What the steps of earlier epochs left open is filled with samples drawn at random.
        head = min(-epoch * len(members) % self._size, len(members))
        drawn = permutation(len(members), self._seed, 2, epoch)[:head]
        self._head = members[drawn]
        if head:
            members = np.delete(members, drawn)
        self._epoch, self._members = epoch, members
        self._order = self._grouped(members, epoch) if len(members) else []

    def _grouped(self, members: np.ndarray, epoch: int) -> Sequence[list[int]]:
        size, chunks, seed = self._size, self._chunks, self._seed
        if self._group_by == "modality":
            outer, inner = generator(seed, 3, epoch), generator(seed, 4, epoch)
            # One generator for both draws of a single modality, as the reference uses one.
            return by_modality(self._mixture.words[members], size // chunks, chunks, outer, inner)
        order = permutation(len(members), seed, 3, epoch)
        if self._group_by == "none":
            return Plain(order, size)
        return Buckets(order, self._mixture.lengths(members), size, seed, epoch)


class Plain(Sequence[list[int]]):
    """A random order cut into steps."""

    def __init__(self, order: np.ndarray, size: int) -> None:
        self._order, self._size = order, size

    def __len__(self) -> int:
        return -(-len(self._order) // self._size)

    def __getitem__(self, at):  # type: ignore[no-untyped-def]
        return self._order[at * self._size : (at + 1) * self._size].tolist()


class Buckets(Plain):
    """Steps of samples of about equal length, image patches counted, in random order; the least padding."""

    def __init__(self, order: np.ndarray, lengths: np.ndarray, size: int, seed: int, epoch: int) -> None:
        full = len(order) // size
        parts = []
        for number, start in enumerate(range(0, full * size, WINDOW * size)):
            window = order[start : min(start + WINDOW * size, full * size)]
            window = window[np.argsort(-lengths[window], kind="stable")].reshape(-1, size)
            parts.append(window[permutation(len(window), seed, 5, epoch, number)].reshape(-1))
        super().__init__(np.concatenate([*parts, order[full * size :]]), size)


def generator(*words: int) -> torch.Generator:
    """Torch's generator, seeded by several numbers."""
    state = np.random.SeedSequence(list(words)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def permutation(count: int, *words: int) -> np.ndarray:
    """A random order of 0..count-1 that these numbers decide."""
    return torch.randperm(count, generator=generator(*words), dtype=torch.int32).numpy()
