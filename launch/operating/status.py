"""What state each run is in, from its folder and one look at the queue; right without SLURM's accounting."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.batches import Batches
from launch.cluster import ACTIVE, Job, array_of
from launch.files import read_json
from launch.operating.survey import Facts
from launch.record import RunFolder

OPEN = ("running", "queued", "waiting")  # an attempt is there or will be, without anyone's help
BROKEN = ("failed", "cancelled", "stopped", "blocked")  # none is there, and none will be without help

# SLURM's reasons for a job that waits until someone lets it go (squeue(1), JOB REASON CODES).
HELD = re.compile(r"JobHeld|requeued held|RequeueHold|SpecialExit|launch failed", re.IGNORECASE)


@dataclass(frozen=True)
class State:
    """new, waiting, queued, held, running, done, stopped, blocked, cancelled, failed or unknown; and why."""

    name: str
    reason: str = ""
    job: str = ""  # A_a, or the local controller's pid
    attempts: int = 0
    step: int = 0
    steps: int = 0  # that the stage has; 0 before the first attempt knew
    loss: float | None = None


def batch_of(folder: RunFolder) -> tuple[dict[str, Any], int] | None:
    """The newest batch that the run was put in, and its index there."""
    facts = Facts.read(str(folder.path))
    return (Batches()[facts.batch], facts.element) if facts.batch else None


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
    batches = Batches()
    return judge(Facts.read(str(folder.path), batches), queue, batches)


def judge(facts: Facts, queue: Mapping[str, Job] | None, batches: Batches) -> State:
    """The state that follows from what the folder says and the queue shows."""
    name, reason, job = _judge(facts, queue, batches)
    return State(name, reason, job, facts.attempts, facts.step, facts.steps, facts.loss)


def _judge(facts: Facts, queue: Mapping[str, Job] | None, batches: Batches) -> tuple[str, str, str]:
    """(state, reason, job)."""
    if facts.done is not None:
        return "done", f"step {facts.done}", ""
    if not facts.batch:
        return "new", "", ""
    batch = batches[facts.batch]
    asked = "being cancelled" if facts.said == "cancelled" else ""
    if "pid" in batch:
        if batch.get("host") != os.uname().nodename:
            return "unknown", f"runs on {batch.get('host')}", str(batch["pid"])
        if alive(batch["pid"], batch["started"]):
            return "running", asked, str(batch["pid"])
    if queue is None and batch.get("state") == "intent" and "host" not in batch:
        return "unknown", "SLURM does not answer, and whether it took the job is not known", ""
    job = job_of(batch, queue)
    found: Job | None = None
    if job:
        element = f"{job}_{facts.element}"
        if queue is None:
            return "unknown", "SLURM does not answer", element
        found = queue.get(element)
        if found and found.state in ACTIVE:
            return *_queued(facts, found, queue, batches, asked), element
        after = f"{facts.batch.partition('.after-')[0]}.after-{element}"  # launch.recovery.successor's
        if after != facts.batch and os.path.exists(f"{after}/batch.json"):
            spare = f"{job_of(batches[after], queue)}_{facts.element}"
            if spare in queue and queue[spare].state in ACTIVE:
                return _judge(facts._replace(batch=after), queue, batches)
        if found and found.state == "COMPLETED":
            return "stopped", "SLURM says COMPLETED, and there is no handoff", element
    if facts.said == "cancelled":
        return "cancelled", f"by {facts.by}" if facts.by else "", ""
    if facts.said == "verdict":
        ends = {"preempted": "stopped", "timeout": "stopped", "cancelled": "cancelled"}
        name = ends.get(facts.verdict, "failed")
        return name, f"{facts.verdict}: {facts.reason}".removesuffix(": "), ""
    if job and not facts.started and (why := broken_parent(facts.parent, queue, batches)):
        return "cancelled", f"cancelled by SLURM because {why}", ""
    if batch.get("state") == "refused":
        return "stopped", f"SLURM refused it: {batch.get('reason')}", ""
    if job:
        words = f" (SLURM says {found.state})" if found else ""
        if found and found.state == "PREEMPTED":
            words = (
                ": SLURM preempted it before it could speak, and does not requeue it; runs.py resubmit does"
            )
        return "stopped", f"it left the queue without a verdict{words}", ""
    return "stopped", "it was never started", ""


def job_of(batch: Mapping[str, Any], queue: Mapping[str, Job] | None) -> str:
    """The batch's array; found by its token where its submitter died before it had SLURM's answer."""
    if batch.get("state") == "intent":
        return array_of(str(batch.get("token", "")), queue or {})
    return str(batch.get("job", ""))


def _queued(
    facts: Facts, found: Job, queue: Mapping[str, Job], batches: Batches, asked: str
) -> tuple[str, str]:
    """(state, reason) of a run whose job SLURM still has."""
    pending = found.state in ("PENDING", "REQUEUE_HOLD")
    if found.state == "REQUEUE_HOLD" and found.reason in ("BeginTime", "Priority", "Resources"):
        return "queued", asked or found.reason  # it was let go; SLURM keeps the state until it starts
    if found.state in ("REQUEUE_HOLD", "SPECIAL_EXIT") or (pending and HELD.search(found.reason)):
        return "held", found.reason if found.reason != "None" else found.state
    if found.state in ("REQUEUED", "REQUEUE_FED"):
        return "queued", "requeued"
    if not pending:
        return "running", asked or found.nodes
    if found.reason == "DependencyNeverSatisfied":
        return "blocked", broken_parent(facts.parent, queue, batches) or "what it waits for has failed"
    if found.reason == "Dependency":
        return "waiting", f"after {label(facts.parent, batches)}" if facts.parent else found.reason
    return "queued", asked or found.reason


def broken_parent(parent: str, queue: Mapping[str, Job] | None, batches: Batches) -> str:
    """Which run up the chain keeps those below from starting, in words; empty where none does."""
    if not parent:
        return ""
    facts = Facts.read(parent, batches)
    state = judge(facts, queue, batches)
    if state.name not in BROKEN:
        return ""
    above = broken_parent(facts.parent, queue, batches) if not facts.started else ""
    return above or f"{label(parent, batches)} {'was ' * (state.name == 'cancelled')}{state.name}"


def label(folder: str, batches: Batches | None = None) -> str:
    """A run's name as its record has it, without the last part where there is no sweep."""
    run = read_json(Path(folder, "run.json"))
    if run is None and (entry := (batches or Batches()).entry(folder)):
        run = entry.run
    return str((run or {}).get("name", Path(folder).name)).removesuffix("/run")
