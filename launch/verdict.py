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
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from launch import cluster
from launch.record import RunFolder, of_element
from launch.recovery import avoid, lifeline, limbo, successor
from launch.recovery.causes import CAUSES
from launch.recovery.findings import Finding, comes_back, delay, first_line, fruitless, held, of_attempt

AWAY = 4 * 3600.0  # seconds: slurmctld is upgraded, say
SPOKEN = 3  # exit code: the run is not done. With any other but 0 no verdict was spoken


def speak(folder: RunFolder, attempt: str, found: Finding, *, again: bool, **more: object) -> None:
    """Write the verdict to the run's journal."""
    facts = {key: value for key, value in more.items() if value}
    folder.note("verdict", attempt=attempt, verdict=found.verdict, reason=found.reason, again=again, **facts)


def judged(
    found: Finding,
    facts: Mapping[str, str],
    restarts: int,
    *,
    asked: bool = False,
    lost: tuple[str, ...] = (),
) -> Finding:
    """The finding in the light of what SLURM says of the job.

    `asked`: a user wanted it requeued; `lost`: nodes of the job that SLURM holds for down.

    While this script runs the job is RUNNING, unless SLURM is ending it: to restart it, at the walltime, or for good.
    """
    if found.verdict in ("finished", "cancelled"):
        return found
    restarted = int(facts.get("Restarts", restarts)) > restarts
    preempted = facts.get("PreemptTime", "None") not in ("None", "Unknown", "")
    broken = facts.get("Reason") == "NodeDown"  # and the job is not to be requeued, or SLURM had restarted it
    ending = facts.get("JobState") in ("COMPLETING", "CANCELLED") and facts.get("Reason") != "TimeLimit"
    if ending and not broken and not restarted and not preempted:
        return Finding("cancelled", "scancel")
    if found.verdict == "preempted":
        warned = found.reason == "SIGUSR2" and facts and not (preempted or asked)
        return Finding("timeout", found.reason) if warned or found.reason == "walltime" else found
    if restarted or broken:
        if (lost or broken) and not preempted:
            return Finding("infrastructure", f"SLURM lost {', '.join(lost) or 'one of its nodes'}", lost)
        # SLURM took the nodes away and killed the ranks; whatever they say of it is a consequence.
        return Finding("preempted", "requeued by SLURM before a save")
    if ending:
        return Finding("preempted", "before a save")
    if facts.get("Reason") == "TimeLimit":
        return Finding("timeout", "before a save")
    if asked and found.verdict == "infrastructure":
        return Finding("preempted", "requeued on request, before its ranks could save")
    return found


def progress(folder: RunFolder, found: Finding) -> Finding:
    """The finding, or that the run gets no further, whatever ends its attempts."""
    cause = CAUSES.get(found.verdict)
    if cause is None or cause.budget in (None, 0) or comes_back(folder, found.verdict):
        return found
    words = held(folder, found.verdict)
    if found.verdict == "timeout":
        return Finding("no progress", f"{words}: the walltime is too short for loading, a step and a save")
    if fruitless(folder, found.verdict) < (cause.budget or 0):
        return Finding("no progress", f"{words}; the last: {found.verdict}: {first_line(found.reason)}")
    return found


def requested(folder: RunFolder) -> bool:
    """Whether a user asked for another attempt during this one."""
    record = folder.last("requeued", "verdict", "submitting")
    return record is not None and record["event"] == "requeued"


def requeue(element: str, restarts: int) -> str:
    """Put the running element back into the queue; what SLURM said if it would not. Already requeued is success.

    Where slurmctld is away it is asked again until it is back: the nodes are the job's until then. Or it has long
    started the next attempt elsewhere, and this node was cut off: that one is let be.
    """
    said, tries, end = "", 0, time.monotonic() + AWAY
    while tries < 3 and time.monotonic() < end:
        try:
            facts = cluster.show(element)
            if int(facts.get("Restarts", restarts)) > restarts or elsewhere(facts):
                return ""
            cluster.call("scontrol", "requeue", element, timeout=30)
            return ""
        except cluster.SlurmError as error:
            said = str(error)
            if "pending execution" in said:
                return ""
            if "presently disabled" in said:
                break  # for this job, or on this site: it will be no other in a second
        away = cluster.UNSURE.search(said)
        tries += not away
        time.sleep(5 if away else 2)
    return said


def elsewhere(facts: Mapping[str, str]) -> bool:
    """Whether SLURM runs the job on another batch host: it forgot that it had started it here."""
    return "SLURMD_NODENAME" in os.environ and facts.get("BatchHost", "") not in (
        "",
        os.environ["SLURMD_NODENAME"],
    )


def stay(element: str, restarts: int, seconds: float = AWAY) -> None:
    """Keep the batch script until the requeue, SLURM's own or ours, is surely written down.

    slurmctld saves what it knows every 5 s. Killed before that it has forgotten the requeue, and would take the end of
    the script for the end of the job. To stay longer than that would keep the nodes for KillWait.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(6)
        try:
            facts = cluster.show(element)
        except cluster.SlurmError:
            continue  # away: it may come back without the memory of it
        if facts.get("JobState") != "RUNNING" or int(facts.get("Restarts", 0)) > restarts or elsewhere(facts):
            return
        requeue(element, restarts)


def succeed(batch: Path, folder: RunFolder, attempt: str, element: str, *options: str) -> str:
    """Submit a successor of the element, and have what waits for it wait for that; why not, where SLURM refuses."""
    end = time.monotonic() + AWAY
    while True:
        try:
            job = successor.submit(batch, element, *options)
            break
        except OSError as error:  # a full disk
            return str(error)
        except cluster.SlurmError as error:
            if not cluster.UNSURE.search(str(error)) or time.monotonic() > end:
                return str(error)
            time.sleep(5)
    refusals = successor.move(element, job)
    with suppress(OSError):
        successor.take_over(folder, successor.place_of(batch, element), element)
        for refused in refusals:
            folder.note("refused", attempt=attempt, what="a new dependency", reason=refused)
        os.write(1, f"{folder.path.name}: job {job} goes on with it\n".encode())
    return ""


def ask(element: str) -> dict[str, str]:
    """What SLURM says of the job; where slurmctld is away, once it is back: until then it ends no job, nor starts one.

    A node that is cut off cannot tell this from its own case, in which the run may go on elsewhere by now.
    """
    end = time.monotonic() + AWAY
    while True:
        try:
            return cluster.show(element)
        except cluster.SlurmError as error:
            if not cluster.UNSURE.search(str(error)) or time.monotonic() > end:
                return {}
            time.sleep(5)


def change(element: str, *settings: str) -> str:
    """Change a requeued element, which SLURM allows only from the requeue on; what it said if it would not."""
    said = ""
    for wait in (0, 0.3, 1):
        time.sleep(wait)
        try:
            cluster.call("scontrol", "update", f"JobId={element}", *settings, timeout=20)
            return ""
        except cluster.SlurmError as error:
            said = str(error)
    return said


def main(arguments: list[str]) -> int:
    """`python -m launch.verdict BATCH EXIT_CODE`, on the batch host."""
    for warning in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(warning, signal.SIG_IGN)  # inherited by scontrol, which SLURM signals as well
    batch, exit_code = Path(arguments[0]), int(arguments[1])
    element = cluster.element_id()
    try:
        folder = of_element(batch, os.environ["SLURM_ARRAY_TASK_ID"])
    except LookupError as error:
        print(error, flush=True)
        return 1
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    attempt = f"{element}-{restarts}"
    found = of_attempt(folder, attempt, exit_code, batch / "slurm" / f"{element}_0_log.out")
    facts = ask(element)
    verdicts = [r for r in folder.journal if r["event"] == "verdict" and r.get("attempt") == attempt]
    spoken = verdicts[-1] if verdicts else {}
    if spoken.get("late"):
        print(f"{folder.path.name}: the attempt after {attempt} has spoken for it", flush=True)
        return 1
    restarted = int(facts.get("Restarts", restarts)) > restarts
    if not restarted and facts.get("JobState") == "RUNNING" and elsewhere(facts):
        print(f"{folder.path.name}: attempt {attempt} runs on {facts['BatchHost']} by now", flush=True)
        return 1
    gone = restarted or facts.get("Reason") == "NodeDown"
    lost = avoid.down(os.environ.get("SLURM_JOB_NODELIST", "")) if gone else ()
    found = judged(found, facts, restarts, asked=requested(folder), lost=lost)
    nodes = avoid.Nodes.of(batch.parent.parent, folder, facts)
    if (spoken.get("verdict"), spoken.get("reason")) == (found.verdict, found.reason):
        # This was killed after it had spoken; what it said counts, and once.
        again, wait, excluded = spoken["again"], spoken.get("delay", 0), tuple(spoken.get("excluded", ()))
    else:
        found = found if restarted else progress(folder, found)
        again = restarted or comes_back(folder, found.verdict)
        wait = delay(folder, found.verdict) if again else 0
        with suppress(OSError):
            nodes.blame(found, attempt)
        excluded = nodes.avoided() if again else ()
        stop = "" if again else held(folder, found.verdict)
        words = f"{folder.path.name}: attempt {attempt}: {found.verdict}{': ' * bool(found.reason)}{found.reason}\n"
        with suppress(OSError):  # a full disk keeps no run from coming back
            os.write(1, words.encode())  # print would try again at the exit, and change the exit code
        with suppress(OSError):
            speak(folder, attempt, found, again=again, delay=wait, excluded=excluded, held=stop)
    if not again:
        successor.drop(batch, element)
        lifeline.drop(batch.parent.parent, element)
    if found.verdict in ("finished", "cancelled"):
        return 0
    options = [f"--begin=now+{wait}"] * bool(wait)
    options += [text.replace("ExcNodeList", "--exclude") for text in nodes.settings(excluded)]
    said = ""
    if again and not restarted and limbo.worn(facts):
        if not (said := succeed(batch, folder, attempt, element, *options)):
            return 1
        with suppress(OSError):
            folder.note("refused", attempt=attempt, what="a new job", reason=said)
    if again and (restarted or not (said := requeue(element, restarts))):
        settings = nodes.settings(excluded) + ((f"StartTime=now+{wait}",) if wait else ())
        if settings and (refused := change(element, *settings)):
            with suppress(OSError):
                folder.note("refused", attempt=attempt, what=" ".join(settings), reason=refused)
        stay(element, restarts)
        return 1
    if again and (refused := succeed(batch, folder, attempt, element, *options)):
        words = f"requeue refused: {said}; a new job refused: {refused}"
        speak(folder, attempt, Finding("held", words), again=False)
    return 1  # holds back what depends on the run


if __name__ == "__main__":
    sys.exit(SPOKEN if main(sys.argv[1:]) else 0)
