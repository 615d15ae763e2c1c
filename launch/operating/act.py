"""cancel, requeue and throttle: what changes runs that SLURM, or this machine, already has.

Each names what it will touch before it does, asks when that is more than one run, and notes in the journal
who asked, so that `explain` can say it later.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from launch import cluster
from launch.arrays import named, shares
from launch.exits import FAILED, NO_SLURM, OK, USAGE
from launch.operating.logs import complain
from launch.operating.show import Line, Look, look
from launch.operating.status import children
from launch.record import RunFolder, note_all
from launch.recovery import lifeline, successor

REQUEUED = "requeued; SLURM lets it start after about two minutes"
ENDABLE = ("running", "queued", "waiting", "held", "blocked")


def agreed(lines: Sequence[Line], verb: str, options: argparse.Namespace) -> bool | None:
    """Name the runs; whether to go on, None where nobody is there to say so."""
    for line in lines:
        where = f"  {line.state.job}" if line.state.job else ""
        print(f"{line.short}  {line.state.name}{where}", file=sys.stderr if options.json else sys.stdout)
    if len(lines) < 2 or options.yes:
        return True
    if not sys.stdin.isatty():
        complain(f"{len(lines)} runs would be {verb}; say -y")
        return None
    return input(f"{verb} {len(lines)} runs? [y/N] ").strip().lower() in ("y", "yes")


def user() -> str:
    """Who asks, for the journal."""
    return os.environ.get("USER", "") or str(os.getuid())


def cancel(chosen: Sequence[RunFolder], options: argparse.Namespace) -> int:
    """End runs for good."""
    seen = look(chosen, options.runs)
    if seen.why:
        return _slurm(f"{seen.why}; nothing was cancelled")
    open_ = [line for line in seen.lines if line.state.name in ENDABLE and line.state.job]
    if not open_:
        return _said(options, [], "nothing to cancel: none of these runs is running or queued")
    if not (yes := agreed(open_, "cancelled", options)):
        return USAGE if yes is None else OK
    elements = named((line.batch, line.facts.batch, line.state.job) for line in open_ if line.batch)
    note_all([line.folder for line in open_], "cancelled", by=user())
    for line in open_:
        if not line.batch:
            for rank in children(int(line.state.job)):
                os.kill(rank, signal.SIGTERM)
    try:
        for line in open_:
            if line.batch:
                successor.drop(Path(line.facts.batch), line.state.job)
        for start in range(0, len(elements), 500):
            cluster.call("scancel", *elements[start : start + 500])
        lifeline.drop(options.runs, *(line.state.job for line in open_))
    except cluster.SlurmError as error:
        return _slurm(str(error))
    return _said(options, open_, f"cancelled {len(open_)} run(s)")


def requeue(chosen: Sequence[RunFolder], options: argparse.Namespace) -> int:
    """Have runs start another attempt of the same job, after a save where they run."""
    seen = look(chosen, options.runs)
    if seen.why:
        return _slurm(f"{seen.why}; nothing was requeued")
    acts = [(line, _way(line, seen, options.now)) for line in seen.lines]
    refused = [(line, act) for line, act in acts if isinstance(act, str)]
    todo = [(line, act) for line, act in acts if not isinstance(act, str)]
    for line, words in refused:
        print(f"{line.short}: {words}", file=sys.stderr)
    if not todo:
        return FAILED if any(line.state.name not in ("queued", "waiting") for line, _ in refused) else OK
    if not (yes := agreed([line for line, _ in todo], "requeued", options)):
        return USAGE if yes is None else OK
    told = []
    for line, act in todo:
        try:
            told.append(f"{line.short}: {act()}")
        except cluster.SlurmError as error:
            return _slurm(f"{line.short}: {error}")
    done = [line for line, _ in todo]
    return _said(options, done, "\n".join(told))


def _way(line: Line, seen: Look, now: bool) -> Callable[[], str] | str:
    """How to requeue a run, or why not."""
    state, job = line.state, f"{line.batch}_{line.facts.element}"
    if state.name == "done":
        return "it is done"
    if state.name in ("queued", "waiting"):
        return "it is in the queue already"
    if not line.batch:
        return "it is not a SLURM job; submit.py with its experiment goes on from the last save"
    if state.name == "running":
        return lambda: _running(line, now)
    if state.name == "held":
        return lambda: _noted(line, "scontrol", "release", state.job)
    if job in (seen.queue or {}) and state.name != "blocked":
        return lambda: _noted(line, "scontrol", "requeue", job)
    return f"SLURM no longer has job {job}; `runs.py resubmit {line.short}` submits it anew"


def _running(line: Line, now: bool) -> str:
    """Have it end and come back; in words."""
    steps = cluster.call("squeue", "-h", "-s", "-j", line.state.job, "-o", "%i").split()
    line.folder.note("requeued", by=user())
    # A job whose ranks are not there yet has nothing to save, and nobody to hear a warning.
    if now or not any(step.rpartition(".")[2].isdigit() for step in steps):
        cluster.call("scontrol", "requeue", line.state.job)
        return REQUEUED
    # As the warning before the walltime: the ranks save, however long it takes; the verdict requeues.
    cluster.call("scancel", "--signal=USR2", line.state.job)
    return "told to save; it goes back into the queue when it has"


def _noted(line: Line, *command: str) -> str:
    cluster.call(*command)
    line.folder.note("requeued", by=user())
    line.folder.note("released")  # its budgets start anew
    if line.state.name == "held":
        return "released; it waits in the queue"
    # What it ended with, "cancelled" above all, is over.
    line.folder.note("submitting", batch=line.facts.batch, index=line.facts.element)
    return REQUEUED


def throttle(chosen: Sequence[RunFolder], options: argparse.Namespace) -> int:
    """Limit how many elements of the runs' arrays may run at a time, now and from now on."""
    seen = look(chosen, options.runs)
    if seen.why:
        return _slurm(f"{seen.why}; nothing was changed")
    found: dict[str, list[Line]] = {}
    for line in seen.lines:
        if line.batch and line.state.name in ENDABLE:
            found.setdefault(line.batch, []).append(line)
    if not found:
        return _said(options, [], "nothing to throttle: none of these runs is running or queued")
    stages: dict[str, dict[str, int]] = {}
    for array, lines in found.items():  # one experiment's sweep may be several arrays
        stages.setdefault(lines[0].name.rpartition("/")[0], {})[array] = len(lines)
    limits = {a: n for sizes in stages.values() for a, n in shares(options.limit, sizes).items()}
    for array, limit in limits.items():
        try:
            cluster.call("scontrol", "update", f"JobId={array}", f"ArrayTaskThrottle={limit}")
        except cluster.SlurmError as error:
            return _slurm(f"array {array}: {error}")
    said = [f"array {a}: {f'at most {n} at a time' if n else 'no limit'}" for a, n in limits.items()]
    return _said(options, [lines[0] for lines in found.values()], "\n".join(said))


def _slurm(words: str) -> int:
    print(f"error: SLURM: {words}", file=sys.stderr)
    return NO_SLURM


def _said(options: argparse.Namespace, lines: Sequence[Line], words: str) -> int:
    if options.json:
        rows = [{"run": line.name, "was": line.state.name, "job": line.state.job} for line in lines]
        print(json.dumps({options.verb: rows}))
    else:
        print(words)
    return OK
