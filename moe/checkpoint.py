"""Save and restore training, by all ranks at once, on this layout or another.

Each rank writes one file of what it alone holds of the optimizer and one of its cut of the frozen weights,
as plain bytes, and an index of which tensor's which range lies where. Restoring asks for ranges of tensors
by name, so world size, expert groups and ZeRO stage may differ; on the same layout the ranges are those
written, and a file is read in one go into place. Trainable weights are kept in fp32 alone: what the model
computes with is their rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from moe import randomness, storage
from moe.fragments import weights
from moe.parallel import Groups
from moe.pieces import Index, uncollected
from moe.reading import fill
from moe.saving import Guard, Save, Written
from moe.storage import Checkpoint, CheckpointError, Damaged, describe

if TYPE_CHECKING:
    from moe.engine import Engine

__all__ = ["Checkpoint", "CheckpointError", "Checkpoints", "describe", "load_weights"]

log = logging.getLogger("moe.checkpoint")
T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run. Every method but `ready` is collective; a failure raises on every rank.

    `faults` says what was wrong with checkpoints that `latest` had to pass over.
    """

    def __init__(self, folder: Path, groups: Groups, keep: int = 2) -> None:
        self.folder, self.groups, self.keep = Path(folder), groups, max(1, keep)
        self.faults: list[str] = []
        self._save: Save | None = None
        self._began = 0.0
        self._staging: torch.Tensor | None = None
        self._removal: threading.Thread | None = None
        self._frozen: list[Written] = []  # frozen files of this engine's last two saves
        self._engine: Engine | None = None

    # --- saving ---

    def save(
        self, step: int, engine: Engine, extra: dict[str, Any], *, guard: Guard | None = None
    ) -> Checkpoint:
        """Save and wait until it is complete.

        `guard` is called on rank 0 when all is written, just before the checkpoint gets its name: what it
        raises undoes the save and is raised, so that an attempt which lost its lease changes nothing. Raises
        CheckpointError for a full disk and the like; earlier checkpoints are as they were.
        """
        self._begin(step, engine, extra, guard, background=False)
        checkpoint = self.settle()
        self._removed()
        assert checkpoint is not None
        return checkpoint

    def begin(self, step: int, engine: Engine, extra: dict[str, Any], *, guard: Guard | None = None) -> None:
        """Copy the state aside and write it in the background; `settle` completes it. One save at a time."""
        self._begin(step, engine, extra, guard, background=True)

    def ready(self) -> bool:
        """Whether a save is under way whose part on this rank is written; `settle` will then not wait for
        it.
        """
        return self._save is not None and self._save.done()

    @property
    def saving(self) -> bool:
        """Whether a save was begun and not yet settled."""
        return self._save is not None

    def settle(self) -> Checkpoint | None:
        """Wait for the save under way, and complete it; None when there is none."""
        save, self._save = self._save, None
        if save is None:
            return None
        began = self._began
        files, error = save.wait()
        reports = self._gather((files, error))
        outcome: tuple[Checkpoint | None, str] = (None, "")
        own: BaseException | None = None
        if self.groups.rank == 0:
            try:
                outcome = (self._commit(save, reports), "")
            except BaseException as raised:
                own = raised
                storage.remove([save.partial])
                outcome = (None, str(raised))
        checkpoint, words = self._from_first(outcome)
        if own is not None:
            raise own
        if checkpoint is None:
            raise CheckpointError(words)
        if save.frozen is not None:
            self._frozen = [*self._frozen, (checkpoint.path / save.frozen[0], *save.frozen[1:])][-2:]
        return dataclasses.replace(checkpoint, seconds=time.monotonic() - began)

    def _begin(
        self, step: int, engine: Engine, extra: dict[str, Any], guard: Guard | None, *, background: bool
    ) -> None:
        self.settle()
        self._began = time.monotonic()
        self._removed()
        if engine is not self._engine:
            self._engine, self._frozen = engine, []
        begun: tuple[Path | None, str] = (None, "")
        if self.groups.rank == 0:
            try:
                json.dumps(extra, allow_nan=False)
                begun = (storage.start(self.folder, step), "")
            except (TypeError, ValueError) as error:
                begun = (None, f"{storage.folder_name(step)} was not saved: `extra` is not JSON ({error}).")
            except OSError as error:
                begun = (None, self._refusal(step, [f"rank 0: {error}"]))
        partial, words = self._from_first(begun)
        if partial is None:
            raise CheckpointError(words)
        self._save = Save(
            step,
            engine,
            extra,
            guard,
            partial,
            background=background,
            staging=self._staging,
            earlier=self._frozen[0] if len(self._frozen) == 2 else None,
        )
        self._staging = self._save.staging

    def _commit(self, save: Save, reports: list[tuple[dict[str, Any], str]]) -> Checkpoint:
        bad = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(reports) if error]
        if bad:
            if save.guard is not None:
                save.guard()  # a later attempt removes what this one writes: no fault of the disk's
            raise CheckpointError(self._refusal(save.step, bad))
        files: dict[str, Any] = {}
        for written, _ in reports:
            files |= written
        try:
            storage.seal(save.partial, {**save.record, "files": files})
            if save.guard is not None:
                save.guard()
            checkpoint = storage.publish(save.partial, save.step)
        except OSError as error:
            raise CheckpointError(self._refusal(save.step, [f"rank 0: {error}"])) from None
        with contextlib.suppress(OSError):  # what is too many stays until the next save
            doomed = storage.prune(self.folder, checkpoint, self.keep)
            self._removal = threading.Thread(target=storage.remove, args=(doomed,), daemon=True)
            self._removal.start()
        return checkpoint

    def _removed(self) -> None:
        """Wait until the files of checkpoints no longer kept are gone: their room may be needed."""
        if self._removal is not None:
            self._removal.join()
            self._removal = None

    def _refusal(self, step: int, reasons: list[str]) -> str:
        standing = next(iter(storage.found(self.folder)), None)
        newest = f"{standing.path.name} is still the newest" if standing else "there is no earlier one"
        free = ""
        with contextlib.suppress(OSError):
            room = os.statvfs(self.folder)
            free = f" ({room.f_bavail * room.f_frsize / 1e9:.1f} GB are free there)"
        return (
            f"{storage.folder_name(step)} was not saved under {self.folder}{free}: {'; '.join(reasons)}. "
            f"Earlier checkpoints are untouched: {newest}. If the disk or quota is full, make room or lower "
            f"train.keep ({self.keep}; one more is on disk during a save), then submit again."
        )

    # --- finding and restoring ---

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose every byte is as written; the ranks share the reading.

        One that is torn or corrupt is passed over, renamed aside, logged, and named in `faults`.
        """
        for checkpoint, record in self._candidates():
            names = sorted(record["files"])
            wrong = storage.faults(checkpoint.path, record, names[self.groups.rank :: self.groups.world])
            if not self._pass_over(checkpoint, wrong):
                return checkpoint
        return None

    def newest(self, upto: int | None = None) -> Checkpoint | None:
        """As `latest`, but the contents are not read: `resume` checks them as it loads them."""
        return next((checkpoint for checkpoint, _ in self._candidates(upto)), None)

    def resume(self, engine: Engine, upto: int | None = None) -> tuple[Checkpoint, dict[str, Any]] | None:
        """Restore the newest checkpoint whose bytes are as written: (it, what `save` was given as extra).

        As `latest` and `restore` together, and each byte is read once. Where the run's history ends at step `upto`,
        a checkpoint of a later step is taken only if no other can be. None when there is none; the engine's
        state is then undefined if there had been one. Raises CheckpointError as `restore` does.
        """
        for checkpoint, record in self._candidates(upto):
            try:
                return checkpoint, self._restore(checkpoint, record, engine)
            except Damaged as damage:
                self._pass_over(checkpoint, [str(damage)])
        return None

    def restore(self, checkpoint: Checkpoint, engine: Engine) -> dict[str, Any]:
        """Bring the engine to the checkpoint's state, whatever layout wrote it; what `save` was given as
        extra.

        Random states are each rank's own on the same number of ranks, else drawn from the first's. Raises
        CheckpointError when the checkpoint is of another model, or trained other parameters, or is not as written.
        """
        return self._restore(checkpoint, None, engine)

    def _candidates(self, upto: int | None = None) -> Iterator[tuple[Checkpoint, dict[str, Any]]]:
        """Checkpoints whose files are there in their sizes, newest first, those after `upto` last; others are passed
        over.
        """
        found: list[Checkpoint] = []
        if self.groups.rank == 0:
            storage.recover(self.folder)
            found = storage.found(self.folder)
            if upto is not None:
                found.sort(key=lambda checkpoint: checkpoint.step > upto)  # newest first still, in each part
        for checkpoint in self._from_first(found):
            wrong: list[str] = []
            record: dict[str, Any] = {}
            try:
                record = describe(checkpoint.path)
            except CheckpointError as error:
                wrong = [str(error)]
            if not self._pass_over(checkpoint, wrong):
                yield checkpoint, record

    def _pass_over(self, checkpoint: Checkpoint, wrong: list[str]) -> bool:
        """Whether any rank found a checkpoint wrong; it is then set aside, and `faults` says why."""
        wrong = sorted({fault for faults in self._gather(wrong) for fault in faults})
        if not wrong:
            return False
        words = f"{checkpoint.path.name} is passed over: {'; '.join(wrong)}"
        self.faults.append(words)
        if self.groups.rank == 0:
            log.warning("%s", words)
            storage.set_aside(checkpoint.path)
        return True

    def _restore(
        self, checkpoint: Checkpoint, record: dict[str, Any] | None, engine: Engine
    ) -> dict[str, Any]:
        error, damaged, found = "", False, record or {}
        try:
            found = record or describe(checkpoint.path)
            with uncollected():
                fill(engine.fragments(), Index.read(checkpoint.path, found), strict=True)
            random = self._random_state(checkpoint.path, found)
        except (CheckpointError, OSError) as raised:
            error, damaged = str(raised), isinstance(raised, (Damaged, OSError))
        said = [(words, bad) for words, bad in self._gather((error, damaged)) if words]
        if said:
            words = "; ".join(sorted({words for words, _ in said}))
            kind = Damaged if all(bad for _, bad in said) else CheckpointError
            raise kind(f"{checkpoint.path} cannot be restored: {words}" if record is None else words)
        engine.updates, engine.step = found["updates"], found["step"]
        randomness.restore(random, engine.step, self.groups.rank)
        engine.refresh()
        extra: dict[str, Any] = found["extra"]
        return extra

    def _random_state(self, path: Path, record: dict[str, Any]) -> dict[str, Any]:
        same = record["world"] == self.groups.world
        rank = self.groups.rank if same else 0
        name = f"random_{rank:05d}.json"
        if wrong := storage.faults(path, record, [name]):
            raise Damaged(wrong[0])
        state: dict[str, Any] = json.loads((path / name).read_text())
        return state | {"own": same}

    # --- all ranks ---

    def _gather(self, value: Any) -> list[Any]:
        if self.groups.world == 1:
            return [value]
        values: list[Any] = [None] * self.groups.world
        dist.all_gather_object(values, value, group=self.groups.control)
        return values

    def _from_first(self, value: T) -> T:
        if self.groups.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.groups.control)
        return values[0]


def load_weights(path: Path, vlm: nn.Module, groups: Groups) -> None:
    """Fill a model with a checkpoint's weights: any world size and expert groups, no optimizer.

    Raises CheckpointError when a parameter is missing there or has another shape.
    """
    path = Path(path)
    fill(weights(vlm, groups), Index.read(path, describe(path)), strict=False)
