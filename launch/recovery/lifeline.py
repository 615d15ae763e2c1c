"""A job that starts only where no run of ours does any more: it lets go what SLURM holds, and waits again.

What `launch.recovery.limbo` does takes a process, and the last run that SLURM holds leaves none. So one job of one CPU
waits per folder of runs, to begin `cluster.lifeline` from now; each run that goes on puts it off, and it never starts
while one does. Where it does start, all runs wait for nodes or are held: it releases these and submits itself once
more, to begin twice as late each time, and ends for good when no run is left in the queue.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import cluster
from launch.files import read_json, write_json, write_text
from launch.recovery import limbo
from launch.spec import ClusterSpec, Duration

SHARE = 4  # of the time before it begins, passes between two times that it is put off
LONGEST = 8 * 3600.0  # seconds, while all runs wait in a long queue
TRIES, PAUSE = 8, 60.0  # where slurmctld is away
NAME = "lifeline"  # of the job, and its comment
KEPT = ("reservation", "wckey")  # of the further sbatch options; it takes no GPU, nor a node for itself


def wait_of(spec: Mapping[str, Any]) -> float:
    """Seconds until it begins, from a run's spec.json; 0: there is none."""
    texts = spec.get("cluster") or {}
    given = texts.get("lifeline")
    return float(ClusterSpec.lifeline if given is None else Duration.parse(str(given)))


def put_off(batch: Path, spec: Mapping[str, Any], now: float) -> str:
    """Have it begin later, or submit it; whoever takes the turn. What SLURM refuses, in words and once."""
    wait, root = wait_of(spec), batch.parent.parent
    place = root / f".{NAME}"
    try:
        place.mkdir(exist_ok=True)
        if not wait or not limbo.turn(place, now, wait / SHARE):
            return ""
        facts = read_json(place / "job.json") or {}
        if job := facts.get("job"):
            try:
                cluster.call("scontrol", "update", f"JobId={job}", f"StartTime=now+{wait:.0f}", timeout=20)
                return ""
            except cluster.SlurmError as error:
                if cluster.UNSURE.search(str(error)):
                    return ""  # another time; else it runs, or is gone
        write_text(place / "script.sbatch", script(batch, spec, wait))
        _submit(place, wait)
    except OSError:
        return ""  # a full disk: another time
    except cluster.SlurmError as error:
        said = str(error)
        with contextlib.suppress(OSError):
            write_json(place / "job.json", {"refused": said})
        return "" if facts.get("refused") == said else said
    return ""


def script(batch: Path, spec: Mapping[str, Any], wait: float) -> str:
    """The sbatch script: where the runs may run, for what they are charged to, with what Python needs to start."""
    on, root = spec.get("cluster") or {}, batch.parent.parent
    code = (read_json(batch / "plan.json") or {})["code"]
    options = {"job-name": NAME, "comment": NAME, "ntasks": 1, "cpus-per-task": 1, "time": 15}
    options |= {"output": root / f".{NAME}" / "log", "open-mode": "append", "chdir": code}
    options |= {key: on[key] for key in ("partition", "account", "qos") if on.get(key)}
    options |= {key: value for key, value in (on.get("sbatch") or {}).items() if key in KEPT}
    if on.get("mem_gb_per_gpu"):  # else memory may not be counted there
        options["mem"] = "1G"
    python = shlex.quote(on.get("python") or sys.executable)
    lines = [
        *(f"#SBATCH {shlex.quote(f'--{key}={value}')}" for key, value in options.items()),
        f"cd {shlex.quote(str(code))}",
        *(on.get("setup") or ()),
        f"exec {python} -m launch.recovery.lifeline {shlex.quote(str(root))} {wait:.0f}",
    ]
    return "\n".join(["#!/bin/bash", *lines, ""])


def _submit(place: Path, wait: float) -> None:
    command = ["sbatch", "--parsable", f"--begin=now+{wait:.0f}", str(place / "script.sbatch")]
    said = cluster.call(*command, timeout=60, env=cluster.environment())
    write_json(place / "job.json", {"job": said.strip().partition(";")[0], "wait": wait})


def left(root: Path) -> list[str]:
    """The elements of this folder's runs that have work before them; raises SlurmError."""
    known: dict[str, bool] = {"": False, NAME: False}
    found = []
    for job in cluster.jobs().values():
        if job.state in cluster.ACTIVE:
            if job.comment not in known:
                known[job.comment] = (root / "batches" / job.comment / "plan.json").exists()
            if known[job.comment]:
                found.append(job.id)
    return found


def drop(root: Path, *over: str) -> None:
    """Take it back where no run is left but those that are `over`."""
    file = root / f".{NAME}" / "job.json"
    if job := (read_json(file) or {}).get("job"):
        with contextlib.suppress(cluster.SlurmError, OSError):
            if not set(left(root)) - set(over):
                file.unlink()
                cluster.call("scancel", str(job), timeout=20)


def main(arguments: list[str]) -> int:
    """`python -m launch.recovery.lifeline RUNS SECONDS`, in the job."""
    root, first = Path(arguments[0]), float(arguments[1])
    place, own = root / f".{NAME}", os.environ.get("SLURM_JOB_ID", "")
    for _ in range(TRIES):
        try:
            freed, facts = limbo.release(root, time.time()), read_json(place / "job.json") or {}
            if facts.get("job") == own:  # else another one waits in its place
                if left(root):
                    _submit(place, first if freed else min(2 * float(facts["wait"]), max(first, LONGEST)))
                else:
                    (place / "job.json").unlink()
        except cluster.SlurmError as error:
            print(error, flush=True)
            time.sleep(PAUSE)
            continue
        print(json.dumps({"time": round(time.time()), "freed": freed}), flush=True)
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
