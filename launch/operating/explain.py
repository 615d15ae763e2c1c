"""explain: why a run waits, was restarted, has failed or is held, in sentences with times.

From the journal, one squeue, and sacct where there is accounting. `tell` is a function of what these said,
so that scripted histories can be told in a test.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch import cluster
from launch.exits import OK
from launch.files import read_json
from launch.operating.address import name
from launch.operating.history import Sight, end_of, events, first
from launch.operating.ledger import brief
from launch.operating.reasons import ENDS, VERDICTS, waiting
from launch.operating.show import look
from launch.operating.status import State, batch_of, job_of, label, state_of
from launch.record import RunFolder
from launch.recovery.findings import failures_of
from launch.spec import Duration

TRACE = 20  # lines of a traceback


@dataclass(frozen=True)
class Story:
    """The answer: what happened when, why the run is where it is, and what to do."""

    cause: str
    why: str
    todo: str
    events: tuple[tuple[float, str], ...]
    trace: str = ""


def explain(chosen: Sequence[RunFolder], options: argparse.Namespace) -> int:
    """Print one run's story."""
    folder = chosen[0]
    seen = look([folder], options.runs, accounting=False)  # sight() asks it for more
    line = seen.lines[0]
    story = tell(sight(folder, line.state, seen.queue), time.time())
    title = name(folder, options.runs).removesuffix("/run")
    if options.json:
        events = [{"time": at, "text": text} for at, text in story.events]
        print(json.dumps({"run": title, "state": line.state.name, **vars(story), "events": events}, indent=1))
        return OK
    step = (
        f", step {line.state.step}" + (f"/{line.state.steps}" if line.state.steps else "")
        if line.state.step
        else ""
    )
    print(f"{title}  {line.state.name}{f'  {line.state.job}' * bool(line.state.job)}{step}")
    now = time.time()
    for at, text in story.events:
        print(f"  {clock(at, now)}  {text}")
    print(f"why: {story.why}")
    for text in story.trace.splitlines():
        print(f"     | {text}")
    if story.todo:
        print(f"do:  {story.todo}")
    if seen.why:
        print(f"warning: SLURM: {seen.why}; this is from the run's folder alone", file=sys.stderr)
    return OK


def sight(folder: RunFolder, state: State, queue: Mapping[str, cluster.Job] | None) -> Sight:
    """Gather what is known of the run; one sacct at most."""
    journal = folder.journal
    elements = [str(record["attempt"]).rpartition("-")[0] for record in journal if record.get("attempt")]
    batch = batch_of(folder)
    current = f"{job}_{batch[1]}" if batch and (job := job_of(batch[0], queue)) else ""
    elements += [current] if current else []
    elements = [element for element in dict.fromkeys(elements) if element.partition("_")[0].isdigit()]
    past = [row for rows in cluster.past(elements).values() for row in rows] if elements else []
    spec = folder.spec
    parent = str(folder.run.get("parent") or "")
    attempt = next((str(r["attempt"]) for r in reversed(journal) if r.get("attempt")), "")
    failures = failures_of(folder, attempt) if attempt else []
    first = next((failure for failure in failures if failure.get("kind") != "lost peer"), {})
    hang = (read_json(folder.logs(attempt) / "hang.json") if attempt else None) or {}
    rank = int(first.get("rank", (hang.get("ranks") or [0])[0]))
    return Sight(
        journal=journal,
        state=state,
        job=(queue or {}).get(current),
        past=past,
        parent=label(parent) if parent else "",
        parent_state=state_of(RunFolder(folder.path.__class__(parent)), queue) if parent else None,
        walltime=_seconds(spec, "walltime"),
        grace=_seconds(spec, "grace"),
        row=folder.last_metrics(),
        where=str((first.get("where") or [""])[-1]),
        trace=str(first.get("traceback", "")),
        log=str(folder.log_of(attempt, rank)) if attempt else "",
    )


def _seconds(spec: Mapping[str, Any], key: str) -> float:
    try:
        return float(Duration.parse(str(spec["cluster"][key])))
    except (KeyError, TypeError, ValueError):
        return 0.0


def tell(seen: Sight, now: float) -> Story:
    """The story that follows from what was seen."""
    happened = tuple(events(seen))
    cause, why, todo = _why(seen, now)
    why = why[:1].upper() + why[1:] + "." * (not why.endswith((".", "!")))
    trace = seen.trace if cause in ("error", "out of memory", "infrastructure") else ""
    return Story(cause, why, todo, happened, "\n".join(trace.splitlines()[-TRACE:]))


def _why(seen: Sight, now: float) -> tuple[str, str, str]:
    """(cause, sentence, what to do)."""
    state = seen.state
    if state.name == "done":
        return "done", f"it finished at {state.reason}, and its handoff is there", ""
    if state.name == "new":
        return "new", "it was never submitted", "submit.py with its experiment"
    if state.name == "running":
        return _running(seen, now)
    if state.name in ("queued", "waiting", "held", "blocked"):
        return _waits(seen, now)
    if state.name == "unknown":
        if state.reason.startswith("runs on"):
            return "elsewhere", f"it {state.reason}, another machine, and can be seen there alone", ""
        return "no slurm", f"{state.reason}, so whether it runs is not known", "look again when SLURM answers"
    if state.reason.startswith("cancelled by SLURM because"):
        who = state.reason.removeprefix("cancelled by SLURM because ")
        return (
            "parent",
            f"SLURM cancelled it because {who}",
            "runs.py resubmit takes the run above and this one",
        )
    if state.name == "cancelled":
        todo = VERDICTS["cancelled"][1]
        return "cancelled", f"it was cancelled {state.reason.removeprefix('cancelled: ')}".rstrip(), todo
    if state.reason.startswith("SLURM refused it"):
        return "refused", state.reason, "correct what SLURM names, and submit again"
    verdict = _newest(seen, "verdict", "submitting")
    if verdict is None or verdict["event"] != "verdict":
        return _silent(seen)
    return _verdict(seen, verdict)


def _running(seen: Sight, now: float) -> tuple[str, str, str]:
    state = seen.state
    begun = _newest(seen, "start", "launched", "submitting")
    before = _newest(seen, "verdict")
    last = f"; the attempt before it {end_of(seen, before)}" if before else ""
    if state.reason == "being cancelled":
        return "being cancelled", "it is being cancelled, and saves before it ends", ""
    if begun is None or begun["event"] == "submitting":
        return "starting", f"SLURM has started it, and its ranks have not spoken yet{last}", ""
    since = float(begun["time"])
    if begun["event"] == "launched":
        return "loading", f"its ranks have been loading for {brief(now - since)}{last}", ""
    at = float(seen.row.get("time", 0.0))
    usual = float(seen.row.get("step_seconds", 0.0))
    silent = now - max(at, since)
    if silent > max(600.0, 20 * usual):
        text = f"it has not taken a step for {brief(silent)}, and one takes {usual:.1f} s: it may hang"
        return "silent", text, "runs.py logs -f; runs.py requeue --now starts it again from the last save"
    return "running", f"attempt {state.attempts} has been running for {brief(now - since)}{last}", ""


def _waits(seen: Sight, now: float) -> tuple[str, str, str]:
    raw = seen.job.reason if seen.job else seen.state.reason
    row = waiting(raw)
    parent = seen.parent or "the job above"
    if row.cause == "dependency" and seen.parent_state:
        steps = (
            f", step {seen.parent_state.step}/{seen.parent_state.steps}" if seen.parent_state.steps else ""
        )
        parent += f" ({seen.parent_state.name}{steps})"
    if row.cause == "blocked" and seen.parent_state:
        parent += f" ({seen.parent_state.name}: {seen.parent_state.reason})"
    text = row.text.format(reason=raw, parent=parent)
    verdict = _newest(seen, "verdict", "submitting")
    if verdict and verdict["event"] == "verdict":
        text = f"it waits for its next attempt: {text}; the last one {end_of(seen, verdict)}"
        if row.cause == "begin time" and verdict.get("delay"):
            text += f", because of {verdict.get('verdict')}"
    if seen.job and seen.job.start > now and seen.state.name == "queued":
        text += f"; SLURM expects to start it in {brief(seen.job.start - now)}"
    return row.cause, text, row.todo


def _verdict(seen: Sight, record: Mapping[str, Any]) -> tuple[str, str, str]:
    """A run that a verdict ended."""
    verdict, reason = str(record.get("verdict")), str(record.get("reason", ""))
    said, todo = VERDICTS.get(verdict, (f"ended with the verdict {verdict}", "runs.py logs"))
    text = f"its last attempt {said}" + (f": {first(reason)}" if reason else "")
    if seen.where and verdict in ("error", "bad spec", "out of memory", "hang", "divergence"):
        text += f" ({seen.where})"
    same = _streak(seen, verdict)
    if same > 1:
        text += f"; {same} attempts ended so without a saved step between them; it is not tried again"
    if verdict == "preempted" and not record.get("again"):
        text = f"it was preempted ({reason or 'no reason given'}) and did not come back"
    elif verdict == "preempted":
        text = "it was preempted and requeued, and is no longer in the queue"
    elif verdict == "timeout" and record.get("again"):
        text = "it came near its walltime and was requeued, and is no longer in the queue"
    return verdict, text, todo + (f"\n     log: {seen.log}" if seen.log else "")


def _silent(seen: Sight) -> tuple[str, str, str]:
    """A run that left the queue without a verdict: what SLURM or accounting has of it."""
    last = seen.past[-1] if seen.past else None
    word = last.state if last else seen.job.state if seen.job else ""
    if word == "CANCELLED" and last and last.by:
        return "cancelled", f"it was cancelled with scancel by user {last.by}", VERDICTS["cancelled"][1]
    if word in ENDS:
        where = (
            f" ({last.nodes})"
            if last and last.nodes and word in ("NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
            else ""
        )
        return (
            word.lower().replace("_", " "),
            f"{ENDS[word]}{where}",
            "runs.py resubmit goes on from the last save",
        )
    if seen.state.reason == "it was never started":
        return (
            "not sent",
            "its submitter ended before SLURM had it",
            "submit.py with its experiment, or runs.py resubmit",
        )
    started = _newest(seen, "launched", "start", "submitting")
    if started and started["event"] != "submitting":
        text = (
            "its ranks ended, and its job left the queue before a verdict: killed with its node, or cancelled"
        )
    else:
        text = "it left the queue before its ranks started, and SLURM no longer says why"
    return "no verdict", text, "runs.py logs; runs.py resubmit goes on from the last save"


def _newest(seen: Sight, *events: str) -> Mapping[str, Any] | None:
    return next((record for record in reversed(seen.journal) if record["event"] in events), None)


def _streak(seen: Sight, verdict: str) -> int:
    """How many attempts ended like that since a step was last saved."""
    count = 0
    for record in reversed(seen.journal):
        if record["event"] in ("saved", "released"):
            break
        count += record["event"] == "verdict" and record.get("verdict") == verdict
    return count


def clock(at: float, now: float) -> str:
    """The time of day today, with the date before."""
    local = time.localtime(at)
    return time.strftime("%H:%M" if now - at < 20 * 3600 else "%b %d %H:%M", local)
