"""What the chaos cost: steps lost by each kind of fault, where the time went, and what a model of goodput says.

The model is that of the ledger's words: of the allocated time, saves cost their share, and each fault that ends
an attempt costs the restart, and half an interval where nothing was saved on a warning. (Young, Comm. ACM 17, 1974;
the interval is the save's own.)
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.operating import ledger
from launch.operating.status import State
from launch.record import RunFolder, read_lines
from tests.chaos.drive import Event, Story
from tests.chaos.world import World, outcome


@dataclass(frozen=True)
class Break:
    """A run's change from one attempt to the next."""

    run: str
    time: float  # when the next attempt was ready
    lost: int  # steps that had been logged and were computed again
    causes: tuple[Event, ...]  # the faults between the two beginnings that can have been at work

    @property
    def warning(self) -> str:
        """The least kind of the causes."""
        found = {event.warning for event in self.causes}
        return "unsignalled" if "unsignalled" in found else "signalled" if "signalled" in found else "none"


def breaks(name: str, folder: RunFolder, events: Sequence[Event]) -> list[Break]:
    """The run's attempts that were ended and gone on from, each with the faults it had."""
    found = []
    begun = 0.0
    for record in folder.journal:
        if record["event"] == "launched" and not begun:
            begun = float(record["time"])
        if record["event"] != "start":
            continue
        ready = float(record["time"])
        if record["number"]:
            causes = tuple(e for e in events if e.run in ("", name) and begun - 2 <= e.time <= ready)
            found.append(Break(name, ready, int(record["last"]) - int(record["step"]), causes))
        begun = ready
    return found


def losses(found: Sequence[Break], events: Sequence[Event]) -> list[dict[str, Any]]:
    """A row a kind of fault: how many there were, and the steps lost in the breaks put down to it."""
    rows = []
    for kind in dict.fromkeys(event.kind for event in events):
        mine = [e for e in events if e.kind == kind]
        lost = [b.lost for b in found if blamed(b) == kind]
        rows.append(
            {
                "kind": kind,
                "warning": mine[0].warning,
                "events": len(mine),
                "attempts ended": len(lost),
                "steps lost": dict(sorted(Counter(lost).items())),
            }
        )
    return rows


def blamed(one: Break) -> str:
    """The kind of fault that a break is put down to: the last of the worst."""
    order = ("none", "signalled", "unsignalled")
    worst = max((order.index(e.warning) for e in one.causes), default=-1)
    mine = [e for e in one.causes if order.index(e.warning) == worst]
    named = [e for e in mine if e.run] or mine
    return named[-1].kind if named else ""


def over_the_bound(found: Sequence[Break], interval: int) -> list[Break]:
    """Breaks that lost more than they may: a step after a warning, else an interval."""
    return [b for b in found if b.lost > (1 if b.warning == "signalled" else interval)]


def differences(calm: World, disturbed: World) -> list[str]:
    """In what the disturbed runs are not those of the calm world, to the bit; in words."""
    found = []
    for name, steps in disturbed.shape.runs:
        theirs, ours = outcome(calm.runs_of(name)), outcome(disturbed.runs_of(name))
        found += [f"{name}: {key} differs" for key in theirs if theirs[key] != ours[key]]
        numbers = [row["step"] for row in read_lines(disturbed.runs_of(name).metrics_file)]
        if numbers != list(range(1, steps + 1)):
            found.append(f"{name}: its rows are not steps 1 to {steps}, each once")
    return found


def goodput(world: World) -> dict[str, Any]:
    """Where the allocated time of all runs went, and what the model makes of the same saves, restarts and faults."""
    done = State("done")
    costs = [ledger.of(folder, done) for folder in world.folders.values()]
    seconds = {part: sum(cost.seconds[part] for cost in costs) for part in ledger.PARTS}
    allocated = sum(cost.allocated for cost in costs)
    took, saves, ends, unwarned = [], 0, 0, 0
    for folder in world.folders.values():
        rows = [float(row["step_seconds"]) for row in read_lines(folder.metrics_file)]
        took.append(statistics.median(rows) if rows else 0.0)
        journal = folder.journal
        saves += sum(record["event"] == "saved" for record in journal)
        starts = [record for record in journal if record["event"] == "start" and record["number"]]
        launched = sum(record["event"] == "launched" for record in journal) - 1
        ends += max(launched, len(starts))
        unwarned += sum(record["last"] > record["step"] for record in starts)
    step = statistics.median(took)
    interval = world.shape.save_every * step
    stall = seconds["save"] / max(1, saves)
    attempts = ends + len(world.folders)
    restart = (seconds["start"] + seconds["load"] + seconds["lost"]) / max(1, attempts)
    once = (restart * len(world.folders) + seconds["eval"]) / allocated  # a run without faults starts, too
    between = allocated / max(1, ends)
    model = 1 - once - stall / interval - (restart + unwarned / max(1, ends) * interval / 2) / between
    measured = seconds["train"] / allocated
    return {
        "seconds": {part: round(value, 1) for part, value in seconds.items()},
        "allocated": round(allocated, 1),
        "measured": round(measured, 4),
        "model": round(model, 4),
        "difference in points": round(100 * (measured - model), 2),
        "a save": round(stall, 3),
        "a restart": round(restart, 2),
        "an interval": round(interval, 2),
        "between faults": round(between, 1),
        "attempts": attempts,
    }


def tracked(world: World) -> dict[str, Any]:
    """What W&B has of the runs, after a sync: how many runs, and steps that are there twice or not at all."""
    server = world.wandb
    if server is None:
        return {}
    runs = list(server.runs.values())
    wrong = {}
    expected = {
        folder.run.get("id"): steps
        for (_, steps), folder in zip(world.shape.runs, world.folders.values(), strict=True)
    }
    for run in runs:
        steps = [step for step in run.steps if step > 0]
        if steps != list(range(1, expected.get(run.name, 0) + 1)):
            wrong[run.name] = f"{len(steps)} rows, {len(set(steps))} steps of {expected.get(run.name)}"
    return {"runs": len(runs), "of": len(expected), "with steps missing or twice": wrong}


def table(story: Story, rows: Sequence[dict[str, Any]]) -> str:
    """The table of the losses."""
    head = ("fault", "warning", "events", "attempts ended", "steps lost: how often")
    lines = [head]
    for row in rows:
        lost = ", ".join(f"{steps}: {n}x" for steps, n in row["steps lost"].items()) or "-"
        lines.append((row["kind"], row["warning"], str(row["events"]), str(row["attempts ended"]), lost))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )
