"""What happened to a run and when, told from its journal and, where there is accounting, from sacct."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch import cluster
from launch.operating.ledger import brief
from launch.operating.reasons import VERDICTS
from launch.operating.status import State
from launch.recovery.deadline import save_seconds


@dataclass(frozen=True)
class Sight:
    """All that was seen of one run."""

    journal: Sequence[Mapping[str, Any]]
    state: State
    job: cluster.Job | None = None
    past: Sequence[cluster.Past] = ()  # every execution that accounting knows, of any of its jobs
    parent: str = ""
    parent_state: State | None = None
    walltime: float = 0.0
    grace: float = 0.0
    row: Mapping[str, Any] = field(default_factory=dict)  # the newest of metrics.jsonl
    where: str = ""  # the source line that failed, of the newest attempt
    trace: str = ""  # of the rank that failed first
    log: str = ""


def events(seen: Sight) -> list[tuple[float, str]]:
    told: list[tuple[float, str]] = []
    number: dict[str, int] = {}
    asked, saved, begun = 0.0, 0, 0.0
    for record in seen.journal:
        at, event, attempt = float(record.get("time", 0.0)), record["event"], str(record.get("attempt", ""))
        if attempt and attempt not in number:
            number[attempt] = len(number) + 1
        which = f"attempt {number.get(attempt, 0)}"
        if event == "submitting":
            asked = at
            words = "a new job took it over" if record.get("after") else "submitted again"
            told.append((at, words if told else "submitted"))
        elif event == "launched":
            begun = at
        elif event == "start":
            told.append((at, f"{which} {_began(record, saved, asked, begun or at)}"))
            begun = begun or at
        elif event == "saved":
            saved = int(record.get("step", saved))
        elif event == "cancelled":
            told.append((at, f"{record.get('by') or 'someone'} asked to cancel it"))
        elif event == "requeued":
            told.append((at, f"{record.get('by') or 'someone'} asked to requeue it"))
        elif event == "freed":
            told.append((at, "SLURM held it, as its launch had failed; it was let go"))
        elif event == "refused":
            told.append((at, f"SLURM refused {record.get('what')}: {first(str(record.get('reason', '')))}"))
        elif event == "verdict":
            told.append((at, f"{which} {_ended(seen, record, saved, begun, at)}"))
            asked, begun = at, 0.0
    return told


def _began(record: Mapping[str, Any], saved: int, asked: float, begun: float) -> str:
    text = f"began on {record.get('node', 'its nodes')} from step {record.get('step', 0)}"
    if asked and begun - asked >= 60:
        text += f", after {brief(begun - asked)} in the queue"
    if (again := int(record.get("last", 0)) - int(record.get("step", 0))) > 0:
        text += f"; {again} step(s) are computed again"
    return text


def _ended(seen: Sight, record: Mapping[str, Any], saved: int, begun: float, at: float) -> str:
    """One attempt's end, in words."""
    verdict, reason = str(record.get("verdict")), str(record.get("reason", ""))
    said = VERDICTS.get(verdict, (f"ended: {verdict}", ""))[0]
    if verdict in ("preempted", "timeout"):
        said = _preempted(seen, record, reason, begun, at) if verdict == "preempted" else _timeout(reason)
        reason = ""
    text = said + (f": {first(reason)}" if reason and verdict not in ("finished", "cancelled") else "")
    if verdict not in ("finished", "bad spec") and saved:
        text += f"; step {saved} is saved"
    if record.get("excluded"):
        text += f"; avoiding {_names(record['excluded'])} for now"
    if record.get("delay"):
        text += f"; it waits {brief(float(record['delay']))} before the next attempt"
    if record.get("again"):
        text += "; requeued"
    elif verdict not in ("finished", "cancelled"):
        text += "; not requeued"
    return text


def end_of(seen: Sight, record: Mapping[str, Any]) -> str:
    """How the attempt of a verdict ended."""
    mine = [r for r in seen.journal if r.get("attempt") == record.get("attempt")]
    begun = min((float(r.get("time", 0.0)) for r in mine if r["event"] in ("launched", "start")), default=0.0)
    saved = max((int(r.get("step", 0)) for r in mine if r["event"] == "saved"), default=0)
    return _ended(seen, record, saved, begun, float(record.get("time", 0.0)))


def _timeout(reason: str) -> str:
    if reason == "before a save":
        return "reached its walltime before it could save"
    return "came near its walltime and left after a save"


def _preempted(seen: Sight, record: Mapping[str, Any], reason: str, begun: float, at: float) -> str:
    """What a "preempted" was: the walltime, a job of higher priority, a lost node or a user's request."""
    row = _execution(seen, str(record.get("attempt", "")), at)
    if row and row.state == "NODE_FAIL":
        return f"ended with its node ({row.nodes}), which failed"
    asked = [r for r in seen.journal if r["event"] == "requeued" and begun <= float(r.get("time", 0.0)) <= at]
    if asked:
        return f"was requeued on request of {asked[-1].get('by') or 'someone'}"
    if reason == "SIGUSR2" and not (row and row.state == "PREEMPTED"):
        # The job began before its ranks did, by up to a quarter of an hour of loading.
        slack = min(900.0, 0.25 * seen.walltime) + 90
        if seen.walltime and begun and at - begun >= seen.walltime - seen.grace - slack:
            return "came near its walltime and left after a save"
        return "was warned by SLURM and left after a save"
    if reason.startswith("requeued by SLURM"):
        saves = save_seconds(seen.journal)
        takes = f" (a save of it takes {brief(max(saves))})" if saves else ""
        return f"was taken off its nodes by SLURM before it could save{takes}"
    if row and row.state == "PREEMPTED":
        return "was preempted by a job of higher priority"
    return "was preempted"


def _execution(seen: Sight, attempt: str, at: float) -> cluster.Past | None:
    """What accounting has of the attempt: the execution of its element that ended nearest to its verdict."""
    element = attempt.rpartition("-")[0]
    rows = [row for row in seen.past if row.id == element and row.ended]
    near = min(rows, key=lambda row: abs(row.ended - at), default=None)
    return near if near and abs(near.ended - at) < 300 else None


def first(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= 160 else line[:157] + "..."


def _names(nodes: Any) -> str:
    return nodes if isinstance(nodes, str) else ", ".join(map(str, nodes))
