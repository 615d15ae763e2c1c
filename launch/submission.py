"""Submission as a transaction: intent, sbatch, record; what a killed submitter left is adopted, never doubled.

A batch is one array: its folder holds the plan that the ranks read, the script, and, once SLURM has answered, the job's
id. Everything the job needs is written before sbatch, under names that do not depend on the answer. The batch's token
is the job's comment, by which a job whose answer was lost is found again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch import arrays, cluster, script
from launch.operating.status import OPEN, State, batch_of, state_of
from launch.plan import Plan, Run, StagePlan, runs_folder
from launch.record import append_line, flush_all, read_json, write_json, write_text
from launch.recovery import avoid, limbo

# What sbatch says when it has not heard, rather than been refused.
UNSURE = re.compile(
    r"timed out|no answer|unable to contact|zero bytes|connection (refused|reset)", re.IGNORECASE
)


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


@contextmanager
def locked(runs: Path) -> Iterator[int]:
    """One submitter at a time in a folder of runs; others wait. Yields the lock, for a child that must hold it too."""
    runs.mkdir(parents=True, exist_ok=True)
    with open(runs / ".submit.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def token_of(runs: Sequence[Run], folder: Path) -> str:
    """The next free token of these runs: readable, and the same on every call until it is used."""
    facts = hashlib.sha256("".join(f"{run.index}:{run.identity}" for run in runs).encode()).hexdigest()[:10]
    base = f"{runs[0].experiment.replace('/', '-')}-{facts}"
    attempt = 0
    while (folder / "batches" / f"{base}-{attempt}").exists():
        attempt += 1
    return f"{base}-{attempt}"


def adopt(folder: Path, queue: Mapping[str, cluster.Job]) -> None:
    """Find the jobs of batches whose submitter died before it could write down their ids."""
    by_token = {job.comment: job.id.partition("_")[0] for job in queue.values() if job.comment}
    for path in sorted((folder / "batches").glob("*/batch.json")):
        facts = read_json(path) or {}
        if facts.get("state") == "intent" and (job := by_token.get(path.parent.name)):
            write_json(path, {**facts, "state": "submitted", "job": job, "adopted": True})


def prepare(batch: Batch, code: Path) -> None:
    """Write all that the job will read, then the intent."""
    for run in batch.runs:
        run.folder.path.mkdir(parents=True, exist_ok=True)
        write_json(run.folder.spec_file, run.settings, flush=False)
        write_json(run.folder.run_file, run.record(code.name), flush=False)
    (batch.folder / "slurm").mkdir(parents=True, exist_ok=True)
    write_json(
        batch.folder / "plan.json",
        {
            "version": 1,
            "code": str(code),
            "runs": {str(batch.element(run)): str(run.folder.path) for run in batch.runs},
        },
    )
    if batch.stage.spec.cluster.executor == "slurm":
        write_text(batch.folder / "script.sbatch", batch.script(code))
    write_json(batch.folder / "batch.json", {"state": "intent", "token": batch.token})
    for run in batch.runs:
        facts = {"batch": str(batch.folder), "index": batch.element(run), "code": code.name}
        record = {"event": "submitting", "time": round(time.time(), 3), **facts}
        append_line(run.folder.journal_file, record, flush=False)
    flush_all(
        file
        for run in batch.runs
        for file in (run.folder.spec_file, run.folder.run_file, run.folder.journal_file)
    )


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
        raise cluster.SlurmError(
            "sbatch: not found; is this a SLURM login node? cluster=local runs here"
        ) from None
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
        if not job and UNSURE.search(said):
            # The request may still be under way. The intent stays, and whoever submits next looks for the job again.
            raise cluster.SlurmError(f"{said}; whether it took the job will show")
        if not job:
            write_json(
                batch.folder / "batch.json", {"state": "refused", "token": batch.token, "reason": said}
            )
            raise cluster.SlurmError(said or "sbatch printed no job id")
    write_json(batch.folder / "batch.json", {"state": "submitted", "token": batch.token, "job": job})
    return job


def elements(stages: Sequence[StagePlan], states: Mapping[str, State]) -> dict[str, str]:
    """The SLURM element of each run that has yet to finish, by run name."""
    found = {}
    for stage in stages:
        for run in stage.runs:
            if states[run.name].name in OPEN and (batch := batch_of(run.folder)) and "job" in batch[0]:
                found[run.name] = f"{batch[0]['job']}_{batch[1]}"
    return found


def states_of(plan: Plan, queue: Mapping[str, cluster.Job] | None) -> dict[str, State]:
    """The state of every run of the plan and of the stages before it, by run name."""
    return {
        run.name: state_of(run.folder, queue) for stage in (*plan.earlier, *plan.stages) for run in stage.runs
    }


def missing(stage: StagePlan, states: Mapping[str, State]) -> list[Run]:
    """The stage's runs that are neither done nor in the queue with a chance to start."""
    return [run for run in stage.runs if states[run.name].name not in (*OPEN, "held", "done", "unknown")]


def submit(plan: Plan, code: Path) -> Iterator[tuple[Batch, str]]:
    """Submit what is missing, upstream first; yields each batch with its job's id; raises SlurmError."""
    root = runs_folder(plan.stages[0].spec)
    with locked(root) as lock:
        queue = cluster.jobs()
        adopt(root, queue)
        limbo.look(root)
        states = states_of(plan, queue)
        jobs = elements((*plan.earlier, *plan.stages), states)
        size = 0  # of an array, once SLURM has said that there is a limit
        for stage in plan.stages:
            left = arrays.groups(missing(stage, states), jobs, size)
            while left:
                group = left.pop(0)
                batch = Batch(stage, group.runs, group.dependency, token_of(group.runs, root), group.offset)
                if dead := [states[run.name].job for run in group.runs if states[run.name].name == "blocked"]:
                    cluster.call("scancel", *dead)  # they wait for what has failed, and would wait for ever
                prepare(batch, code)
                for run in group.runs:
                    if states[run.name].attempts:
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


def preview(plan: Plan, states: Mapping[str, State], code: Path) -> Iterator[Batch]:
    """The batches that `submit` would send now; stages not yet submitted stand in dependencies by their names."""
    jobs = elements((*plan.earlier, *plan.stages), states)
    for stage in plan.stages:
        for group in arrays.groups(missing(stage, states), jobs):
            yield Batch(stage, group.runs, group.dependency, token_of(group.runs, runs_folder(stage.spec)))
            name = stage.experiment.name.replace("/", "-").replace("_", "-")
            jobs |= {run.name: f"<job of {name}>_{run.index}" for run in group.runs}


def host() -> str:
    """This machine's name, for records of local processes."""
    return os.uname().nodename
