"""Where a run's time went: queue, start, load, train, replay, save, eval, lost; and its GPU-hours.

From the journal and metrics.jsonl alone. What is allocated is train (steps that are kept), replay (steps
that were computed and thrown away, because a later attempt began before them), save (what the step after a
save took beyond the median step, and the last save of an attempt), load (imports, rendezvous, model, data),
start (from SLURM's start to the ranks, where SLURM tells it), eval, and what is left over: lost, to hangs,
teardown and failures. Waiting in the queue comes on top of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from launch.files import read_lines
from launch.operating.status import State
from launch.record import RunFolder

ALLOCATED = ("start", "load", "train", "replay", "save", "eval", "lost")
PARTS = ("queue", *ALLOCATED)


@dataclass
class Ledger:
    """One run's time by what it went into, in seconds of the whole run, not of each GPU."""

    gpu_hours: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    @property
    def allocated(self) -> float:
        return sum(self.seconds[part] for part in ALLOCATED)

    @property
    def goodput(self) -> float | None:
        """The share of the allocated time in which steps were computed that are kept."""
        return self.seconds["train"] / self.allocated if self.allocated else None

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "gpu_hours": round(self.gpu_hours, 4),
            "goodput": None if self.goodput is None else round(self.goodput, 4),
            "seconds": {part: round(value, 3) for part, value in self.seconds.items()},
        }


class Row(NamedTuple):
    """A step that is kept: when it ended, and the seconds it took, a blocking save before it included."""

    time: float
    step: int
    seconds: float


@dataclass
class Attempt:
    """What the journal and the metrics say of one attempt; times in seconds since 1970, 0 for never."""

    name: str
    waited_from: float  # when it was asked for
    job: float = 0.0  # when SLURM started it
    launched: float = 0.0  # when its ranks were
    start: float = 0.0  # when they were ready for the first step
    step: int = 0  # the step it started from
    world: int = 0
    before: float = 0.0  # when the last row before it was written, as it found it
    evaluating: float = 0.0
    ended: float = 0.0
    seen: float = 0.0  # its last sign of life
    saves: dict[int, float] = field(default_factory=dict)  # step: when it was safe

    @property
    def begin(self) -> float:
        return self.job or self.launched or self.start

    @property
    def end(self) -> float:
        return max(self.ended, self.seen)


def attempts(journal: Sequence[dict[str, Any]]) -> list[Attempt]:
    """The journal's attempts, oldest first; those that never came as far as a rank are left out."""
    found: dict[str, Attempt] = {}
    waited_from = 0.0
    for record in journal:
        event, at, name = record["event"], float(record["time"]), record.get("attempt")
        if event == "submitting":
            waited_from = at
        if not name:
            continue
        if name not in found:
            if event not in ("launched", "start"):
                continue
            found[name] = Attempt(name, waited_from)
        one = found[name]
        one.seen = at
        if event == "launched":
            one.launched, one.job = at, float(record.get("job_started") or 0.0)
        elif event == "start":
            one.start, one.step = at, int(record.get("step", 0))
            one.world, one.before = int(record.get("world", 0)), float(record.get("last_time") or 0.0)
        elif event == "saved":
            one.saves[int(record["step"])] = at
        elif event == "evaluating":
            one.evaluating = at
        elif event in ("ended", "verdict"):
            one.ended = waited_from = at
    return list(found.values())


def of(folder: RunFolder, state: State) -> Ledger:
    """The run's ledger so far."""
    spec = folder.spec
    gpus = int(spec.get("gpus") or 0) if (spec.get("cluster") or {}).get("device") == "cuda" else 0
    rows = [
        Row(float(row.get("time") or 0.0), int(row.get("step") or 0), float(row.get("step_seconds") or 0.0))
        for row in read_lines(folder.metrics_file)
    ]
    return settle(attempts(folder.journal), rows, state, gpus, time.time(), _asked(folder))


def _asked(folder: RunFolder) -> float:
    record = folder.last("submitting", "verdict")
    return float(record["time"]) if record else 0.0


def settle(
    found: Sequence[Attempt],
    rows: Sequence[Row],
    state: State,
    gpus: int,
    now: float,
    asked: float = 0.0,
) -> Ledger:
    """The ledger of attempts and rows; `asked`: when the next attempt was asked for, if one waits."""
    ledger = Ledger()
    for i, one in enumerate(found):
        after = found[i + 1] if i + 1 < len(found) else None
        inside = [row for row in rows if one.begin <= row.time and (after is None or row.time < after.begin)]
        end = max([one.end, *(row.time for row in inside)])
        if after is None and state.name == "running":
            end = now
        elif after and after.before > one.begin:
            end = max(end, after.before)
        took = {
            "start": max(0.0, one.launched - one.job) if one.job and one.launched else 0.0,
            "load": max(0.0, (one.start or end) - (one.launched or one.begin)),
            "train": sum(row.seconds for row in inside) - (waited := _waited(one, inside)),
            "save": waited + _last_save(one, inside, after),
            "eval": max(0.0, (one.ended or end) - one.evaluating) if one.evaluating else 0.0,
            "replay": _replayed(one, after),
        }
        whole = end - one.begin
        took["lost"] = max(0.0, whole - sum(took.values()))
        for part, seconds in took.items():
            ledger.seconds[part] += seconds
        ledger.seconds["queue"] += max(0.0, one.begin - one.waited_from) if one.waited_from else 0.0
        ledger.gpu_hours += max(0.0, whole) * gpus / 3600
    if state.name in ("queued", "waiting", "held", "blocked") and asked:
        ledger.seconds["queue"] += max(0.0, now - asked)
    return ledger


def _waited(one: Attempt, rows: Sequence[Row]) -> float:
    """Seconds that steps took longer because a save came before them."""
    if not rows:
        return 0.0
    usual = statistics.median(row.seconds for row in rows)
    return sum(max(0.0, row.seconds - usual) for row in rows if row.step - 1 in one.saves)


def _last_save(one: Attempt, rows: Sequence[Row], after: Attempt | None) -> float:
    """Seconds of the save after an attempt's last step."""
    last = max((row.time for row in rows), default=0.0)
    last = max(last, after.before if after and after.before > one.begin else 0.0)
    saved = max((at for at in one.saves.values() if last and at > last), default=0.0)
    return max(0.0, saved - last)


def _replayed(one: Attempt, after: Attempt | None) -> float:
    """Seconds of an attempt's steps that the next attempt computes again."""
    if after is None or not after.start or after.before <= one.begin:
        return 0.0
    kept = [at for step, at in one.saves.items() if step <= after.step]
    since = max(kept, default=one.start)
    return max(0.0, after.before - since) if since else 0.0


def columns(costs: Sequence[Ledger]) -> list[tuple[str, ...]]:
    """The head, a row a ledger, and a row for all together."""
    every = Ledger(sum(cost.gpu_hours for cost in costs))
    every.seconds = {part: sum(cost.seconds[part] for cost in costs) for part in PARTS}
    return [("GPU-h", "goodput", *PARTS), *(_cells(cost) for cost in (*costs, every))]


def _cells(cost: Ledger) -> tuple[str, ...]:
    goodput = "-" if cost.goodput is None else f"{cost.goodput:.1%}"
    return (f"{cost.gpu_hours:,.1f}", goodput, *(brief(cost.seconds[part]) for part in PARTS))


def brief(seconds: float) -> str:
    """12s, 4m10s, 3h05m, 2d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    hours, days = whole // 3600, whole // 86400
    return f"{hours}h{whole % 3600 // 60:02}m" if whole < 86400 else f"{days}d{hours % 24:02}h"
