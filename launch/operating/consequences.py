"""What follows from each of a cluster's settings for these runs: a fact a setting, in sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from launch.operating import settings
from launch.operating.ledger import brief
from launch.operating.settings import Partition, Site
from launch.spec import Duration

TESTED = (22, 5)  # the oldest SLURM that the tests run on


@dataclass(frozen=True)
class Fact:
    """One setting and what follows from it."""

    name: str
    value: str
    level: str  # ok, note, or warn: something is lost, or has to be done
    means: str


def facts(site: Site, partition: Partition) -> Iterator[Fact]:
    """Each fact that matters for runs on the partition."""
    version = site.get("SLURM_VERSION")
    yield Fact(
        "version",
        version,
        "ok" if site.version >= TESTED else "warn",
        "the project is tested on a real 22.05 and on what newer versions print"
        if site.version >= TESTED
        else "older than 22.05: what is said here, and what runs do, has not been tested on it",
    )
    yield from _preemption(site, partition)
    yield from _requeue(site)
    yield from _limits(site, partition)
    yield from _environment(site, partition)


def _preemption(site: Site, partition: Partition) -> Iterator[Fact]:
    kind = site.get("PreemptType")
    mode = partition.preempt_mode or site.get("PreemptMode") or "OFF"
    off = kind in ("", "preempt/none") or mode == "OFF"
    yield Fact(
        "PreemptType",
        kind or "preempt/none",
        "ok",
        "no job takes another's nodes; only walltimes and failures end an attempt"
        if kind in ("", "preempt/none")
        else f"jobs of a higher {'QOS' if kind.endswith('qos') else 'partition tier'} may take a run's nodes",
    )
    means = {
        "OFF": ("ok", "runs in this partition are not preempted"),
        "REQUEUE": (
            "ok",
            "SLURM puts a preempted run back into the queue, and it goes on from its last save",
        ),
        "CANCEL": (
            "warn",
            "SLURM cancels a preempted run instead of requeueing it: its own verdict puts it back, or submits a new "
            "job for it, in the grace or in KillWait; where a save takes longer the run is stopped: runs.py resubmit",
        ),
        "SUSPEND": (
            "warn",
            "a preempted run is stopped in its place with its memory kept, and its collectives may time out: "
            "use another partition for training",
        ),
    }
    word = next((name for name in ("CANCEL", "SUSPEND", "REQUEUE", "OFF") if name in mode), "OFF")
    yield Fact("PreemptMode", mode, *(means["OFF"] if off else means[word]))
    grace, wait = partition.grace, site.number("KillWait", 30)
    if kind.endswith("qos"):
        mine = {name for row in site.associations for name in row.get("QOS", "").split(",")}
        rows = [
            row for row in site.qos if row["Name"] in mine
        ] or site.qos  # the preempted job's own QOS counts
        grace = max(grace, min((settings.seconds(row.get("GraceTime", "")) for row in rows), default=0))
    yield Fact(
        "GraceTime",
        f"{grace} s",
        "ok" if grace or off else "note",
        f"a preempted run has {grace} s between the warning and the end"
        if grace
        else f"no grace: SIGTERM comes at once, and KillWait ({wait} s) is all the time there is to save; where a "
        "save takes longer, at most train.save_every steps are computed again",
    )
    words = site.parameters()
    sends = "send_user_signal" in words or "preempt_send_user_signal" in words
    yield Fact(
        "send_user_signal",
        "yes" if sends else "no",
        "ok",
        "preemption sends USR2 first, the same warning as before the walltime"
        if sends
        else "preemption sends SIGTERM alone, which the ranks take for the same warning",
    )
    yield Fact(
        "KillWait",
        f"{wait} s",
        "warn" if wait < 20 and not off and not grace else "ok",
        f"from SIGTERM to SIGKILL; ranks that have not saved by then lose what they did since the last save"
        f"{', and this is short' if wait < 20 and not off and not grace else ''}",
    )
    if exempt := settings.seconds(site.get("PreemptExemptTime")):
        yield Fact(
            "PreemptExemptTime", brief(exempt), "ok", "a run is not preempted before it has run so long"
        )


def _requeue(site: Site) -> Iterator[Fact]:
    yield Fact(
        "JobRequeue",
        site.get("JobRequeue") or "1",
        "ok",
        "jobs say --requeue themselves, so they come back whatever the site's default is",
    )
    for key, what in (
        (
            "RequeueExit",
            "SLURM requeues it by itself, on top of the verdict's budgets: it may come back for ever",
        ),
        ("RequeueExitHold", "SLURM holds it in the queue instead of ending it: runs.py requeue lets it go"),
    ):
        codes = site.get(key)
        ours = any(_covers(part, 1) for part in codes.split(",")) if codes else False
        yield Fact(
            key,
            codes or "none",
            "warn" if ours else "ok",
            f"a failed run ends with 1, and then {what}"
            if ours
            else "a run's own exit codes, 0 and 1, are not in it",
        )
    words = site.parameters()
    most = site.number("MaxBatchRequeue", 5)
    kept = "nohold_on_prolog_fail" in words
    yield Fact(
        "MaxBatchRequeue",
        str(most),
        "ok" if kept else "note",
        f"SLURM holds a job at its {most}th launch that was lost with a node"
        + ("" if kept else ", and at once where a node's prolog fails for it")
        + ": a job leaves for a new one before, and any other run at work, or runs.py wait, lets go what is held"
        + ("" if kept else "; for the last run alive ask for SchedulerParameters=nohold_on_prolog_fail"),
    )
    delay = words.get("requeue_delay") or words.get("cred_expire") or "120"
    wait = int(delay) if delay.isdigit() else 120
    fast = "enable_expedited_requeue" in words
    yield Fact(
        "requeue delay",
        f"{wait} s",
        "note" if wait > 120 and not fast else "ok",
        f"a requeued run waits {wait} s, and for the scheduler's next pass, before it can start again"
        + ("; the site offers --requeue=expedite (cluster.sbatch) for sooner" if fast else ""),
    )
    invalid = "kill_invalid_depend" in words
    yield Fact(
        "kill_invalid_depend",
        "yes" if invalid else "no",
        "ok",
        "runs below a run that failed are cancelled by SLURM: jobs ask for that themselves",
    )
    if depth := words.get("max_depend_depth"):
        yield Fact(
            "max_depend_depth", depth, "ok" if int(depth or 0) >= 3 else "warn", "a chain has three stages"
        )
    age = site.number("MinJobAge", 300)
    yield Fact(
        "MinJobAge",
        f"{age} s",
        "ok",
        f"SLURM forgets a job {brief(age)} after its end; runs.py requeue works until then, resubmit always",
    )
    yield Fact(
        "SlurmdTimeout",
        f"{site.number('SlurmdTimeout', 300)} s",
        "note" if site.number("SlurmdTimeout", 300) > 600 else "ok",
        f"a node that dies is noticed after about {brief(site.number('SlurmdTimeout', 300))}, and its runs requeued",
    )


def _limits(site: Site, partition: Partition) -> Iterator[Fact]:
    size = site.number("MaxArraySize", 1001)
    yield Fact(
        "MaxArraySize",
        str(size),
        "ok" if size > 1 else "warn",
        f"an array holds indices up to {size - 1}; a sweep of more runs needs more than one"
        if size > 1
        else "job arrays are switched off, and every run is an array element: ask the administrators for them",
    )
    jobs = site.number("MaxJobCount", 10000)
    yield Fact(
        "MaxJobCount", str(jobs), "ok", "all users' jobs together; every element of an array counts as one"
    )
    words = site.parameters()
    depth, planned = words.get("default_queue_depth", "100"), words.get("bf_max_job_array_resv", "20")
    yield Fact(
        "default_queue_depth",
        depth,
        "ok",
        f"SLURM looks at {depth} jobs when one ends, and each run of a sweep is a job of its own: hundreds of runs of "
        "seconds press it, so give each more steps, or throttle the sweep",
    )
    yield Fact(
        "bf_max_job_array_resv",
        planned,
        "ok",
        f"a sweep's runs start in its order, and backfill plans ahead for the first {planned}: name the longest first",
    )
    for row in site.associations:
        where = row.get("Account", "") + (f" on {row['Partition']}" if row.get("Partition") else "")
        for key, what in (("MaxSubmit", "in the queue"), ("MaxJobs", "running")):
            if row.get(key):
                means = f"your account may have {row[key]} jobs {what} at a time; every run of a sweep is one"
                yield Fact(f"{key} of {where}", row[key], "note", means)
        if row.get("GrpTRES"):
            means = "all jobs of your account together; what is more waits with the reason AssocGrp...Limit"
            yield Fact(f"GrpTRES of {where}", row["GrpTRES"], "note", means)
    mine = {name for row in site.associations for name in row.get("QOS", "").split(",")}
    for row in site.qos:
        limits = [f"{key}={row[key]}" for key in settings.QOS[4:] if row.get(key)]
        if limits and (row["Name"] in mine or not mine):
            means = f"limits of the QOS {row['Name']}: beyond them sbatch refuses, or jobs wait with reason QOS...Limit"
            yield Fact(f"QOS {row['Name']}", " ".join(limits), "note", means)
    most = partition.max_time
    yield Fact(
        "MaxTime",
        str(Duration(most)) if most else "UNLIMITED",
        "note" if most and most < 3600 else "ok",
        "a run that needs longer than its walltime saves, requeues itself and goes on"
        + (
            "; with so short a limit, loading is a large part of each attempt" if most and most < 3600 else ""
        ),
    )
    enforce = site.get("EnforcePartLimits") or "NO"
    yield Fact(
        "EnforcePartLimits",
        enforce,
        "ok" if enforce != "NO" else "note",
        "sbatch refuses at once what the partition cannot give"
        if enforce != "NO"
        else "what the partition cannot give is accepted and waits for ever; explain says so (PartitionNodeLimit...)",
    )


def _environment(site: Site, partition: Partition) -> Iterator[Fact]:
    yield Fact(
        "accounting",
        site.accounting or site.get("AccountingStorageType").removeprefix("accounting_storage/"),
        "note" if site.accounting else "ok",
        "status and explain go by the runs' own journals; only how jobs ended that had no time for a verdict is lost"
        if site.accounting
        else "sacct knows how every attempt ended, also those that had no time for a verdict",
    )
    enforced = site.get("AccountingStorageEnforce")
    accounts = sorted({row.get("Account", "") for row in site.associations} - {""})
    if "associations" in enforced or "limits" in enforced:
        yield Fact(
            "accounts",
            ", ".join(accounts) or "none",
            "ok" if accounts else "warn",
            "jobs are billed to cluster.account, else to your default account"
            if accounts
            else f"SLURM wants an account, and {site.user} has none here: sbatch will refuse; ask the administrators",
        )
    else:
        yield Fact(
            "AccountingStorageEnforce",
            enforced or "none",
            "ok",
            "SLURM takes any account and QOS, in sbatch as in its --test-only: a misspelt one is nobody's error here",
        )
    if partition.accounts and not set(partition.accounts) & set(accounts):
        allowed = ", ".join(partition.accounts)
        means = (
            f"the partition is for {allowed}, and you have none of them: sbatch will refuse, or the job wait"
        )
        yield Fact("AllowAccounts", allowed, "warn", means)
    track = site.get("ProctrackType").removeprefix("proctrack/")
    yield Fact(
        "ProctrackType",
        track or "unknown",
        "ok" if "cgroup" in track else "note",
        "all processes of a job end with it"
        if "cgroup" in track
        else "a process that leaves its tree may outlive its job; runs are fenced, so that it cannot write",
    )
    select = site.get("SelectType").removeprefix("select/")
    has = partition.gpus > 0
    yield Fact(
        "GPUs",
        f"{partition.gpus} in {partition.name}, {select}",
        "ok" if has and "linear" not in select else "note",
        "asked for by --gres=gpu"
        if has
        else "none that SLURM counts, so the preset says device: cpu; where there are some, device: cuda, gres: false",
    )
    for key in ("JobSubmitPlugins", "CliFilterPlugins"):
        if value := site.get(key):
            means = (
                "the site's own rules may change or refuse what is submitted; what sbatch says is passed on"
            )
            yield Fact(key, value, "note", means)


def _covers(part: str, code: int) -> bool:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
    return bool(match) and int(match[1]) <= code <= int(match[2] or match[1])  # type: ignore[index]
