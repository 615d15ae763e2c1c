"""One squeue for all who watch the same runs: its answer is kept beside them for some seconds."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

from launch import cluster
from launch.cluster import Job
from launch.files import read_json, write_json


def jobs(root: Path, age: float) -> Mapping[str, Job]:
    """This user's array elements, as SLURM had them at most `age` s ago; raises SlurmError."""
    if age <= 0:
        return cluster.jobs()
    file = root / f".queue_{os.getuid()}.json"
    where = os.environ.get("SLURM_CONF", "")  # two clusters may share a file system
    kept = read_json(file) or {}
    if kept.get("cluster") == where and 0 <= time.time() - float(kept.get("time", 0.0)) <= age:
        return {row[0]: Job(*row) for row in kept["jobs"]}
    found = cluster.jobs()
    rows = [[job.id, job.state, job.reason, job.nodes, job.comment, job.start] for job in found.values()]
    with contextlib.suppress(OSError):
        write_json(file, {"cluster": where, "time": time.time(), "jobs": rows}, flush=False)
    return found
