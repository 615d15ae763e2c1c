"""The verbs on a real SLURM: what its squeue, sacct and scontrol print is what they are made for."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import cluster
from launch.files import write_json
from launch.record import RunFolder
from tests.slurm.cluster import PrivateSlurm

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[2]

# As the project's own script: the step is told by USR2 and leaves, and the batch script requeues what it is part of.
SCRIPT = """\
#!/bin/bash
trap : TERM
srun sh -c 'trap "exit 3" USR2; trap "exit ON_TERM" TERM; touch up.$SLURM_JOB_ID; sleep 300 & wait'
[ $? = 3 ] || exit 0
trap '' TERM
scontrol requeue ${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
sleep 9
"""


def runs(slurm: PrivateSlurm, root: Path, *arguments: str, check: bool = True) -> str:
    return slurm.run(
        [sys.executable, ROOT / "launch" / "runs.py", "--runs", root, *arguments], check=check
    ).stdout


def states(slurm: PrivateSlurm, root: Path) -> dict[str, tuple[str, str]]:
    rows: list[dict[str, Any]] = json.loads(runs(slurm, root, "status", "--json"))
    return {row["run"]: (row["name"], row["reason"]) for row in rows}


def batch(
    slurm: PrivateSlurm, root: Path, name: str, count: int, *options: str, parent: str = "", on_term: int = 0
) -> str:
    """An array and the run folders that it is of; `on_term` is what its steps exit with on SIGTERM.

    It stands in the script: with --export=ALL,NAME=... slurmd first asks a login shell for the environment,
    and a profile may take its time.
    """
    ours = (f"--array=0-{count - 1}", f"--comment={name}", "-n1", "--requeue")
    job = slurm.sbatch(SCRIPT.replace("ON_TERM", str(on_term)), *ours, *options, cwd=root)
    place = root / "batches" / name
    write_json(place / "batch.json", {"state": "submitted", "token": name, "job": job})
    for index in range(count):
        folder = RunFolder(root / name / str(index))
        above = str(root / parent) if parent else None
        write_json(folder.run_file, {"id": f"{name}-{index}", "name": f"{name}/{index}", "parent": above})
        folder.note("submitting", batch=str(place), index=index)
    return job


def test_an_array_is_throttled_explained_requeued_and_cancelled(
    slurm_accounting: PrivateSlurm, tmp_path: Path
) -> None:
    slurm, root = slurm_accounting, tmp_path
    job = batch(slurm, root, "a", 3, "--array=0-2%1")
    below = batch(
        slurm, root, "b", 1, f"--dependency=afterok:{job}_2", "--kill-on-invalid-dep=yes", parent="a/2"
    )
    slurm.wait(lambda: list(root.glob("up.*")), 30)  # before its step is there, no signal reaches it
    slurm.wait(lambda: states(slurm, root)["a/1"] == ("queued", "JobArrayTaskLimit"), 20, every=0.5)
    assert states(slurm, root)["a/0"][0] == "running"
    assert states(slurm, root)["b/0"] == ("waiting", "after a/2")
    assert json.loads(runs(slurm, root, "explain", "a/1", "--json"))["cause"] == "throttle"
    assert "It starts when a/2 (queued) has finished" in runs(slurm, root, "explain", "b/0")

    assert runs(slurm, root, "throttle", "a", "2") == f"array {job}: at most 2 at a time\n"
    slurm.wait_state(f"{job}_1", "RUNNING")

    runs(slurm, root, "requeue", "a/0")
    slurm.wait(lambda: slurm.job(f"{job}_0").restarts == 1, 30)
    slurm.wait(lambda: slurm.job(f"{job}_0").state == "PENDING", 30)
    assert slurm.job(f"{job}_1").restarts == 0
    assert states(slurm, root)["a/0"][0] == "queued"
    assert "asked to requeue it" in runs(slurm, root, "explain", "a/0")

    slurm.run(["scancel", f"{job}_2"])  # not through us
    slurm.wait(lambda: states(slurm, root)["a/2"][0] == "cancelled", 30, every=0.5)
    slurm.wait_state(f"{below}_0", "CANCELLED")
    found = states(slurm, root)
    assert found["a/2"] == ("cancelled", "by user 0 with scancel")
    assert "cancelled with scancel by user 0" in runs(slurm, root, "explain", "a/2")
    assert found["b/0"][0] == "cancelled"

    runs(slurm, root, "cancel", "a", "-y")
    slurm.wait(lambda: {states(slurm, root)[f"a/{n}"][0] for n in range(3)} == {"cancelled"}, 30, every=0.5)


def test_without_accounting_what_slurm_remembers_is_enough(slurm: PrivateSlurm, tmp_path: Path) -> None:
    job = batch(slurm, tmp_path, "a", 1)
    slurm.wait(lambda: list(tmp_path.glob("up.*")), 30)
    runs(slurm, tmp_path, "requeue", "--now", "a/0")
    slurm.wait(lambda: slurm.job(f"{job}_0").restarts == 1, 30)
    slurm.wait(lambda: slurm.job(f"{job}_0").state == "PENDING", 30)
    slurm.wait(lambda: "BeginTime" in states(slurm, tmp_path)["a/0"][1], 20, every=0.5)
    assert "only after a delay" in runs(slurm, tmp_path, "explain", "a/0")
    slurm.run(["scontrol", "uhold", f"{job}_0"])
    slurm.wait(lambda: states(slurm, tmp_path)["a/0"] == ("held", "JobHeldUser"), 20, every=0.5)
    assert "released; it waits in the queue" in runs(slurm, tmp_path, "requeue", "a/0")
    assert states(slurm, tmp_path)["a/0"][0] == "queued"
    slurm.run(["scancel", f"{job}_0"])
    slurm.wait_state(f"{job}_0", "CANCELLED")
    assert states(slurm, tmp_path)["a/0"] == (
        "stopped",
        "it left the queue without a verdict (SLURM says CANCELLED)",
    )
    assert "cancelled with scancel" in runs(slurm, tmp_path, "explain", "a/0")
    # SLURM still has the job, so it can be the same job again.
    assert "requeued" in runs(slurm, tmp_path, "requeue", "a/0")
    slurm.wait(lambda: states(slurm, tmp_path)["a/0"][0] in ("queued", "running"), 20, every=0.5)


def test_ones_own_jobs_in_a_hidden_partition_are_seen(
    private_slurm: Callable[..., PrivateSlurm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """squeue shows them to root, and to their owner only where it is asked for all: what is not seen is sent again."""
    slurm = private_slurm(nodes=1, extra=("PartitionName=hidden Nodes=ALL Hidden=YES State=UP",))
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    job = slurm.run([*nobody, "sbatch", "--parsable", "-phidden", "-D/", "-o/dev/null", "--wrap=sleep 60"])
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\nexec {" ".join(nobody)} {shutil.which("squeue")} "$@"\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_CONF", str(slurm.place.conf))
    monkeypatch.setattr("os.getuid", lambda: 65534)
    assert list(cluster.jobs()) == [job.stdout.strip()]


def test_a_job_requeues_itself_where_the_site_cancels_what_it_preempts(
    private_slurm: Callable[..., PrivateSlurm], tmp_path: Path
) -> None:
    """PreemptMode=CANCEL, JobRequeue=0, GraceTime=0: SLURM would not; the dying job still may, in its KillWait."""
    slurm = private_slurm(nodes=1, preempt="CANCEL", requeue=False, kill_wait=20)
    job = batch(slurm, tmp_path, "a", 1, "--exclusive", "--partition=main", on_term=3)
    slurm.wait(lambda: list(tmp_path.glob("up.*")), 30)
    urgent = slurm.sbatch("#!/bin/sh\n:\n", "--partition=urgent", "--exclusive", "-N1")
    slurm.wait_state(urgent, "COMPLETED", timeout=60)
    slurm.wait_state(f"{job}_0", "RUNNING", timeout=60, nudge=True)
    assert slurm.job(f"{job}_0").restarts == 1
