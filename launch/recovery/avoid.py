"""The nodes that attempts failed on, and those that are therefore avoided: a ledger beside the runs, and no daemon.

Each verdict that blames a node adds a line to `nodes.jsonl` in the folder of runs. A requeued job gets the nodes
avoided at that moment as its ExcNodeList, and so does a new one. A first fault holds for two hours, a second one
within a day for a day; never more than a tenth of the partition is avoided, nor so much that the run would not find
room in the rest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch import cluster
from launch.files import append_line, read_lines
from launch.operating.ledger import brief
from launch.record import RunFolder
from launch.recovery.causes import CAUSES
from launch.recovery.findings import Finding

LEDGER = "nodes.jsonl"
HOUR, DAY = 3600.0, 86400.0
FIRST = 2 * HOUR  # that a first fault holds
SHARE = 0.1  # of a partition's nodes that may be avoided; one always


@dataclass(frozen=True)
class Strike:
    """What the ledger says of one node now."""

    node: str
    faults: int  # of the last day
    until: float  # seconds since 1970; the past for a node that is not avoided
    why: str  # the newest fault


def strikes(root: Path, now: float) -> dict[str, Strike]:
    """The nodes with faults in the last day."""
    found: dict[str, Strike] = {}
    for record in read_lines(root / LEDGER):
        at, node, verdict = float(record.get("time", 0)), str(record.get("node")), str(record.get("verdict"))
        if at < now - DAY:
            continue
        faults = found[node].faults + 1 if node in found else 1
        lasts = DAY if faults > 1 else FIRST
        enough = verdict in CAUSES and faults >= (CAUSES[verdict].blames or 1)
        why = f"{verdict} in {record.get('run')}"
        found[node] = Strike(node, faults, at + lasts if enough else 0.0, why)
    return found


def chosen(found: Mapping[str, Strike], now: float, total: int, needed: int) -> tuple[str, ...]:
    """The nodes to avoid of a partition of `total` for a run that needs `needed`: worst first, as many as allowed."""
    most = max(0, min(max(1, int(SHARE * total)), total - needed))
    bad = sorted(
        (strike for strike in found.values() if strike.until > now),
        key=lambda s: (-s.faults, -s.until, s.node),
    )
    return tuple(strike.node for strike in bad[:most])


def words(root: Path) -> list[str]:
    """The nodes avoided now, a line each."""
    now = time.time()
    return [
        f"avoiding {one.node} for another {brief(one.until - now)}: {one.why}"
        + f", {one.faults} faults in a day" * (one.faults > 1)
        for one in sorted(strikes(root, now).values(), key=lambda one: one.node)
        if one.until > now
    ]


def down(nodes: str) -> tuple[str, ...]:
    """Those of a job's nodes that SLURM holds for lost."""
    try:
        lines = cluster.call("sinfo", "-h", "-N", "-n", nodes, "-o", "%N %T", timeout=20).splitlines()
    except cluster.SlurmError:
        return ()
    states = (line.split()[:2] for line in lines if len(line.split()) == 2)
    return tuple(
        dict.fromkeys(n for n, state in states if state.lower().startswith(("down", "fail", "unknown")))
    )


@dataclass(frozen=True)
class Nodes:
    """The ledger as one run's job sees it."""

    root: Path  # of the runs
    run: str
    given: str  # cluster.exclude: always avoided
    now_set: str  # the job's ExcNodeList
    partition: str
    needed: int

    @classmethod
    def of(cls, root: Path, folder: RunFolder, facts: Mapping[str, str]) -> Nodes:
        """For a run's job; `facts` as scontrol shows it."""
        given = str((folder.spec.get("cluster") or {}).get("exclude", ""))
        needed = facts.get("NumNodes", "1").partition("-")[0]
        return cls(
            root=root,
            run=str(folder.run.get("name", folder.path.name)).removesuffix("/run"),
            given=given,
            now_set=facts.get("ExcNodeList", "").replace("(null)", ""),
            partition=facts.get("Partition", ""),
            needed=int(needed) if needed.isdigit() else 1,
        )

    def blame(self, found: Finding, attempt: str) -> None:
        """Add the finding's nodes to the ledger, where its cause is one that nodes have part in."""
        if found.verdict in CAUSES and CAUSES[found.verdict].blames and len(found.nodes) <= 2:
            for (
                node
            ) in found.nodes:  # more at once is no fault of theirs: a switch, a file system, a power cut
                facts = {"node": node, "verdict": found.verdict, "run": self.run, "attempt": attempt}
                append_line(self.root / LEDGER, {"time": round(time.time(), 3), **facts})

    def avoided(self) -> tuple[str, ...]:
        """The nodes to avoid now."""
        now = time.time()
        if not (found := strikes(self.root, now)) or not any(s.until > now for s in found.values()):
            return ()
        try:
            shown = cluster.call("scontrol", "-o", "show", "partition", timeout=20)
        except cluster.SlurmError:
            return ()
        every = [cluster.fields(line) for line in shown.splitlines() if line.strip()]
        key, wanted = ("PartitionName", self.partition.split(",")) if self.partition else ("Default", ["YES"])
        mine = (row.get("TotalNodes", "0") for row in every if row.get(key) in wanted)
        return chosen(found, now, sum(int(total) for total in mine if total.isdigit()), self.needed)

    def settings(self, nodes: tuple[str, ...]) -> tuple[str, ...]:
        """What `scontrol update` is told, if anything changes; nodes whose time is over are let in again."""
        wanted = ",".join(dict.fromkeys(part for part in (*self.given.split(","), *nodes) if part))
        return (f"ExcNodeList={wanted}",) if wanted != self.given or self.now_set != self.given else ()


def options(root: Path, given: str, partition: str, nodes: int) -> list[str]:
    """What sbatch is told of a new array of `nodes` a run where some are avoided now, beside those `given`."""
    found = Nodes(root, "", given, given, partition, nodes)
    return [text.replace("ExcNodeList", "--exclude") for text in found.settings(found.avoided())]
