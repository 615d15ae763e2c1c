"""Recovery on a real SLURM: the project's own batch script, watch and verdict around ranks that end as a test asks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.files import read_lines, write_json
from launch.identity import plain
from launch.record import RunFolder
from launch.script import script
from launch.spec import ClusterSpec, Duration, ExperimentSpec
from tests.slurm.cluster import PrivateSlurm
from tests.slurm.jobs import Job

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ClusterSpec(
    device="cpu",
    gpus_per_node=1,
    cpus_per_gpu=1,
    partition="main",
    walltime=Duration(1200),
    grace=Duration(60),
    hang_after=Duration(10),  # on a machine that is busy ranks stand still for seconds
)


class Submitted:
    """One run with its job, as launch.submission leaves them."""

    def __init__(self, slurm: PrivateSlurm, root: Path, *acts: str, **cluster: Any) -> None:
        self.slurm, self.root = slurm, root
        self.folder = RunFolder(root / "runs" / "x" / "run")
        batch = root / "runs" / "batches" / "x-0"
        spec = ExperimentSpec("align", gpus=2, cluster=replace(CLUSTER, **cluster))
        write_json(self.folder.spec_file, plain(spec))
        write_json(self.folder.run_file, {"id": "x", "name": "x/run"})
        write_json(self.folder.path / "acts.json", acts)
        write_json(batch / "plan.json", {"code": str(ROOT), "runs": {"3": str(self.folder.path)}})
        (batch / "slurm").mkdir(parents=True)
        text = script(spec, "x", [3], batch, ROOT, "x-0").replace("-m launch.job", "-m tests.slurm.rank")
        if cluster.get("sbatch") == {"requeue": "no"}:
            text = text.replace("#SBATCH --requeue=no", "#SBATCH --no-requeue")
        (batch / "script.sbatch").write_text(text)
        self.array = slurm.run(["sbatch", "--parsable", batch / "script.sbatch"]).stdout.strip()
        self.id = f"{self.array}_3"
        write_json(batch / "batch.json", {"state": "submitted", "token": "x-0", "job": self.array})
        self.folder.note("submitting", batch=str(batch), index=3)

    def of(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.folder.journal if record["event"] == event]

    def verdicts(self, count: int) -> list[dict[str, Any]]:
        """The verdicts, when there are so many."""
        self.slurm.wait(lambda: len(self.of("verdict")) >= count, 60)
        return self.of("verdict")

    def runs(self, *arguments: str) -> str:
        command = [sys.executable, ROOT / "launch" / "runs.py", "--runs", self.root / "runs", *arguments]
        return self.slurm.run(command, check=False).stdout

    def state(self) -> tuple[str, str]:
        row = json.loads(self.runs("status", "--json"))[0]
        return row["name"], row["reason"]

    def again(self, restarts: int) -> None:
        """Wait until the job is back in the queue, and let it start."""
        self.slurm.wait(lambda: self.slurm.job(self.id).restarts == restarts, 30)
        self.slurm.wait(lambda: self.slurm.job(self.id).state == "PENDING", 30)


def test_a_hang_and_a_lost_rank_are_named_waited_out_and_their_node_avoided(
    private_slurm: Callable[..., PrivateSlurm], tmp_path: Path
) -> None:
    slurm = private_slurm(kill_wait=1)  # what srun gives those that outlive a lost rank; a hang is longer
    run = Submitted(slurm, tmp_path, "stop 1", "kill 1", "finish")
    run.folder.note("verdict", attempt=f"{run.id}-0", verdict="infrastructure")  # as if one had been before
    first = run.verdicts(2)[1]
    assert (first["verdict"], first["again"]) == ("hang", True)
    named = r"rank 1 on n\d was silent for \d+ s, last heard of in step 50 \(after its computing\)"
    assert re.match(f"{named}: its process stands still; the other 1 wait for it", first["reason"])
    log = run.folder.log_of(f"{run.id}-0", 0).read_text()
    assert "run_stage" in log.split("most recent call first", 1)[1]
    assert "excluded" not in first  # a first hang may be anybody's fault
    # The walltime's end is known on the node.
    start = run.of("start")[0]
    assert start["ends"] == pytest.approx(start["time"] + 1200, abs=30)
    assert start["cache"].endswith(f"/{ROOT.name}/triton")  # on the node, not in the shared home

    slurm.wait(lambda: len(run.of("verdict")) >= 3, 60, nudge=True)
    second = run.verdicts(3)[2]
    assert second["verdict"] == "infrastructure"
    bad = second["excluded"][0]
    assert second["reason"] == f"rank 1 on {bad} was lost: killed (srun ended with 137) and left no word"
    run.again(2)
    assert slurm.job(run.id).fields["ExcNodeList"] == bad
    assert [record["node"] for record in read_lines(run.root / "runs" / "nodes.jsonl")][-1] == bad
    assert f"avoiding {bad} for now" in run.runs("explain", "x")
    assert f"avoiding {bad} for another " in run.runs("status")

    eligible = time.mktime(time.strptime(slurm.job(run.id).fields["EligibleTime"], "%Y-%m-%dT%H:%M:%S"))
    assert (second["delay"], eligible) == (60, pytest.approx(second["time"] + 60, abs=8))
    assert "waits 1m00s before the next attempt" in run.runs("explain", "x")
    slurm.wait_state(run.id, "COMPLETED", timeout=60, nudge=True)
    assert bad not in slurm.job(run.id).nodes
    assert run.state()[0] == "done"


def test_a_requeue_before_the_ranks_start_is_not_lost_and_an_srun_that_hangs_is_ended(
    private_slurm: Callable[..., PrivateSlurm], tmp_path: Path
) -> None:
    slurm = private_slurm(kill_wait=1)
    fake = tmp_path / "bin" / "srun"
    fake.parent.mkdir()
    real = subprocess.run(["which", "srun"], capture_output=True, text=True, check=True).stdout.strip()
    fake.write_text(
        f'#!/bin/bash\n[ "$SLURM_RESTART_COUNT" = 1 ] && {{ sleep 999 & wait; }}\nexec {real} "$@"\n'
    )
    fake.chmod(0o755)
    slow = (
        f"export PATH={fake.parent}:$PATH",
        f"touch {tmp_path}/up",
        "sleep $((SLURM_RESTART_COUNT ? 0 : 60))",
    )
    run = Submitted(slurm, tmp_path, "raise 1", setup=slow, load_within=Duration(3))
    slurm.wait(lambda: (tmp_path / "up").exists(), 30)
    assert "x: " in run.runs("requeue", "x")
    run.again(1)
    slurm.wait(lambda: any(r["verdict"] == "infrastructure" for r in run.of("verdict")), 60, nudge=True)
    verdict = run.of("verdict")[-1]
    assert verdict["reason"].startswith("no rank started within ")
    assert verdict["again"]
    spec = run.folder.spec  # the next ranks may start as slowly as they like
    write_json(run.folder.spec_file, {**spec, "cluster": {**spec["cluster"], "load_within": "30m"}})
    # An error is tried once more, and told with its traceback.
    slurm.wait(lambda: any(r["verdict"] == "error" for r in run.of("verdict")), 60, nudge=True)
    assert [record["attempt"] for record in run.of("start")] == [f"{run.id}-2"]
    run.again(3)
    log = run.folder.log_of(f"{run.id}-2", 1).read_text()
    assert "Traceback" in log
    assert "ValueError: shapes differ" in run.runs("explain", "x")


def test_the_loss_of_a_batch_host_is_told_by_the_next_attempt_and_held_against_it(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    run = Submitted(slurm, tmp_path, "run", "finish")
    slurm.wait(lambda: run.of("start"), 30)
    host = run.of("start")[0]["node"]
    slurm.kill_node(host)
    slurm.run(["scontrol", "update", f"nodename={host}", "state=down", "reason=test"])
    slurm.wait_state(run.id, "COMPLETED", timeout=60, nudge=True)
    verdicts = [(r["attempt"], r["verdict"], r["reason"]) for r in run.of("verdict")]
    assert verdicts == [
        (f"{run.id}-0", "infrastructure", f"SLURM lost {host}"),
        (f"{run.id}-1", "finished", ""),
    ]
    assert [record["node"] for record in read_lines(run.root / "runs" / "nodes.jsonl")] == [host]


def test_a_node_that_was_lost_and_is_back_already_is_known_from_accounting(
    slurm_accounting: PrivateSlurm, tmp_path: Path
) -> None:
    run = Submitted(slurm_accounting, tmp_path, "run", "finish", gpus_per_node=2)
    slurm_accounting.wait(lambda: run.of("start"), 30)
    host = run.of("start")[0]["node"]
    slurm_accounting.node_fails(host)
    slurm_accounting.wait_state(run.id, "COMPLETED", timeout=60, nudge=True)
    assert run.of("verdict")[0]["reason"] == f"SLURM lost one of its nodes ({host})"
    assert [record["node"] for record in read_lines(run.root / "runs" / "nodes.jsonl")] == [host]


def test_where_requeueing_is_forbidden_a_new_job_goes_on_and_dependents_follow_it(
    private_slurm: Callable[..., PrivateSlurm], tmp_path: Path
) -> None:
    slurm = private_slurm(nodes=3, preempt="CANCEL", requeue=False, kill_wait=30)
    run = Submitted(slurm, tmp_path, "run", "finish", sbatch={"requeue": "no"})
    below = [
        slurm.sbatch(
            "#!/bin/sh\n:\n", "--array=3", f"--dependency={after}", "--kill-on-invalid-dep=yes", "-o/dev/null"
        )
        for after in (f"aftercorr:{run.array}", f"afterok:{run.id}")
    ]
    slurm.wait(lambda: run.of("start"), 30)
    nodes = ",".join(slurm.job(run.id).nodes)
    urgent = slurm.sbatch("#!/bin/sh\n:\n", "--partition=urgent", "--exclusive", "-N2", f"--nodelist={nodes}")
    slurm.wait_state(urgent, "COMPLETED", timeout=60)
    new = run.of("submitting")[-1]
    assert new["after"] == run.id
    jobs = {job.id: job for job in slurm.jobs().values() if job.name == "x"}
    assert len(jobs) == 2
    (after,) = set(jobs) - {run.id}
    slurm.wait_state(after, "COMPLETED", timeout=60)
    assert jobs[run.id].state == "PREEMPTED"
    assert [(r["verdict"], r["again"]) for r in run.of("verdict")] == [
        ("preempted", True),
        ("finished", False),
    ]
    for job in below:
        done = slurm.wait_state(f"{job}_3", "COMPLETED", "CANCELLED", timeout=30)
        assert done.state == "COMPLETED"
        assert done.fields["StartTime"] >= slurm.job(after).fields["EndTime"]
    assert run.state()[0] == "done"
    assert "a new job took it over" in run.runs("explain", "x")


def test_what_waits_for_a_run_that_is_cancelled_before_its_start_does_not_start(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    first = slurm.sbatch("#!/bin/sh\nsleep 60\n", "--array=0", "-o/dev/null")
    run = Submitted(slurm, tmp_path, "finish", sbatch={"dependency": f"afterok:{first}_0"})
    after = f"--dependency=afterok:{run.id}"
    below = slurm.sbatch("#!/bin/sh\n:\n", "--array=0", after, "--kill-on-invalid-dep=yes", "-o/dev/null")
    slurm.wait_state(f"{first}_0", "RUNNING")
    assert "cancelled 1 run(s)" in run.runs("cancel", "x")
    assert slurm.wait_state(f"{below}_0", "CANCELLED", "COMPLETED").state == "CANCELLED"


def test_where_a_lost_node_ends_a_job_for_good_its_spare_goes_on(slurm: PrivateSlurm, tmp_path: Path) -> None:
    run = Submitted(slurm, tmp_path, "run", "run", spare=True, sbatch={"requeue": "no"})
    after = f"--dependency=aftercorr:{run.array}"
    below = slurm.sbatch("#!/bin/sh\n:\n", "--array=3", after, "--kill-on-invalid-dep=yes", "-o/dev/null")
    slurm.wait(lambda: run.of("start"), 30)
    slurm.wait(lambda: "?" in slurm.job(f"{below}_3").fields["Dependency"], 30)
    assert run.state()[0] == "running"
    host = run.of("start")[0]["node"]
    slurm.kill_node(host)
    slurm.run(["scontrol", "update", f"nodename={host}", "state=down", "reason=test"])
    slurm.wait_state(run.id, "NODE_FAIL")
    assert run.state()[0] in ("queued", "running")  # the spare, by itself
    slurm.wait(lambda: len(run.of("start")) == 2, 30)
    slurm.wait(lambda: any("after" in record for record in run.of("submitting")), 30)  # its watch says so
    (spare,) = {record["after"] for record in run.of("submitting") if "after" in record}
    assert spare == run.id
    slurm.wait(lambda: run.of("verdict"), 30)
    (spoken,) = run.of("verdict")
    assert (spoken["attempt"], spoken["verdict"], spoken["again"]) == (f"{run.id}-0", "infrastructure", True)
    # Cancelled is cancelled: its own spare goes with it.
    run.runs("cancel", "x")

    def ours() -> list[Job]:
        later = [job for job in slurm.jobs().values() if int(job.id.partition("_")[0]) >= int(run.array)]
        return [job for job in later if job.name == "x"]

    slurm.wait(lambda: all(job.over for job in ours()), 30)
    assert {job.state for job in ours()} == {"NODE_FAIL", "CANCELLED"}
    assert not run.of("refused")
    assert len(run.of("start")) == 2
    assert slurm.wait_state(f"{below}_3", "CANCELLED").state == "CANCELLED"
    assert run.state()[0] == "cancelled"


def test_a_lost_node_is_not_taken_for_scancel_where_requeueing_is_forbidden(
    private_slurm: Callable[..., PrivateSlurm], tmp_path: Path
) -> None:
    slurm = private_slurm(requeue=False, kill_wait=20)
    run = Submitted(slurm, tmp_path, "run", "finish", sbatch={"requeue": "no"})
    slurm.wait(lambda: run.of("start"), 30)
    (other,) = set(slurm.job(run.id).nodes) - {run.of("start")[0]["node"]}
    slurm.kill_node(other)
    slurm.run(["scontrol", "update", f"nodename={other}", "state=down", "reason=test"])
    slurm.wait(lambda: run.state()[0] in ("done", "cancelled", "failed", "stopped"), 60, every=0.5)
    assert run.state()[0] == "done"
    assert [record["after"] for record in run.of("submitting") if "after" in record] == [run.id]


def test_a_verdict_that_is_killed_is_spoken_all_the_same(slurm: PrivateSlurm, tmp_path: Path) -> None:
    python = tmp_path / "python"
    mark = tmp_path / "killed"
    python.write_text(
        f'#!/bin/sh\n[ "$2" = launch.verdict ] && mkdir {mark} 2>/dev/null && kill -9 $$\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    run = Submitted(slurm, tmp_path, "raise 1", "finish", python=str(python))
    assert [(r["verdict"], r["again"]) for r in run.verdicts(1)] == [("error", True)]
    assert mark.exists()
    run.again(1)


def test_the_spare_of_a_job_that_scancel_ended_between_two_attempts_ends_as_it_begins(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    run = Submitted(slurm, tmp_path, "run", "run", spare=True)
    slurm.wait(lambda: run.of("start"), 30)
    before = int(run.array)
    slurm.wait(lambda: any(int(id.partition("_")[0]) > before for id in slurm.jobs()), 30)
    (spare,) = (id for id in slurm.jobs() if int(id.partition("_")[0]) > before)
    slurm.run(["scontrol", "requeue", run.id])
    run.again(1)
    slurm.run(["scancel", run.id])  # nothing of it runs that could take its spare along
    slurm.wait(lambda: slurm.job(spare).over, 60)
    assert slurm.job(spare).state == "CANCELLED"
    assert run.state()[0] == "cancelled"
    assert [record["job"] for record in run.of("cancelled")] == [run.id]
    assert not [record for record in run.of("submitting") if "after" in record]  # it never took the run over
