"""Submission as a transaction: intent, sbatch, record; what a killed submitter left is adopted, never doubled.

A batch is one array: its folder holds the plan that the ranks read, with all runs that are new (launch.batches), the
script, and, once SLURM has answered, the job's id. Everything the job needs is written before sbatch, under names that
do not depend on the answer. The batch's token is the job's comment, by which a job whose answer was lost is found
again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from launch import arrays, batches, cluster, identity, script
from launch.batches import Batches
from launch.files import append_line, flush_all, read_json, sync_folder, write_json, write_text
from launch.once import uncollected
from launch.operating.status import OPEN, State, judge
from launch.operating.survey import read_all
from launch.plan import Plan, Run, StagePlan, runs_folder
from launch.recovery import avoid, limbo

NO_LOCKS = (
    "{} cannot be locked ({}), which keeps two submitters from sending the same runs\n"
    "  hint: have its file system mounted with locks (Lustre: `flock`, or `localflock` where all submit from one node; "
    "NFS: its lock service), or say runs=FOLDER on one that has them"
)
NOT_HERE = "sbatch: not found; is this a SLURM login node? cluster=local runs here"


@dataclass(frozen=True)
class Batch:
    """One array to submit: these runs of one stage, after that dependency."""

    stage: StagePlan
    runs: tuple[Run, ...]
    dependency: str  # as in --dependency=, empty for none
    token: str
    offset: int = 0  # an element is its run's index less this

    def element(self, run: Run) -> int:
        """The run's index in this array."""
        return run.index - self.offset

    @property
    def folder(self) -> Path:
        return runs_folder(self.stage.spec) / "batches" / self.token

    def script(self, code: Path) -> str:
        """The sbatch script."""
        indices = [self.element(run) for run in self.runs]
        name = self.stage.experiment.name.replace("/", "-")
        return script.script(self.stage.spec, name, indices, self.folder, code, self.token)

    def command(self) -> list[str]:
        """The sbatch command. The dependency stands here, as it alone is not known before the stage above is in."""
        after = [f"--dependency={self.dependency}"] if self.dependency else []
        spec, on = self.stage.spec, self.stage.spec.cluster
        away = avoid.options(runs_folder(spec), on.exclude, on.partition, spec.nodes)
        return ["sbatch", "--parsable", *after, *away, str(self.folder / "script.sbatch")]


class NoLockError(OSError):
    """The file system of the runs has no locks; the text says what to do."""

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def locked(runs: Path) -> Iterator[int]:
    """One submitter at a time in a folder of runs; others wait. Yields the lock, for a child that must hold it too."""
    runs.mkdir(parents=True, exist_ok=True)
    with open(runs / batches.LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise NoLockError(error.errno, NO_LOCKS.format(runs, error.strerror), file.name) from None
        yield file.fileno()


def token_of(runs: Sequence[Run], folder: Path) -> str:
    """The next free token of these runs: readable, and the same on every call until it is used."""
    facts = hashlib.sha256("".join(f"{run.index}:{run.identity}" for run in runs).encode()).hexdigest()[:10]
    base = f"{runs[0].experiment.replace('/', '-')}-{facts}"
    taken = [f"{path.name}-" for path in (folder / "batches").glob("*")]
    attempt = 0
    while any(name.startswith(f"{base}-{attempt}-") for name in taken):
        attempt += 1
    return f"{base}-{attempt}"


def unique(token: str) -> str:
    """The token as it is sent: SLURM may know jobs of the same runs in another folder, or in one that was removed."""
    return f"{token}-{os.urandom(4).hex()}"


def adopt(folder: Path, jobs: Callable[[], Mapping[str, cluster.Job]]) -> None:
    """Find the jobs of batches whose submitter died before it could write down their ids."""
    lost = []
    for token in batches.tokens(str(folder)):
        facts = read_json(path := folder / "batches" / token / "batch.json") or {}
        if facts.get("state") == "intent":
            lost.append((path, facts))
    for path, facts in lost:
        if job := cluster.array_of(path.parent.name, jobs()):
            write_json(path, {**facts, "state": "submitted", "job": job, "adopted": True})


def prepare(batch: Batch, code: Path, began: Collection[str] = (), after: float = 0.0) -> None:
    """Write all that the job will read, then the intent.

    A run that is new is an entry of the plan, of which its job makes the folder; those that `began` have one, by name.
    The batch is later than `after`, whatever this machine's clock says: of two that have a run the later one counts.
    """
    now = round(max(time.time(), after + 0.001), 3)
    there = [run for run in batch.runs if run.name in began]
    for run in there:
        write_json(run.folder.spec_file, run.settings, flush=False)
        write_json(run.folder.run_file, run.record(code.name), flush=False)
    (batch.folder / "slurm").mkdir(parents=True, exist_ok=True)
    texts = {"plan.json": _plan(batch, code, now, began)}
    if batch.stage.spec.cluster.executor == "slurm":
        texts["script.sbatch"] = batch.script(code)
    for name, text in texts.items():
        write_text(batch.folder / name, text, flush=False)
        sync_folder(batch.folder / name)
    batches.tell(str(batch.folder.parent.parent), batch.token)
    here = {"host": host()} if batch.stage.spec.cluster.executor == "local" else {}
    write_json(batch.folder / "batch.json", {"state": "intent", "token": batch.token, **here})
    for run in there:
        facts = {"batch": str(batch.folder), "index": batch.element(run), "code": code.name}
        append_line(run.folder.journal_file, {"event": "submitting", "time": now, **facts}, flush=False)
    if there:
        flush_all(
            file
            for run in there
            for file in (run.folder.spec_file, run.folder.run_file, run.folder.journal_file)
        )


def _plan(batch: Batch, code: Path, now: float, began: Collection[str]) -> str:
    """plan.json's text. A sweep's points are told by what differs, most of which they share as objects."""
    elements = {str(batch.element(run)): run for run in batch.runs}
    folders = {index: str(run.folder.path) for index, run in elements.items()}
    new = {index: (run, run.record(code.name)) for index, run in elements.items() if run.name not in began}
    common: dict[str, Any] = {}
    changed: dict[str, list[list[Any]]] = {}
    if new:
        first, record = next(iter(new.values()))
        common = {"run": record, "spec": first.settings}
        changed = {
            index: [*batches.changes(record, own, "run"), *identity.changes(first.spec, run.spec, "spec")]
            for index, (run, own) in new.items()
        }
    return batches.text(str(code), now, str(batch.folder.parent.parent), folders, common, changed)


def send(batch: Batch, lock: int) -> str:
    """Hand the batch to SLURM and return the job's id; raises SlurmError when SLURM refused.

    sbatch holds the lock as well: where this process is killed, the next submitter waits until sbatch has ended, and
    then finds the job by its token.
    """
    command = batch.command()
    try:
        done = subprocess.run(
            command,
            env=cluster.environment(),
            capture_output=True,
            text=True,
            timeout=120,
            cwd=batch.folder,
            pass_fds=(lock,),
        )
        said, job = done.stderr.strip(), done.stdout.strip().partition(";")[0]
    except FileNotFoundError:
        raise cluster.SlurmError(NOT_HERE) from None
    except subprocess.TimeoutExpired:
        said, job = "sbatch: no answer within 120 s", ""
    if not job.isdigit():
        # The answer may be lost and the job there: look before anything is said or sent again.
        for wait in (1, 4):
            time.sleep(wait)
            try:
                job = cluster.array_of(batch.token, cluster.jobs())
            except cluster.SlurmError:
                continue
            break
        if not job and cluster.UNSURE.search(said):
            # The request may still be under way. The intent stays, and whoever submits next looks for the job again.
            raise cluster.SlurmError(f"{said}; whether it took the job will show")
        if not job:
            write_json(
                batch.folder / "batch.json", {"state": "refused", "token": batch.token, "reason": said}
            )
            raise cluster.SlurmError(said or "sbatch printed no job id")
    write_json(batch.folder / "batch.json", {"state": "submitted", "token": batch.token, "job": job})
    return job


@dataclass(frozen=True)
class Seen:
    """A plan's runs, and those before them, at one moment: what there is of each, by name."""

    states: Mapping[str, State]
    began: frozenset[str]  # have a folder
    batches: Mapping[str, str]  # the newest batch's folder of those that have one
    asked: float  # when the last of these was written

    def elements(self) -> dict[str, str]:
        """The SLURM element of each run that has yet to finish."""
        return {name: s.job for name, s in self.states.items() if s.name in OPEN and "_" in s.job}


def look(plan: Plan, jobs: Callable[[], Mapping[str, cluster.Job]] | None) -> Seen:
    """The states of the plan's runs and of those before them; SLURM is asked where that has a bearing on one."""
    runs = [run for stage in (*plan.earlier, *plan.stages) for run in stage.runs]
    known = Batches()
    facts = read_all([str(run.folder.path) for run in runs], known)
    asked = jobs and any(one.done is None and one.batch and "pid" not in known[one.batch] for one in facts)
    queue = jobs() if jobs and asked else None
    if queue is not None:  # what left the queue before it was asked has said by now why
        facts = read_all([str(run.folder.path) for run in runs], known)
    return Seen(
        {run.name: judge(one, queue, known) for run, one in zip(runs, facts, strict=True)},
        frozenset(run.name for run, one in zip(runs, facts, strict=True) if one.made),
        {run.name: one.batch for run, one in zip(runs, facts, strict=True)},
        max((one.asked for one in facts), default=0.0),
    )


def missing(stage: StagePlan, states: Mapping[str, State]) -> list[Run]:
    """The stage's runs that are neither done nor in the queue with a chance to start."""
    return [run for run in stage.runs if states[run.name].name not in (*OPEN, "held", "done", "unknown")]


def submit(plan: Plan, code: Path) -> Iterator[tuple[Batch, str]]:
    """Submit what is missing, upstream first; yields each batch with its job's id; raises SlurmError."""
    root = runs_folder(plan.stages[0].spec)
    with locked(root) as lock, uncollected():
        if not shutil.which("sbatch"):
            raise cluster.SlurmError(NOT_HERE)
        queue = cache(cluster.jobs)
        adopt(root, queue)
        if batches.tokens(str(root)):
            limbo.look(root)
        seen = look(plan, queue)
        jobs = seen.elements()
        size = 0  # of an array, once SLURM has said that there is a limit
        for stage in plan.stages:
            left = arrays.groups(missing(stage, seen.states), jobs, size)
            while left:
                group = left.pop(0)
                token = unique(token_of(group.runs, root))
                batch = Batch(stage, group.runs, group.dependency, token, group.offset)
                _clear(group.runs, seen)
                prepare(batch, code, seen.began, seen.asked)
                for run in group.runs:
                    if seen.states[run.name].attempts:
                        run.folder.note("released")  # asked for anew, the run has its budgets anew
                try:
                    job = send(batch, lock)
                except cluster.SlurmError as refusal:
                    parts, most = arrays.smaller(group, str(refusal), size)
                    if not parts and most == size:
                        raise
                    if most != size:
                        size = most
                        runs = [run for one in (group, *left) for run in one.runs]
                        left = arrays.groups(runs, jobs, size)
                    else:
                        left = [*parts, *left]
                    continue
                jobs |= {run.name: f"{job}_{batch.element(run)}" for run in group.runs}
                yield batch, job


def _clear(runs: Sequence[Run], seen: Seen) -> None:
    """Cancel what waits for something that has failed, and would wait for ever."""
    states = {run.name: seen.states[run.name] for run in runs}
    dead = [(state.job, seen.batches[name]) for name, state in states.items() if state.name == "blocked"]
    if dead:
        cluster.call("scancel", *arrays.named((job.partition("_")[0], batch, job) for job, batch in dead))


def preview(plan: Plan, seen: Seen, code: Path) -> Iterator[Batch]:
    """The batches that `submit` would send now; stages not yet submitted stand in dependencies by their names."""
    jobs = seen.elements()
    for stage in plan.stages:
        for group in arrays.groups(missing(stage, seen.states), jobs):
            yield Batch(stage, group.runs, group.dependency, token_of(group.runs, runs_folder(stage.spec)))
            name = stage.experiment.name.replace("/", "-").replace("_", "-")
            jobs |= {run.name: f"<job of {name}>_{run.index}" for run in group.runs}


def host() -> str:
    """This machine's name, for records of local processes."""
    return os.uname().nodename
