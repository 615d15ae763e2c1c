"""Speaking for an attempt that could not: SLURM took its batch host away, and the verdict with it."""

from __future__ import annotations

import re
from pathlib import Path

from launch import cluster
from launch.record import RunFolder
from launch.recovery import avoid
from launch.recovery.findings import Finding, comes_back, held
from launch.recovery.pulse import beats
from launch.verdict import speak


def late(root: Path, folder: RunFolder, element: str, restarts: int) -> None:
    """Speak for the attempt before this one, where SLURM took its batch host away, and the verdict with it."""
    attempt = f"{element}-{restarts - 1}"
    if not restarts or any(r["event"] == "verdict" and r.get("attempt") == attempt for r in folder.journal):
        return
    rows = [row for row in cluster.past([element]).get(element, []) if row.ended][-1:]
    state, nodes = (rows[0].state, rows[0].nodes) if rows else ("", "")
    found = taken(folder, attempt, state, nodes) or Finding("preempted", "requeued by SLURM before a save")
    avoid.Nodes.of(root, folder, {}).blame(found, attempt)
    speak(folder, attempt, found, again=True, late=True)


def taken(folder: RunFolder, attempt: str, state: str, nodes: str) -> Finding | None:
    """The finding where SLURM lost nodes of an attempt; `state` and `nodes` as it has them of the execution."""
    had = sorted({beat.node for beat in beats(folder.logs(attempt)).values()})
    if lost := avoid.down(",".join(had)) if had else ():
        return Finding("infrastructure", f"SLURM lost {', '.join(lost)}", lost)
    if state in ("NODE_FAIL", "BOOT_FAIL"):
        one = () if re.search(r"[\[,]", nodes) else (nodes,)
        return Finding("infrastructure", f"SLURM lost one of its nodes ({nodes})", one)
    return None


def bereft(root: Path, folder: RunFolder, element: str) -> bool:
    """Speak for the job before a spare, where it ended without a word; whether the run's budgets let it go on."""
    journal = folder.journal
    began = [str(r.get("attempt")) for r in journal if r["event"] in ("launched", "start")]
    mine = [attempt for attempt in began if attempt.startswith(f"{element}-")]
    attempt = mine[-1] if mine else f"{element}-0"  # its ranks never began
    if spoken := [r for r in journal if r["event"] == "verdict" and r.get("attempt") == attempt]:
        return bool(spoken[-1]["again"]) or not spoken[-1].get("late")
    try:
        facts = cluster.show(element)
    except cluster.SlurmError:  # so long ago that SLURM forgot it
        facts = {}
    rows = cluster.past([element]).get(element, [])[-1:]
    state = facts.get("JobState") or (rows[0].state if rows else "")
    found = taken(folder, attempt, state, facts.get("NodeList") or (rows[0].nodes if rows else ""))
    if found is None:
        plain = {"PREEMPTED": "preempted", "TIMEOUT": "timeout", "OUT_OF_MEMORY": "out of memory"}
        words = f"its job ended without a word (SLURM says {state or 'nothing'})"
        found = Finding(plain.get(state, "infrastructure"), words)
    again = comes_back(folder, found.verdict)
    stop = "" if again else held(folder, found.verdict)
    avoid.Nodes.of(root, folder, {}).blame(found, attempt)
    speak(folder, attempt, found, again=again, late=True, held=stop)
    return again
