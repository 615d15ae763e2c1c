"""Jobs that SLURM holds because their launches failed: whatever of ours runs lets them go, and a job leaves in time.

SLURM holds a job ("launch failed requeued held") at once where a node's prolog fails for it, and when a batch script
was missing from its node more often than MaxBatchRequeue (5) in the job's whole life, weeks of good work between
or not. Nothing of the held job runs, so any watch of a sibling, the next submission, `runs.py wait`,
`status --watch`, and for want of all these `launch.recovery.lifeline` release it, as its owner may (SLURM 22.05); one
look a minute. Holds by its user, by an administrator or by exit codes are none of these, and stay. A job that has used
up its count while it runs saves and goes on in a new job, which has the count anew: then nobody has to be there.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from launch import cluster
from launch.files import read_json
from launch.record import RunFolder
from launch.recovery import avoid
from launch.recovery.findings import Finding

LOST = re.compile(r"launch.failed.requeued.held|JobHoldMaxRequeue", re.IGNORECASE)
EVERY = 60.0  # seconds between two looks at the jobs of one folder of runs
# Seconds before the first release, the second, ...; there is no eighth.
WAITS = (0.0, 60.0, 120.0, 300.0, 900.0, 1800.0, 3600.0)
LOOKED = ".looked"
MOST = 5  # MAX_BATCH_REQUEUE of SLURM's source; newer versions have it among their settings


def turn(root: Path, now: float, every: float = EVERY) -> bool:
    """Whether to look now: of all who share the folder of runs one does, so that SLURM is asked once."""
    file = root / LOOKED
    try:
        if abs(now - file.stat().st_mtime) < every:
            return False
    except OSError:
        pass  # the first look
    try:
        file.touch()
        os.utime(file, (now, now))
    except OSError:
        return False  # a full disk, say: another time
    return True


def release(root: Path, now: float) -> list[str]:
    """Let go what SLURM holds of the runs in `root` for lost launches; the elements, for which it is said why.

    Raises SlurmError where SLURM does not answer.
    """
    freed = []
    for job in cluster.jobs().values():
        if job.state not in ("PENDING", "REQUEUE_HOLD") or not LOST.search(job.reason):
            continue
        folder = run_of(root, job)
        if folder is None or not due(folder, now):
            continue
        with contextlib.suppress(cluster.SlurmError, OSError):
            shun(root, folder, job.id)
        try:
            cluster.call("scontrol", "release", job.id, timeout=20)
        except cluster.SlurmError as error:  # an administrator holds it as well
            folder.note("refused", what="to let the job go", reason=str(error), job=job.id, freed=True)
            continue
        folder.note("freed", job=job.id, reason=job.reason)
        freed.append(job.id)
    return freed


def shun(root: Path, folder: RunFolder, element: str) -> None:
    """Hold the lost launch against its batch host and keep the job from it, where accounting knows which it was."""
    rows = [row for row in cluster.past([element]).get(element, []) if row.ended and row.nodes]
    if not rows:
        return
    hosts = cluster.call("scontrol", "show", "hostnames", rows[-1].nodes, timeout=20).split()
    facts = cluster.show(element)
    nodes = avoid.Nodes.of(root, folder, facts)
    lost = Finding("infrastructure", "its launch failed", tuple(hosts[:1]))
    nodes.blame(lost, f"{element}-{int(facts.get('Restarts', 1)) - 1}")
    if settings := nodes.settings(nodes.avoided()):
        cluster.call("scontrol", "update", f"JobId={element}", *settings, timeout=20)


def look(root: Path) -> list[str]:
    """`release`, where it is this process's turn; nothing where SLURM or the disk would not have it."""
    now = time.time()
    if turn(root, now):
        with contextlib.suppress(cluster.SlurmError, OSError):
            return release(root, now)
    return []


def run_of(root: Path, job: cluster.Job) -> RunFolder | None:
    """The run whose element this is, if the job is one of this folder's."""
    plan = read_json(root / "batches" / job.comment / "plan.json") if job.comment else None
    path = ((plan or {}).get("runs") or {}).get(job.id.partition("_")[2])
    return RunFolder(Path(path)) if path else None


def due(folder: RunFolder, now: float) -> bool:
    """Whether the held element may be let go now: not at once again, not for ever, and not what was cancelled."""
    tries, last, best = 0, 0.0, 0
    for record in folder.journal:
        event = record["event"]
        if event == "saved" and int(record.get("step", 0)) > best:
            best, tries = int(record["step"]), 0
        elif event in ("released", "submitting"):
            tries = 0
        elif event == "freed" or (event == "refused" and record.get("freed")):
            tries, last = tries + 1, float(record["time"])
    said = folder.last("submitting", "cancelled", "requeued") or {}
    over = said.get("event") == "cancelled" or folder.handoff_file.exists()
    return not over and tries < len(WAITS) and now >= last + WAITS[tries]


def lost(facts: Mapping[str, str]) -> int:
    """How many launches of this job SLURM counts as lost; `facts` as scontrol shows the job."""
    count = facts.get("BatchFlag", "")
    return max(0, int(count) - 1) if count.isdigit() else 0


def worn(facts: Mapping[str, str]) -> bool:
    """Whether SLURM would hold the job at the next launch it loses."""
    if not lost(facts):
        return False
    try:
        said = cluster.call("scontrol", "show", "config", timeout=20)
    except cluster.SlurmError:
        return False
    most = re.search(r"^MaxBatchRequeue\s*=\s*(\d+)", said, re.MULTILINE)
    return lost(facts) + 1 >= (int(most[1]) if most else MOST)


def leave(folder: RunFolder, element: str, attempt: str) -> str:
    """Have the running, worn job save and end, once; what is to be said of it, or nothing."""
    try:
        facts = cluster.show(element)
        asked = any(r["event"] == "requeued" and r.get("worn") == element for r in folder.journal)
        if asked or not worn(facts):
            return ""
        folder.note("requeued", by="its watch", worn=element, attempt=attempt)
        cluster.call("scancel", "--signal=USR2", element, timeout=30)
    except (cluster.SlurmError, OSError):
        return ""
    return f"SLURM lost {lost(facts)} launches of this job and holds it at the next: it saves, for a new job"
