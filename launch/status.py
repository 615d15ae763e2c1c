"""What state each run is in, from its folder and one look at the queue; right with and without SLURM's accounting."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster import ACTIVE, Job
from launch.record import RunFolder, read_json

OPEN = ("running", "queued", "waiting")  # an attempt is there or will be, without anyone's help


@dataclass(frozen=True)
class State:
    """A run's state: new, waiting, queued, running, done, stopped, cancelled, failed, or unknown."""

    name: str
    reason: str = ""
    job: str = ""  # A_a, or the local controller's pid
    attempts: int = 0
    step: int = 0
    steps: int = 0  # that the stage has; 0 before the first attempt knew
    loss: float | None = None


def batch_of(folder: RunFolder) -> tuple[dict[str, Any], int] | None:
    """The newest batch that the run was put in, and its index there."""
    record = folder.last("submitting")
    if record is None:
        return None
    return {**(read_json(Path(record["batch"]) / "batch.json") or {}), "folder": record["batch"]}, int(
        record["index"]
    )


def alive(pid: int, started: int) -> bool:
    """Whether the process is there, and is the one that was meant."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return False
    return fields[0] != "Z" and int(fields[19]) == started


def started(pid: int) -> int:
    """The process's start time in clock ticks since boot: with its pid, a name no other process gets."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])


def children(pid: int) -> list[int]:
    """The process's direct children: a controller's are the ranks."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def state_of(folder: RunFolder, queue: Mapping[str, Job] | None) -> State:
    """The run's state; `queue` is None where SLURM was not asked or did not answer."""
    journal = folder.journal
    starts = [record for record in journal if record["event"] == "start"]
    row = folder.last_metrics()
    known = {
        "attempts": len(starts),
        "step": int(row.get("step", 0)),
        "steps": int(starts[-1].get("steps", 0)) if starts else 0,
        "loss": row.get("loss"),
    }

    def state(name: str, reason: str = "", job: str = "") -> State:
        return State(name, reason, job, **known)

    if handoff := read_json(folder.handoff_file):
        return state("done", f"step {handoff.get('step')}")
    batch = batch_of(folder)
    if batch is None:
        return state("new")
    facts, index = batch
    if "pid" in facts:
        if facts.get("host") != os.uname().nodename:
            return state("unknown", f"runs on {facts.get('host')}", str(facts["pid"]))
        if alive(facts["pid"], facts["started"]):
            return state("running", "", str(facts["pid"]))
    elif job := facts.get("job"):
        element = f"{job}_{index}"
        if queue is None:
            return state("unknown", "SLURM does not answer", element)
        if (found := queue.get(element)) and found.state in ACTIVE:
            if found.state == "PENDING":
                return state("waiting" if found.reason == "Dependency" else "queued", found.reason, element)
            return state("running", found.nodes, element)
        if found and found.state == "COMPLETED":
            return state("stopped", "SLURM says COMPLETED, and there is no handoff", element)
    verdict = next(
        (record for record in reversed(journal) if record["event"] in ("verdict", "submitting", "cancelled")),
        None,
    )
    if verdict and verdict["event"] == "cancelled":
        return state("cancelled")
    if verdict and verdict["event"] == "verdict":
        name = {"preempted": "stopped", "cancelled": "cancelled"}.get(verdict["verdict"], "failed")
        return state(name, f"{verdict['verdict']}: {verdict['reason']}".removesuffix(": "))
    return state(
        "stopped", "it left the queue without a verdict" if facts.get("job") else "it was never started"
    )
