"""SLURM's words, and the verdicts', in sentences: why a job waits, how one ended, and what can be done
about it.

The reasons are those of squeue(1), JOB REASON CODES, up to SLURM 25; one that is not here is passed on as
it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """One family of SLURM's reasons for a job that waits."""

    pattern: str
    cause: str  # one word for programs
    text: str  # a sentence; {reason} is SLURM's own word, {parent} the run above
    todo: str = ""


WAITING = (
    Reason(r"^Priority$", "priority", "jobs with a higher priority go first"),
    Reason(r"^Resources$", "resources", "it is among the next; the nodes it needs are not free yet"),
    Reason(r"^None$|^$", "new in queue", "SLURM has not looked at it yet", "look again in a minute"),
    Reason(
        r"NeverSatisfied",
        "blocked",
        "it waits for {parent}, which has ended without finishing, so it will never start",
        "runs.py resubmit, with the run above and this one",
    ),
    Reason(r"^Dependency$", "dependency", "it starts when {parent} has finished"),
    Reason(
        r"^BeginTime$",
        "begin time",
        "SLURM lets a requeued job start only after a delay (two minutes, unless the site chose another)",
    ),
    Reason(
        r"requeued.held|JobLaunchFailure|launch.failed",
        "launch failed",
        "SLURM could not launch it on its nodes, several times, and holds it",
        "tell the administrators which nodes; runs.py requeue lets it go",
    ),
    Reason(r"JobHeldUser", "held", "it is held by its user", "runs.py requeue lets it go"),
    Reason(
        r"JobHeldAdmin",
        "held by admin",
        "an administrator holds it, or SLURM after too many failed launches",
        "runs.py requeue tries to let it go; if SLURM refuses, ask the administrators",
    ),
    Reason(r"RequeueHold|SpecialExit", "held", "it was requeued and is held", "runs.py requeue lets it go"),
    Reason(
        r"^JobArrayTaskLimit$",
        "throttle",
        "as many runs of its array are running as the array's own limit allows",
        "runs.py throttle RUN 0 takes the limit away",
    ),
    Reason(
        r"^PartitionTimeLimit$",
        "over partition limit",
        "its walltime is longer than the partition allows, so it will never start",
        "cancel it, lower cluster.walltime (runs save and requeue themselves), and submit again",
    ),
    Reason(
        r"^PartitionNodeLimit$",
        "over partition limit",
        "it asks for more nodes than the partition gives one job",
        "cancel it, and submit with fewer gpus or another cluster.partition",
    ),
    Reason(r"^Partition(Down|Inactive)$", "partition down", "its partition is closed at the moment"),
    Reason(
        r"^ReqNodeNotAvail.*[Mm]aint|Reserved_for_maintenance|^MaintReservation",
        "maintenance",
        "its nodes are reserved for maintenance before it could end",
        "a shorter cluster.walltime may fit in before it",
    ),
    Reason(
        r"^ReqNodeNotAvail|^NodeDown|^Nodes_required|Nodes required for job are",
        "nodes unavailable",
        "nodes that it needs are down, drained or reserved ({reason})",
    ),
    Reason(r"^Reserv", "reservation", "it waits for a reservation ({reason})"),
    Reason(
        r"(Max|Grp).*(PerJob|Job)Limit$|^QOSMin|MaxWallDuration|MaxWallDurationPerJob|MaxMemPerLimit",
        "over a limit",
        "it asks for more than a limit allows one job ({reason}), so it will never start",
        "cancel it, ask for less, or use another account or qos",
    ),
    Reason(
        r"^(Assoc|QOS).*(Grp|Max)|MaxJobs|MaxSubmit|(Assoc|QOS).*Limit",
        "limit reached",
        "a limit of your account or QOS is reached ({reason}); it starts when other jobs end",
    ),
    Reason(
        r"^(Invalid|BadConstraints|AccountNotAllowed|QOSNotAllowed|.*NotAllowed)",
        "refused",
        "SLURM does not allow it as it was submitted ({reason}), so it will never start",
        "cancel it, correct the cluster's preset, and submit again",
    ),
    Reason(r"^Licenses$", "licenses", "the licences it asks for are in use"),
    Reason(
        r"^(Prolog|Cleaning|BurstBuffer.*|StageIn.*)$", "preparing", "its nodes are being prepared ({reason})"
    ),
    Reason(r"", "other", "SLURM says {reason}"),
)


def waiting(reason: str) -> Reason:
    """The family of one of SLURM's reasons."""
    return next(row for row in WAITING if re.search(row.pattern, reason))


# verdict: (what happened to the attempt, what to do when the run does not come back by itself)
VERDICTS = {
    "finished": ("finished", ""),
    "preempted": (
        "was preempted",
        "submit.py with its experiment, or runs.py resubmit, goes on from the save",
    ),
    "timeout": ("reached its walltime", "runs.py resubmit goes on from the last save"),
    "infrastructure": (
        "was lost to its nodes or the network",
        "runs.py resubmit, when the cluster is well again",
    ),
    "full disk": ("could not write to a full disk", "make room, or lower train.keep; then runs.py resubmit"),
    "hang": ("hung", "runs.py logs has the stacks of all ranks; runs.py resubmit goes on from the last save"),
    "out of memory": (
        "ran out of memory",
        "lower train.micro_batch or data.max_length, or set train.recompute; then runs.py resubmit",
    ),
    "no progress": ("made no step more than those before it", "runs.py logs; the same step fails each time"),
    "error": ("failed with an error", "runs.py logs has the traceback; mend it, then runs.py resubmit"),
    "bad spec": ("cannot run as it was asked to", "correct the spec or its data, then submit again"),
    "divergence": (
        "diverged",
        "lower train.optim.lr or look at the data; what is saved from before can be kept",
    ),
    "cancelled": ("was cancelled", "runs.py resubmit --only cancelled goes on from the last save"),
    "held": ("could not go back into the queue", "runs.py requeue, or runs.py resubmit"),
}

# How SLURM says a job ended, for one that had no time for a verdict (squeue(1), JOB STATE CODES).
ENDS = {
    "TIMEOUT": "it reached its walltime, and was killed before it could save",
    "OUT_OF_MEMORY": "it used more memory than its node gave it, and was killed",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not boot",
    "DEADLINE": "it could not have ended before its deadline",
    "PREEMPTED": "it was preempted before it could speak, and the site cancels such jobs instead of requeueing them",
    "FAILED": "its batch script failed before the ranks started",
    "COMPLETED": "its batch script ended well, and the ranks left nothing",
    "REVOKED": "its cluster in the federation gave it away",
    "CANCELLED": "it was cancelled with scancel",
}
