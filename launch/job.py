"""One attempt at one run, on one rank: `python -m launch.job BATCH [INDEX]`, started by srun or on this machine.

It knows two paths, the batch and the run; all else is read from the run folder. Nothing heavy is imported until the
warning is held back, the log is in place and the code is the one the run was submitted with.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import caches
from launch.batches import entry_of
from launch.files import read_json, write_json
from launch.preemption import Preemption
from launch.record import RunFolder, of_element
from launch.recovery.causes import kind
from launch.recovery.pulse import Pulse
from launch.recovery.watch import DUMP, Limits
from launch.redact import environment_secrets, redact_text

EXIT_ERROR = 1


@dataclass(frozen=True)
class Place:
    """This process among the ranks of the attempt."""

    rank: int
    local_rank: int
    world: int
    node: str
    attempt: str  # names the attempt: the element's id and SLURM's count of restarts

    @classmethod
    def read(cls, env: Mapping[str, str] = os.environ) -> Place:
        """From what srun or submitit's local controller exports."""
        if "SLURM_PROCID" in env and env.get("SUBMITIT_EXECUTOR") == "slurm":
            from launch.cluster import element_id

            return cls(
                rank=int(env["SLURM_PROCID"]),
                local_rank=int(env["SLURM_LOCALID"]),
                world=int(env["SLURM_NTASKS"]),
                node=env.get("SLURMD_NODENAME", os.uname().nodename),
                attempt=f"{element_id(env)}-{env.get('SLURM_RESTART_COUNT', '0')}",
            )
        return cls(
            rank=int(env["SUBMITIT_LOCAL_GLOBALID"]),
            local_rank=int(env["SUBMITIT_LOCAL_LOCALID"]),
            world=int(env["SUBMITIT_LOCAL_NTASKS"]),
            node="localhost",
            attempt=f"local-{env['SUBMITIT_LOCAL_JOB_ID']}",
        )


@dataclass(frozen=True)
class StageJob:
    """One attempt at one run, on one rank."""

    batch: Path
    index: int

    def __call__(self, place: Place, warned: Preemption) -> int:
        try:
            folder = of_element(self.batch, str(self.index))
            folder.make(entry_of(str(self.batch), str(self.index)))
        except (LookupError, OSError) as error:
            print(error, flush=True)
            return EXIT_ERROR
        self._redirect(folder.log_of(place.attempt, place.rank))
        faulthandler.enable()  # a crash in C writes its stack
        faulthandler.register(DUMP, all_threads=True)  # so does the watch, by asking
        if place.rank == 0:
            # SLURM says when the job began from 23.02 on; before, what lies between is counted as queue.
            job_started = float(os.environ.get("SLURM_JOB_START_TIME") or 0.0)
            folder.note("launched", attempt=place.attempt, node=place.node, job_started=job_started)
        try:
            code = Path((read_json(self.batch / "plan.json") or {})["code"])
            self._check_code(code)
            os.environ.update(caches.on_node(code.name))
            limits = Limits.of(folder.spec)
            pulse = Pulse(folder.logs(place.attempt), place.rank, place.node, min(5.0, limits.every))
            from launch.stage import run_stage

            outcome = run_stage(folder, place, warned, pulse)
        except BaseException as error:
            self._fail(folder, place, error)
            return EXIT_ERROR
        print(f"rank {place.rank}: {outcome}", flush=True)
        return 0

    @staticmethod
    def _redirect(log: Path) -> None:
        """Send all output, C libraries' too, to the attempt's own log, which no later attempt overwrites."""
        log.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.close(handle)

    @staticmethod
    def _check_code(code: Path) -> None:
        found = Path(__file__).resolve().parents[1]
        if found != code.resolve():
            raise RuntimeError(
                f"this run was submitted with the code in {code}, but Python found {found} first; "
                "unset PYTHONPATH and PYTHONSAFEPATH in cluster.setup"
            )

    @staticmethod
    def _fail(folder: RunFolder, place: Place, error: BaseException) -> None:
        """Leave what the verdict needs; never a collective here, the other ranks may be gone."""
        if getattr(error, "namesake", False):
            print(error, file=sys.stderr, flush=True)
            return
        known = environment_secrets()
        told = type(error).__module__.split(".")[0] in ("launch", "moe", "data")  # written to be read
        facts: dict[str, Any] = {
            "kind": kind(error),
            "message": str(error)[:2000] if told else f"{type(error).__name__}: {error}"[:2000],
            "rank": place.rank,
            "node": place.node,
            "time": time.time(),
            "where": [
                f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-6:]
            ],
            "traceback": "".join(traceback.format_exception(error))[-6000:],
        }
        facts |= {key: redact_text(facts[key], known) for key in ("message", "traceback")}
        print(facts["traceback"], file=sys.stderr)
        write_json(folder.logs(place.attempt) / f"failure_{place.rank}.json", facts)
        print(json.dumps(facts), file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """The ranks' door."""
    warned = Preemption()  # first of all: a warning during a slow import is kept
    index = int(arguments[1] if len(arguments) > 1 else os.environ["SLURM_ARRAY_TASK_ID"])
    return StageJob(Path(arguments[0]), index)(Place.read(), warned)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads abort a process that is torn down in Python's own order (seen in 5 of 8 runs with torch 2.13), and
    # an abort after the last save would look like a failure.
    os._exit(code)
