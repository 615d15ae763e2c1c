"""Launches that fail, on a real SLURM: what it holds for them is let go, and a worn job is left in time."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import cluster
from launch.files import append_line, read_lines
from launch.recovery import avoid, limbo
from tests.slurm.cluster import PrivateSlurm
from tests.slurm.test_recovery import Submitted

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def spoil(slurm: PrivateSlurm, job: int) -> None:
    """No node can make this job's folder, as where the node's own disk is broken: its launch fails."""
    for node in slurm.nodes:
        (slurm.folder / "spool" / node / f"job{job:05}").touch()


def mend(slurm: PrivateSlurm, job: int) -> None:
    for node in slurm.nodes:
        (slurm.folder / "spool" / node / f"job{job:05}").unlink(missing_ok=True)


def test_what_slurm_holds_for_lost_launches_is_let_go_and_a_worn_job_is_left_for_a_new_one(
    private_slurm: Callable[..., PrivateSlurm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = ("BatchStartTimeout=1",)
    slurm = private_slurm(nodes=3, kill_wait=20, slurmd_timeout=30, message_timeout=2, extra=quick)
    # A site, or a version, that holds a job at the second launch lost.
    fake = tmp_path / "bin" / "scontrol"
    fake.parent.mkdir()
    real = subprocess.run(["which", "scontrol"], capture_output=True, text=True, check=True).stdout.strip()
    fake.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "show config" ] && echo "MaxBatchRequeue = 2"\nexec {real} "$@"\n'
    )
    fake.chmod(0o755)
    setup = (f"export PATH={fake.parent}:$PATH",)
    other = slurm.sbatch("#!/bin/sh\n", "--hold", "-o/dev/null")  # its user's own hold, and another's job
    spoil(slurm, int(other) + 1)
    run = Submitted(slurm, tmp_path, "run", "run", "finish", setup=setup)
    slurm.wait(lambda: run.state()[0] == "held", 30)
    assert "launch failed" in run.state()[1]
    mend(slurm, int(other) + 1)

    # Whoever waits for it, or watches another run, lets it go; once, and then not at once again.
    run.runs("wait", "--timeout", "0.1")
    assert slurm.job(run.id).fields["Priority"] != "0"
    assert slurm.job(other).reason == "JobHeldUser"
    assert [record["job"] for record in run.of("freed")] == [run.id]
    assert "it was let go" in run.runs("explain", "x")
    assert run.state()[0] == "queued"
    slurm.wait(lambda: run.of("start"), 30, nudge=True)

    # Its batch script is lost with its node, and SLURM counts.
    below = slurm.sbatch("#!/bin/sh\n:\n", f"--dependency=afterok:{run.id}", "-o/dev/null")
    host = run.of("start")[0]["node"]
    slurm.kill_node(host)
    slurm.start_node(host)
    before = slurm.job(run.id).restarts

    def missed() -> bool:
        slurm.run(["scontrol", "reconfigure"])  # nodes tell at once what they run
        return slurm.job(run.id).restarts > before

    slurm.wait(missed, 60, every=0.5)
    assert slurm.job(run.id).fields["BatchFlag"] == "2"
    slurm.wait(lambda: len(run.of("submitting")) > 1, 60, nudge=True)
    new = run.of("submitting")[-1]
    assert new["after"] == run.id
    left = [record for record in run.of("verdict") if record.get("attempt", "").startswith(run.id)]
    assert (left[-1]["verdict"], left[-1]["again"]) == (
        "preempted",
        True,
    )  # it saved, and its budgets are whole
    assert run.of("requeued")[0]["worn"] == run.id
    slurm.wait(lambda: run.state()[0] == "done", 60, nudge=True)
    token = Path(new["batch"]).name
    (after,) = (job for job in slurm.jobs().values() if job.fields.get("Comment") == token)
    assert (after.restarts, after.fields["BatchFlag"]) == (0, "1")
    slurm.wait_state(below, "COMPLETED")

    # A new array is kept from nodes that failed of late, also where the partition is the default one.
    append_line(tmp_path / "nodes.jsonl", {"time": time.time(), "node": "n2", "verdict": "infrastructure"})
    monkeypatch.setenv("SLURM_CONF", str(slurm.place.conf))
    assert avoid.options(tmp_path, "n9", "", 2) == ["--exclude=n9,n2"]
    assert avoid.options(tmp_path, "", "main", 3) == avoid.options(tmp_path / "others", "", "main", 1) == []

    # An empty folder of runs knows none of these jobs.
    assert limbo.release(tmp_path / "others", time.time()) == []


def test_where_accounting_knows_the_node_of_a_lost_launch_the_job_is_kept_from_it(
    slurm_accounting: PrivateSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = slurm_accounting
    monkeypatch.setenv("SLURM_CONF", str(slurm.place.conf))
    before = int(slurm.sbatch("#!/bin/sh\n", "--hold", "-o/dev/null"))
    spoil(slurm, before + 1)
    run = Submitted(slurm, tmp_path, "finish")
    slurm.wait(lambda: run.state()[0] == "held", 30)
    host = slurm.wait(lambda: [row.nodes for row in cluster.past([run.id]).get(run.id, []) if row.ended], 30)
    assert limbo.look(run.root / "runs") == [run.id]
    bad = slurm.run(["scontrol", "show", "hostnames", host[0]]).stdout.split()[0]
    assert slurm.job(run.id).fields["ExcNodeList"] == bad
    assert [record["node"] for record in read_lines(run.root / "runs" / "nodes.jsonl")] == [bad]
    mend(slurm, before + 1)
