"""Steps of micro-batches for one rank, loaded ahead by threads, resumable to the sample.

Pillow, NumPy and torch let other threads run while they decode and scale, and texts come tokenised from the
index: so threads do what processes would, without copying pictures between them. The state is what the
consumer has taken, whatever was loaded ahead.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.buffers import Buffers
from data.collate import collate, cut, joined, segments, spliced
from data.conversation import tokenizer_faults
from data.images import ImageError, ImageFormat, pixels
from data.index import Row
from data.mixture import Mixture, Stream
from data.packing import PackedStream
from data.records import read
from data.replaced import Replaced
from data.shards import open_shard
from data.sources import DataError, Question, held_out, root_of, sources_of, texts
from data.spec import DataSpec

__all__ = ["DataError", "Loader", "Question", "held_out", "texts"]

AHEAD = 2  # steps that are loaded while one trains
TRIES = 64  # substitutes tried for a sample that cannot be read
TOLD = 20  # faults written out in an error

log = logging.getLogger(__name__)


@dataclass
class _Job:
    """A sample on its way: `pixels` is its part of the micro-batch's pictures, [n, H, W, 3]."""

    sample: int
    row: Row
    pixels: np.ndarray
    future: Future[None] | None = None
    replaced: list[str] = field(default_factory=list)


@dataclass
class _Batch:
    """A micro-batch on its way: its pictures [N, H, W, 3] and the samples of each of its sequences."""

    pixels: np.ndarray
    sequences: list[list[_Job]]

    @property
    def jobs(self) -> list[_Job]:
        """Its samples, in order."""
        return [job for jobs in self.sequences for job in jobs]


class Loader:
    """This rank's micro-batches. The order of all ranks' samples depends on the spec and the seed alone.

    A sample whose pictures cannot be read is replaced by another one with as many pictures, chosen by the
    seed; over `spec.bad_samples` it stops with their list. `replaced` is a folder in which all ranks of a run
    note theirs, so that they are counted over the run; without it each rank counts its own. Records that the
    index found untrainable are left out and count too. Raises DataError, in words, for whatever the data
    lack.
    """

    def __init__(
        self,
        spec: DataSpec,
        tokenizer: Any,
        image: ImageFormat,
        patches: int,
        *,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world: int,
        seed: int,
        replaced: Path | None = None,
    ) -> None:
        if faults := tokenizer_faults(tokenizer, spec.template):
            raise DataError(f"the tokenizer does not suit template {spec.template}: " + "; ".join(faults))
        self._spec, self._image, self._patches = spec, image, patches
        self._pad = int(tokenizer.pad_token_id)
        self._micro_batch, self._accumulation = micro_batch, accumulation
        self._rank, self._world, self._seed = rank, world, seed
        self._size = micro_batch * accumulation * world
        self._step = 0
        self._replaced = Replaced(replaced, rank, world)
        self._noted = replaced is not None
        self._tokens = self._slots = 0
        self._buffers = Buffers((image.size, image.size, 3))
        self._root = root_of(spec)
        self._shard = open_shard(self._root, image, spec.aspect)
        self._mixture = Mixture(sources_of(spec, self._root, tokenizer), patches, spec.max_length)
        self._dropped = self._faults()
        if len(self._dropped) > spec.bad_samples:
            raise DataError(self._over(self._dropped, len(self._dropped)))
        if self._mixture.samples == 0:
            raise DataError(f"the mix {spec.mix!r} has no samples")
        self._stream = Stream(self._mixture, spec.group_by, self._size, accumulation * world, seed)
        self._packed = PackedStream(self._mixture, spec.capacity, self._size, seed) if spec.packing else None
        self._pool = ThreadPoolExecutor(spec.workers, thread_name_prefix="data") if spec.workers else None

    @property
    def samples(self) -> int:
        """Samples of an epoch, over all ranks; with packing, the packed sequences of the first one."""
        return self._packed.sequences() if self._packed else self._mixture.samples

    def steps(self) -> Iterator[list[dict[str, Tensor]]]:
        """Each optimizer step's micro-batches, from the state's position on; endless."""
        waiting: deque[list[_Batch]] = deque()
        self._replaced.begin(self._step)
        try:
            while True:
                while len(waiting) <= (AHEAD if self._pool else 0):
                    waiting.append(self._start(self._step + len(waiting)))
                batches = [self._finish(batch) for batch in waiting.popleft()]
                self._step += 1
                yield batches
        finally:
            for job in (job for step in waiting for batch in step for job in batch.jobs):
                if job.future:
                    job.future.cancel()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step that was taken."""
        state = {
            "step": self._step,
            "seed": self._seed,
            "step_samples": self._size,
            "epoch_samples": self._mixture.samples,
            "packing": self._spec.capacity,
            "group_by": self._spec.group_by,
            "data": self._mixture.digest,
            "replaced": self._replaced.count(),
        }
        return {**state, "cursor": self._packed.cursor(self._step)} if self._packed else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, on as many ranks as there are now; call it before `steps`."""
        here = self.state_dict()
        for key in ("seed", "step_samples", "epoch_samples", "packing", "group_by", "data"):
            if state[key] != here[key]:
                raise DataError(
                    f"the checkpoint's data stream has {key} {state[key]}, this run has {here[key]}: it "
                    "would "
                    "not be the same stream; keep seed, data and global batch, or start a new run"
                )
        self._step = int(state["step"])
        if not self._noted:
            self._replaced.earlier = int(state["replaced"])
        if self._packed:
            self._packed.go(state["cursor"])

    def report(self) -> dict[str, Any]:
        """Counts so far: `replaced` of the run where that is noted, else of this rank; `padding`, of this rank, is
        the share of empty slots, image patches counted.
        """
        replaced = self._replaced.all()
        return {
            "samples": self.samples,
            "sources": {
                source.name: draws
                for source, draws in zip(self._mixture.sources, self._mixture.draws, strict=True)
            },
            "step": self._step,
            "cut": self._mixture.overlong,
            "dropped": len(self._dropped),
            "replaced": [note.why for note in replaced],
            "replaced_count": self._replaced.earlier + len(replaced),
            "padding": 1 - self._tokens / self._slots if self._slots else 0.0,
        }

    def close(self) -> None:
        """Stop the threads."""
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, step: int) -> list[_Batch]:
        """Set this rank's micro-batches of a step going."""
        single = [] if self._packed else self._stream.step(step)
        sequences = self._packed.step(step) if self._packed else [[sample] for sample in single]
        batches = []
        for turn in range(self._accumulation):
            # Micro-batches are dealt to the ranks in turn, as the reference's sampler shards them.
            first = (turn * self._world + self._rank) * self._micro_batch
            own = sequences[first : first + self._micro_batch]
            samples = [sample for sequence in own for sample in sequence]
            rows = [self._row(sample) for sample in samples]
            counts = [len(row.images) for row in rows]
            raw = self._buffers.take(sum(counts))
            jobs = map(_Job, samples, rows, np.split(raw, np.cumsum(counts)[:-1]))
            batch = _Batch(raw, [list(itertools.islice(jobs, len(sequence))) for sequence in own])
            for job in batch.jobs:
                if self._pool and job.row.images:
                    job.future = self._pool.submit(self._read, job)
            batches.append(batch)
        return batches

    def _finish(self, batch: _Batch) -> dict[str, Tensor]:
        for job in batch.jobs:
            if job.future:
                job.future.result()
            elif job.row.images:
                self._read(job)
            if job.replaced:
                self._note(job.replaced)
        packed = [[job.row for job in jobs] for jobs in batch.sequences]
        rows = [joined(sequence) if len(sequence) > 1 else sequence[0] for sequence in packed]
        lengths = [spliced(row.input_ids, self._patches) for row in rows]
        self._tokens += sum(lengths)
        self._slots += max(lengths) * len(lengths)
        tensors = collate(rows, torch.from_numpy(batch.pixels).permute(0, 3, 1, 2), self._pad)
        return {**tensors, "segments": segments(packed)} if self._packed else tensors

    def _note(self, whys: list[str]) -> None:
        """Count a sample that was replaced; DataError when there have been too many."""
        for why in whys:
            log.warning("replaced a sample: %s", why)
        self._replaced.add(self._step, whys)
        count = self._replaced.count() + len(self._dropped)
        if count > self._spec.bad_samples:
            raise DataError(self._over([*self._dropped, *(note.why for note in self._replaced.all())], count))

    def _row(self, sample: int) -> Row:
        place = self._mixture.place(sample)
        row = self._mixture.sources[place.source].index.row(place.record)
        return cut(row, self._patches, self._spec.max_length)

    def _read(self, job: _Job) -> None:
        """Load a sample's pictures, or those of one in its place."""
        sample, row = job.sample, job.row
        for attempt in range(TRIES):
            try:
                for at, path in enumerate(row.images):
                    self._picture(sample, path, job.pixels[at])
            except ImageError as error:
                job.replaced.append(f"{self._name(sample)}: {error}")
                sample, row = self._substitute(job, attempt)
            else:
                job.row = row
                return
        raise DataError(
            f"{TRIES} samples in a row have pictures that cannot be read; is data.root {self._root} the "
            "folder "
            "that the paths start from? The first: " + job.replaced[0]
        )

    def _picture(self, sample: int, path: str, out: np.ndarray) -> None:
        """Fill `out`, uint8 [size, size, 3], with a picture: a prepared one, or the file's."""
        if self._shard and (raw := self._shard.get(path)) is not None:
            np.copyto(out, raw)
            return
        quick = self._spec.quick_pictures
        try:
            pixels(self._root / path, self._image, self._spec.aspect, quick=quick, out=out)
        except ImageError:
            # A user's own file may give paths from where it lies.
            source = self._mixture.sources[self._mixture.place(sample).source]
            beside = source.index.annotation.parent / path
            if (self._root / path).exists() or not beside.exists():
                raise
            pixels(beside, self._image, self._spec.aspect, quick=quick, out=out)

    def _substitute(self, job: _Job, attempt: int) -> tuple[int, Row]:
        """Another sample with as many pictures; which one, the seed and the broken sample decide."""
        chance = np.random.default_rng([self._seed, 6, job.sample, attempt])
        for _ in range(10_000):
            sample = int(chance.integers(self._mixture.starts[-1]))
            row = self._row(sample)
            # In a packed sequence there is no more room than the sample had.
            length, room = self._mixture.lengths(np.array([sample, job.sample]))
            if (length <= room or not self._packed) and len(row.images) == len(job.row.images):
                return sample, row
        raise DataError(f"nothing can replace {job.replaced[-1]}: no other sample is like it")

    def _name(self, sample: int) -> str:
        place = self._mixture.place(sample)
        index, id = self._mixture.sources[place.source].index, ""
        with contextlib.suppress(OSError, ValueError):  # the file need not be there any more
            span = (int(index.columns[name][place.record]) for name in ("start", "end"))
            id = f" (id {read(index.annotation, *span).get('id', 'none')})"
        return f"{index.annotation}, record {place.record}{id}"

    def _faults(self) -> list[str]:
        """What the indexes found untrainable, in words."""
        told = []
        for source, long in zip(self._mixture.sources, self._mixture.too_long, strict=True):
            annotation = source.index.annotation
            for fault in source.index.faults():
                told.append(f"{annotation}, record {fault.record} (id {fault.id or 'none'}): {fault.why}")
            for record in long:
                told.append(
                    f"{annotation}, record {record}: its question alone fills max_length "
                    f"{self._spec.max_length}"
                )
        return told

    def _over(self, faults: list[str], count: int) -> str:
        more = f"\n  and {len(faults) - TOLD} more" if len(faults) > TOLD else ""
        return (
            f"{count} samples cannot be used, and data.bad_samples allows "
            f"{self._spec.bad_samples}:\n  " + "\n  ".join(faults[:TOLD]) + more + "\n"
            "`python data/prepare.py check` lists them all and --fix writes files without them"
        )
