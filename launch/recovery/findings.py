"""What an attempt left behind, read: why it ended, on which nodes, and how often the run has ended so before."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.files import newest_lines, read_json
from launch.record import RunFolder
from launch.recovery.causes import CAUSES, OUT_OF_MEMORY, TOGETHER
from launch.recovery.pulse import beats

SRUN_SAW = re.compile(r"^srun: error: ([\w.-]+): task (\d+): (.+)$", re.MULTILINE)
# Of the run: another attempt, or someone, ended this one.
NO_FAULT = ("preempted", "held", "cancelled", "fenced")


@dataclass(frozen=True)
class Finding:
    """Why an attempt ended."""

    verdict: str  # a name of launch.recovery.causes.CAUSES
    reason: str = ""
    nodes: tuple[str, ...] = ()  # that had part in it
    rank: int = 0  # whose log to read


def of_attempt(folder: RunFolder, attempt: str, exit_code: int, log: Path | None = None) -> Finding:
    """What the ranks and the watch left says; `log` is the batch script's, where SLURM speaks."""
    journal = folder.journal
    events = [record for record in journal if record.get("attempt") == attempt]
    asked = [record for record in journal if record["event"] in ("submitting", "cancelled")]
    ended = next((record for record in reversed(events) if record["event"] == "ended"), None)
    if asked and asked[-1]["event"] == "cancelled" and not (ended and ended["outcome"] == "finished"):
        by = asked[-1].get("by")
        return Finding("cancelled", f"on request of {by}" if by else "on request")
    failures = failures_of(folder, attempt)
    own = [failure for failure in failures if failure.get("kind") != "lost peer"]
    if ended and not (own and float(own[0].get("time", 1e12)) < float(ended["time"])):
        return Finding(str(ended["outcome"]), str(ended.get("reason", "")))
    if watched := read_json(folder.logs(attempt) / "hang.json"):
        nodes = tuple(map(str, watched.get("nodes", ())))
        rank = int((watched.get("ranks") or [0])[0])
        return Finding(str(watched.get("kind", "hang")), str(watched.get("message", "")), nodes, rank)
    if own:
        # Every rank fails once one has; of those that know of a reason of their own, the first tells it.
        return _told(own[0])
    started: dict[str, Any] = next((record for record in reversed(events) if record["event"] == "start"), {})
    said = spoken(log, attempt) if log else ""
    lost = _first_lost(said) or _lost(folder, attempt, failures, int(started.get("world", 0)))
    if OUT_OF_MEMORY.search(said):
        return Finding(
            "out of memory", f"{lost.reason}; SLURM says its node's memory was used up", lost.nodes
        )
    if not events and not failures:
        return Finding("infrastructure", "no rank started" if exit_code else "the ranks left no record")
    if lost.reason:
        return replace(lost, reason=f"{lost.reason} (srun ended with {exit_code}) and left no word")
    if failures:
        return Finding("infrastructure", f"the ranks lost each other: {failures[0].get('message', '')}")
    reason = f"srun ended with {exit_code} and no rank said why: a node or a rank was lost"
    return Finding("infrastructure", reason)


def failures_of(folder: RunFolder, attempt: str) -> list[dict[str, Any]]:
    """What the ranks that raised left, in order of time."""
    found = [read_json(path) or {} for path in sorted(folder.logs(attempt).glob("failure_*.json"))]
    return sorted(found, key=lambda failure: float(failure.get("time", 1e12)))


def _told(failure: Mapping[str, Any]) -> Finding:
    kind, message = str(failure.get("kind", "error")), str(failure.get("message", ""))
    blames = CAUSES[kind].blames if kind in CAUSES else 0
    node = str(failure.get("node", ""))
    return Finding(kind, message, (node,) if node and blames else (), int(failure.get("rank", 0)))


def _first_lost(said: str) -> Finding | None:
    """The rank that srun saw end first, by a signal; it then ends the others, which may be stuck without it."""
    match = SRUN_SAW.search(said)
    if not match or match[3].startswith("Exited"):
        return None
    node, rank, how = match.groups()
    words = f"rank {rank} on {node} was lost: {how.strip().lower()}"
    return Finding("infrastructure", words, (node,), int(rank))


def _lost(folder: RunFolder, attempt: str, failures: Iterable[Mapping[str, Any]], world: int) -> Finding:
    """The ranks that were there and are gone without a word."""
    spoke = {int(failure.get("rank", -1)) for failure in failures}
    seen = beats(folder.logs(attempt))
    gone = sorted(rank for rank in {*range(world), *seen} if rank not in spoke)
    if not gone or (not spoke and len(gone) != 1):
        return Finding("infrastructure")  # all of them: which was the first, nobody knows
    nodes = tuple(dict.fromkeys(seen[rank].node for rank in gone if rank in seen and seen[rank].node))
    which = f"rank{'s' * (len(gone) > 1)} {', '.join(map(str, gone[:8]))}{', ...' * (len(gone) > 8)}"
    where = f" on {', '.join(nodes[:4])}{', ...' * (len(nodes) > 4)}" if nodes else ""
    return Finding("infrastructure", f"{which}{where} {'were' if len(gone) > 1 else 'was'} lost", nodes)


def spoken(log: Path, attempt: str) -> str:
    """The end of the batch script's log, back to this attempt's first line (launch.script writes it)."""
    lines: list[str] = []
    for line in newest_lines(log):
        text = line.decode(errors="replace")
        lines.append(text)
        if text == f"attempt {attempt}" or len(lines) > 500:
            break
    return "\n".join(reversed(lines))


def fruitless(folder: RunFolder, *verdicts: str) -> int:
    """How often one of these verdicts (none named: any but a preemption) was spoken since the run last got on.

    It got on when a step was saved that had never been saved before: one saved again, after a torn checkpoint, is none.
    """
    count, best = 0, 0
    for record in folder.journal:
        event = record["event"]
        if event == "saved" and int(record.get("step", 0)) > best:
            best, count = int(record["step"]), 0
        elif event == "released":
            count = 0
        elif event == "verdict":
            said = record.get("verdict")
            count += said in verdicts if verdicts else said not in NO_FAULT
    return count


def comes_back(folder: RunFolder, verdict: str) -> bool:
    """Whether a run with this verdict starts another attempt."""
    cause = CAUSES.get(verdict)
    if cause is None or cause.budget is None:
        return cause is not None
    return fruitless(folder, verdict) < cause.budget and fruitless(folder) < TOGETHER


def held(folder: RunFolder, verdict: str) -> str:
    """Why the run is not tried again, where that is for the number of its attempts; empty otherwise."""
    same, every = fruitless(folder, verdict) + 1, fruitless(folder) + 1
    if verdict in CAUSES and CAUSES[verdict].budget and same > 1:
        return f"{same} attempts ended so without a new step saved"
    return f"{every} attempts, each for another reason, saved no new step" if every > TOGETHER else ""


def delay(folder: RunFolder, verdict: str) -> int:
    """Seconds that the next attempt waits, beside what SLURM makes it wait."""
    delays = CAUSES[verdict].delays if verdict in CAUSES else (0,)
    return delays[min(fruitless(folder, verdict), len(delays) - 1)]


def first_line(text: str) -> str:
    """A text's first line, without what would break a table."""
    return re.sub(r"\s+", " ", text.strip().splitlines()[0]) if text.strip() else ""
