"""The loop: steps, what they report, when they are saved, and how all ranks stop at the same one.

A stop is asked for by any rank (a signal has set its flag) and agreed on between steps by one small
all-reduce; all then save the same step. There is no clean-up that waits for other ranks: after a fault they
are not there.
"""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from moe.checkpoint import Checkpoint, Checkpoints
from moe.engine import DivergedError, Engine
from moe.parallel import Groups
from moe.spec import TrainSpec


class Tracker(Protocol):
    """Where numbers and checkpoints are recorded."""

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        """Record what step number `step` (the first is 1) measured."""

    def publish(self, checkpoint: Checkpoint) -> None:
        """Record that a checkpoint is complete."""

    def finish(self, outcome: str) -> None:
        """Record how it ended: finished, preempted or failed. The caller of `fit` says so: it sees faults
        too.
        """


class Loader(Protocol):
    """What the loop needs of data.loader.Loader."""

    def steps(self) -> Iterator[list[dict[str, Tensor]]]:
        """One item an optimizer step: this rank's micro-batches."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step taken from `steps`, as JSON."""


class Outcome(enum.Enum):
    """How a run's attempt ended; faults raise."""

    FINISHED = "finished"
    PREEMPTED = "preempted"


class Trainer:
    """Steps `start_step` to `total_steps` of a run. Its hooks, on every rank:

    `should_stop` is asked once a step; `heartbeat` is told what the rank begins: (data, step, agree or save, the step's
    number); `guard`: see Checkpoints.save. A
    checkpoint's extra is {"loader": the loader's state}.
    """

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        checkpoints: Checkpoints,
        tracker: Tracker,
        should_stop: Callable[[], bool],
        spec: TrainSpec,
        groups: Groups,
        *,
        start_step: int,
        total_steps: int,
        heartbeat: Callable[[str, int], None] | None = None,
        guard: Callable[[], None] | None = None,
    ) -> None:
        self.engine, self.loader, self.checkpoints, self.tracker = engine, loader, checkpoints, tracker
        self.should_stop, self.spec, self.groups = should_stop, spec, groups
        self.start_step, self.total_steps = start_step, total_steps
        self.heartbeat, self.guard = heartbeat or _silent, guard
        self.saved = start_step  # the newest step a checkpoint was begun for; the one resumed from has one

    def fit(self) -> Outcome:
        """Train, and leave a complete checkpoint of the last step."""
        try:
            return self._fit()
        except DivergedError as error:
            newest = f"The newest checkpoint, step {self.saved}, is from before that." if self.saved else ""
            raise DivergedError(f"{error} {newest}".rstrip()) from None

    def _fit(self) -> Outcome:
        batches = self.loader.steps()
        began = time.perf_counter()
        for step in range(self.start_step + 1, self.total_steps + 1):
            self.heartbeat("data", step)
            micro_batches = next(batches)
            self.heartbeat("step", step)
            measured = self.engine.train_step(micro_batches)
            self.heartbeat("agree", step)
            ended = time.perf_counter()
            if step % self.spec.log_every == 0 or step == self.total_steps:
                self.tracker.log(step, _with_speed(measured, ended - began))
            began = ended  # what follows is part of the next step's time: a save that blocks shows
            stop, unwritten = self.groups.agree(
                self.should_stop(), self.checkpoints.saving and not self.checkpoints.ready()
            )
            if self.checkpoints.saving and not unwritten:
                self._settle()
            if step == self.total_steps:
                if self.spec.diverged_after and not math.isfinite(measured["ce"]):
                    raise DivergedError(f"The last step's loss is {measured['ce']}: nothing is handed on.")
                break
            if stop:
                if not self.engine.bad:
                    self._save(step, wait=True)
                return Outcome.PREEMPTED
            if step % self.spec.save_every == 0 and not self.engine.bad:  # what may be broken is never saved
                self._save(step, wait=not self.spec.save_async)
        self._save(self.total_steps, wait=True)
        return Outcome.FINISHED

    def _save(self, step: int, *, wait: bool) -> None:
        self._settle()
        if step <= self.saved:
            return
        self.heartbeat("save", step)
        save = self.checkpoints.save if wait else self.checkpoints.begin
        checkpoint = save(step, self.engine, {"loader": self.loader.state_dict()}, guard=self.guard)
        self.saved = step
        if checkpoint is not None:
            self.tracker.publish(checkpoint)

    def _settle(self) -> None:
        if self.checkpoints.saving:
            self.heartbeat("save", self.engine.step)
        checkpoint = self.checkpoints.settle()
        if checkpoint is not None:
            self.tracker.publish(checkpoint)


def _silent(phase: str, step: int) -> None:
    """The heartbeat of a run that nobody watches."""


def _with_speed(measured: dict[str, Any], seconds: float) -> dict[str, Any]:
    return {
        **measured,
        "step_seconds": seconds,
        "samples_per_second": measured["samples"] / seconds,
        "tokens_per_second": measured["tokens"] / seconds,
    }
