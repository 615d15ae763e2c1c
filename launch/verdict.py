"""Why an attempt ended, spoken by the batch script after srun, and what follows from it.

This is the one place that requeues. It runs while the job is still RUNNING, so that `afterok` children keep waiting,
and asks SLURM first: where SLURM has already requeued the job (preemption without grace, a lost node) it does nothing,
where the user cancelled it the run stays cancelled.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from launch import cluster
from launch.record import RunFolder, read_json

BUDGETS = {
    "infrastructure": 5,
    "error": 1,
}  # attempts that may follow one another without a saved step between them


def of_attempt(folder: RunFolder, attempt: str, exit_code: int) -> tuple[str, str]:
    """What the ranks left behind says: (verdict, reason)."""
    journal = folder.journal
    events = [record for record in journal if record.get("attempt") == attempt]
    asked = [record["event"] for record in journal if record["event"] in ("submitting", "cancelled")]
    ended = next((record for record in reversed(events) if record["event"] == "ended"), None)
    if asked and asked[-1] == "cancelled" and not (ended and ended["outcome"] == "finished"):
        return "cancelled", "on request"
    if ended:
        return str(ended["outcome"]), str(ended.get("reason", ""))
    if failures := sorted(folder.logs(attempt).glob("failure_*.json")):
        # Every rank fails once one has; the one that failed first knows why.
        first = min(
            (read_json(path) or {} for path in failures), key=lambda failure: failure.get("time", 1e12)
        )
        return str(first.get("kind", "error")), str(first.get("message", ""))
    if not events:
        return "infrastructure", "no rank started" if exit_code else "the ranks left no record"
    return "infrastructure", f"srun ended with {exit_code} and no rank said why: a node or a rank was lost"


def fruitless(folder: RunFolder, verdict: str) -> int:
    """How often this verdict was spoken since the run last saved a step."""
    count = 0
    for record in folder.journal:
        if record["event"] in ("saved", "released"):
            count = 0
        elif record["event"] == "verdict" and record.get("verdict") == verdict:
            count += 1
    return count


def speak(folder: RunFolder, attempt: str, verdict: str, reason: str, *, again: bool) -> None:
    """Write the verdict to the run's journal."""
    folder.note("verdict", attempt=attempt, verdict=verdict, reason=reason, again=again)


def comes_back(folder: RunFolder, verdict: str) -> bool:
    """Whether a run with this verdict starts another attempt."""
    if verdict == "preempted":
        return True
    return fruitless(folder, verdict) < BUDGETS.get(verdict, 0)


def requeue(element: str) -> str:
    """Put the running element back into the queue; what SLURM said if it would not. Already requeued is success."""
    said = ""
    for wait in (0, 1, 3):
        time.sleep(wait)
        try:
            cluster.call("scontrol", "requeue", element, timeout=30)
            return ""
        except cluster.SlurmError as error:
            said = str(error)
            if "pending execution" in said:
                return ""
    return said


def main(arguments: list[str]) -> int:
    """`python -m launch.verdict BATCH EXIT_CODE`, on the batch host."""
    for warning in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(warning, signal.SIG_IGN)  # inherited by scontrol, which SLURM signals as well
    batch, exit_code = Path(arguments[0]), int(arguments[1])
    plan = read_json(batch / "plan.json") or {}
    element = cluster.element_id()
    folder = RunFolder(Path(plan["runs"][os.environ["SLURM_ARRAY_TASK_ID"]]))
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    attempt = f"{element}-{restarts}"
    verdict, reason = of_attempt(folder, attempt, exit_code)
    try:
        facts = cluster.show(element)
    except cluster.SlurmError:
        facts = {}  # slurmctld away: requeue below tries again, and a job that it lost anyway is in its hands
    restarted = int(facts.get("Restarts", restarts)) > restarts
    # While this script runs the job is RUNNING, unless SLURM is ending it: to restart it, at the walltime, or for good.
    ending = facts.get("JobState") in ("COMPLETING", "CANCELLED") and facts.get("Reason") != "TimeLimit"
    if verdict != "finished" and ending and not restarted:
        verdict, reason = "cancelled", "scancel"
    elif verdict != "finished" and restarted and verdict != "preempted":
        # SLURM took the node away and killed the ranks; whatever they say of it is a consequence.
        verdict, reason = "preempted", "requeued by SLURM before a save"
    again = restarted or comes_back(folder, verdict)
    speak(folder, attempt, verdict, reason, again=again)
    print(f"{folder.path.name}: attempt {attempt}: {verdict}{': ' + reason if reason else ''}", flush=True)
    if verdict in ("finished", "cancelled") or restarted:
        return 0
    if again and not (said := requeue(element)):
        # What scontrol returns from is done; to stay would keep the nodes for KillWait, as SLURM's SIGTERM is ignored.
        time.sleep(1)
        return 1
    elif again:
        folder.note(
            "verdict", attempt=attempt, verdict="held", reason=f"requeue refused: {said}", again=False
        )
    return 1  # holds back what depends on the run


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
