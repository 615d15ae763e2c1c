"""list, status and wait: what state the runs are in, with one squeue and at most one sacct."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch import cluster
from launch.batches import Batches
from launch.exits import FAILED, NO_SLURM, OK
from launch.operating import ledger, shared
from launch.operating.address import name
from launch.operating.status import OPEN, State, job_of, judge
from launch.operating.survey import Facts, survey
from launch.record import RunFolder
from launch.recovery import avoid, limbo


@dataclass(frozen=True)
class Line:
    """One run in a table."""

    folder: RunFolder
    name: str
    facts: Facts
    state: State
    batch: str  # SLURM's id of the array; empty on this machine, and before the first submission

    @property
    def short(self) -> str:
        """The name without the last part where there is no sweep."""
        return self.name.removesuffix("/run")


@dataclass(frozen=True)
class Look:
    """Runs at one moment."""

    lines: list[Line]
    queue: Mapping[str, cluster.Job] | None  # None where SLURM was not needed or not heard
    why: str  # SLURM was needed and not heard; empty otherwise


def look(chosen: Sequence[RunFolder], root: Path, *, accounting: bool = True, age: float = 0.0) -> Look:
    """The runs' states, with at most one squeue and one sacct; the queue may be `age` s old, where others asked."""
    every = survey(chosen, root)
    batches = Batches()
    asked = [f for f in every if f.done is None and f.batch and "pid" not in batches[f.batch]]
    queue, why = None, ""
    if asked:
        try:
            queue = shared.jobs(root, age)
        except cluster.SlurmError as error:
            why = str(error)
    lines = []
    for folder, facts in zip(chosen, every, strict=True):
        batch = job_of(batches[facts.batch], queue) if facts.batch else ""
        lines.append(Line(folder, name(folder, root), facts, judge(facts, queue, batches), batch))
    return Look(_past(lines) if accounting and queue is not None else lines, queue, why)


def _past(lines: list[Line]) -> list[Line]:
    """What accounting, where there is any, says of those that left the queue without a word."""
    silent = {
        f"{line.batch}_{line.facts.element}": i
        for i, line in enumerate(lines)
        if line.state.name == "stopped" and "without a verdict" in line.state.reason and line.batch
    }
    for id, rows in cluster.past(list(silent)).items():
        if id in silent:
            line, last = lines[silent[id]], rows[-1]
            if last.state == "CANCELLED":
                state = replace(line.state, name="cancelled", reason=f"by user {last.by} with scancel")
            else:
                words = f"it left the queue without a verdict (accounting says {last.state})"
                state = replace(line.state, reason=words)
            lines[silent[id]] = replace(line, state=state)
    return lines


def list_(chosen: Sequence[RunFolder], options: argparse.Namespace) -> int:
    """Print the names."""
    names = [name(folder, options.runs) for folder in chosen]
    if names or options.json:
        print(json.dumps(names) if options.json else "\n".join(names))
    else:
        print(nothing(options), file=sys.stderr)
    return OK


def nothing(options: argparse.Namespace) -> str:
    """What is said where there are no runs."""
    return f"no runs in {options.runs}; `python launch/submit.py SPEC` makes some"


def status(chosen: Sequence[RunFolder], options: argparse.Namespace) -> int:
    """Print the table, once or again and again."""
    while True:
        seen = look(chosen, options.runs, age=options.every / 2 if options.watch else 0.0)
        lines, why = seen.lines, seen.why
        costs = [ledger.of(line.folder, line.state) for line in lines] if options.cost else []
        if options.json:
            print(_json(lines, costs))
        else:
            if options.watch and sys.stdout.isatty():
                print("\x1b[H\x1b[2J", end="")
            print(render(lines, costs) if lines else nothing(options), flush=True)
            for text in avoid.words(options.runs):
                print(text)
        if why:
            print(f"warning: SLURM: {why}", file=sys.stderr)
        if not options.watch or all(line.state.name not in OPEN for line in lines):
            break
        limbo.look(options.runs)
        time.sleep(options.every)
    if options.exit_code and any(line.state.name != "done" for line in lines):
        return NO_SLURM if why else FAILED
    return OK


def _json(lines: Sequence[Line], costs: Sequence[ledger.Ledger]) -> str:
    rows = []
    for i, line in enumerate(lines):
        row = {"run": line.name, "id": line.facts.id, "stage": line.facts.stage, **vars(line.state)}
        if costs:
            row["cost"] = costs[i].plain()
        rows.append(json.dumps(row))
    return "[\n" + ",\n".join(rows) + "\n]"


def render(lines: Sequence[Line], costs: Sequence[ledger.Ledger] = ()) -> str:
    """The status table, and with `costs` what each run has used and for what."""
    rows: list[tuple[str, ...]] = [("run", "stage", "state", "step", "loss", "attempts", "job", "")]
    for line in lines:
        state = line.state
        rows.append(
            (
                line.short,
                line.facts.stage,
                state.name,
                f"{state.step}/{state.steps}" if state.steps else "-",
                f"{state.loss:.3f}" if state.loss is not None else "-",
                str(state.attempts),
                state.job or "-",
                state.reason if state.name != "done" else "",
            )
        )
    if costs:
        head, *cells = ledger.columns(costs)
        rows[0] = (*rows[0][:6], *head)
        rows[1:] = [(*row[:6], *cell) for row, cell in zip(rows[1:], cells[:-1], strict=True)]
        rows.append(("all", "", "", "", "", "", *cells[-1]))
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def wait(chosen: Sequence[RunFolder], options: argparse.Namespace) -> int:
    """Wait until no run is open; runs that SLURM does not answer for are waited for."""
    end = time.monotonic() + options.timeout if options.timeout else float("inf")
    told = ""
    while True:
        limbo.look(options.runs)
        seen = look(chosen, options.runs, age=options.every / 2)
        lines, why = seen.lines, seen.why
        if why and why != told:
            print(f"warning: SLURM: {why}; asking again every {options.every:g} s", file=sys.stderr)
        told = why
        if not why and all(line.state.name not in OPEN for line in lines):
            break
        if time.monotonic() > end:
            print(f"error: not over after {options.timeout:g} s", file=sys.stderr)
            break
        time.sleep(min(options.every, max(0.1, end - time.monotonic())))
    left = [line for line in lines if line.state.name != "done"]
    if options.json:
        print(_json(lines, ()))
    elif left:
        print(render(left))
    return NO_SLURM if why else FAILED if left else OK
