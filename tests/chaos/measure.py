"""What the chaos cost: steps lost by each kind of fault, where the time went, and what a model of goodput says.

The model has the same work, and as many faults; what a save and a restart cost is measured, what an unwarned fault
throws away is not, nor how often is saved: see `modelled`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.files import read_lines
from launch.operating import ledger
from launch.operating.status import State
from launch.record import RunFolder
from tests.chaos.drive import Event, Story
from tests.chaos.world import World, outcome

OTHER = "a fault to another run"  # a job that took that one's nodes had them when this one came


@dataclass(frozen=True)
class Break:
    """A run's change from one attempt to the next."""

    run: str
    time: float  # when the next attempt was ready
    lost: int  # steps that had been logged and were computed again
    causes: tuple[Event, ...]  # the faults that were done to the attempts that ended
    saved: bool = False  # the attempt said that it had been warned, and had saved

    @property
    def warning(self) -> str:
        """What it may lose by: the worst of its causes, unless it heard a warning in time whatever else there was."""
        found = {event.warning for event in self.causes}
        if self.saved:
            return "signalled"
        return "unsignalled" if "unsignalled" in found else "signalled" if "signalled" in found else "none"


def breaks(name: str, folder: RunFolder, events: Sequence[Event]) -> list[Break]:
    """The run's attempts that were ended and gone on from, each with the faults it had.

    A fault belongs to the attempt that it was done to, and one to all runs to those that had a rank then: one may hit
    an attempt that still loads, and end it long after its first step. (A node whose daemon is gone counts as lost
    after half a minute; a quota is met at the next save.)
    """
    found: list[Break] = []
    ready = ""
    launched: dict[str, float] = {}  # attempts, when each had a rank
    before: list[str] = []  # those since the last that was ready, itself included
    said: set[str] = set()  # those that ended by themselves, after a save
    for record in folder.journal:
        attempt, at = str(record.get("attempt", "")), float(record["time"])
        if record["event"] == "launched":
            launched[attempt] = at
            before.append(attempt)
        if record["event"] == "ended":
            said.add(attempt)
        if record["event"] != "start":
            continue
        ended = [one for one in before if one != attempt]
        if record["number"] and ended:
            begun, over = launched[ended[0]], launched.get(attempt, at)
            causes = tuple(
                e
                for e in events
                if e.attempt in ended
                or (e.attempt not in launched and e.run in ("", name) and begun - 2 <= e.time <= over)
            )
            found.append(Break(name, at, int(record["last"]) - int(record["step"]), causes, ready in said))
        before, ready = [attempt], attempt
    return found


def losses(found: Sequence[Break], events: Sequence[Event]) -> list[dict[str, Any]]:
    """A row a kind of fault: how many there were, and the steps lost in the breaks put down to it."""
    rows = []
    for kind in dict.fromkeys([*(event.kind for event in events), OTHER]):
        mine = [e for e in events if e.kind == kind]
        lost = [b.lost for b in found if blamed(b) == kind]
        if kind == OTHER and not lost:
            continue
        rows.append(
            {
                "kind": kind,
                "warning": mine[0].warning if mine else "",
                "events": len(mine),
                "attempts ended": len(lost),
                "steps lost": dict(sorted(Counter(lost).items())),
            }
        )
    return rows


def blamed(one: Break) -> str:
    """The kind of fault that a break is put down to: the last of those that explain it, this run's own first."""
    mine = [e for e in one.causes if e.warning == one.warning]
    named = [e for e in mine if e.run] or mine
    return named[-1].kind if named else OTHER


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


def modelled(work: float, interval: float, stall: float, again: float, unwarned: int) -> float:
    """The share of its time that a run works: `work` seconds of steps, a save after each `interval` of them.

    Saves take `stall` each, and happen only while the run works; `again` seconds go into starts, restarts and the
    evaluation; each of `unwarned` faults costs half an interval, for it comes at any moment of one. For rare faults
    this is 1 - stall/interval - interval/2M - restart/M, with M the time between them (Young, Comm. ACM 17, 1974).
    """
    return work / (work * (1 + stall / interval) + again + unwarned * interval / 2)


def rates(world: World) -> list[str]:
    """Each run of the last stage beside the model, a line each: they had more and fewer faults."""
    lines = []
    for name, _ in world.shape.runs[-world.shape.points :]:
        one = goodput(world, name)
        measured, best = one["measured"], one["model's optimum"]
        words = f"{measured:.1%}, the model's optimum {best:.1%}, {100 * (best - measured):+.2f} points"
        lines.append(f"{name}: an attempt ended every {one['between ends of attempts']:.0f} s: {words}")
    return lines


def goodput(world: World, *names: str) -> dict[str, Any]:
    """Where the allocated time of the runs, of all or these, went; and what the model makes of the same faults."""
    done = State("done")
    chosen = {name: steps for name, steps in world.shape.runs if name in names or not names}
    folders = [world.runs_of(name) for name in chosen]
    costs = [ledger.of(folder, done) for folder in folders]
    seconds = {part: sum(cost.seconds[part] for cost in costs) for part in ledger.PARTS}
    allocated = sum(cost.allocated for cost in costs)
    saves, attempts, unwarned = 0, 0, 0
    for folder in folders:
        journal = folder.journal
        saves += sum(record["event"] == "saved" for record in journal)
        attempts += len(ledger.attempts(journal))
        ready = [record["attempt"] for record in journal if record["event"] == "start"]
        said = {record["attempt"] for record in journal if record["event"] == "ended"}
        unwarned += sum(attempt not in said for attempt in ready[:-1])  # nothing was saved at their end
    stall = seconds["save"] / max(1, saves)
    again = seconds["start"] + seconds["load"] + seconds["lost"] + seconds["eval"]
    work = seconds["train"]
    interval = world.shape.save_every * work / sum(chosen.values())
    best = (2 * stall * work / unwarned) ** 0.5 if unwarned and stall else interval
    measured = work / allocated
    model, optimum = (modelled(work, every, stall, again, unwarned) for every in (interval, best))
    return {
        "seconds": {part: round(value, 1) for part, value in seconds.items()},
        "allocated": round(allocated, 1),
        "measured": round(measured, 4),
        "model": round(model, 4),
        "model's optimum": round(optimum, 4),
        "points under the optimum": round(100 * (optimum - measured), 2),
        "a save": round(stall, 3),
        "a restart": round((again - seconds["eval"]) / max(1, attempts), 2),
        "an interval": round(interval, 2),
        "the best interval": round(best, 2),
        "between ends of attempts": round(allocated / max(1, attempts - len(folders)), 1),
        "attempts": attempts,
        "ended without a save": unwarned,
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
