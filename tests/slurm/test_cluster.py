"""The private SLURM itself: what every other test here relies on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm import jobs
from tests.slurm.cluster import PrivateSlurm, SlurmError, missing, tagged

pytestmark = pytest.mark.slurm

SLEEP = "#!/bin/bash\nexec sleep 300\n"


def test_steps_run_on_named_nodes_that_see_the_same_files_and_fake_gpus(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    script = (
        f"#!/bin/bash\nsrun bash -c 'echo $CUDA_VISIBLE_DEVICES > {tmp_path}/$(hostname).$SLURM_LOCALID'\n"
    )
    job = slurm.sbatch(script, "-N2", "--ntasks-per-node=2", "--gres=gpu:h100:8", "-w", "n1,n3")
    assert slurm.wait_state(job, "COMPLETED", "FAILED").state == "COMPLETED"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["n1.0", "n1.1", "n3.0", "n3.1"]
    assert (tmp_path / "n3.1").read_text() == "0,1,2,3,4,5,6,7\n"


def test_nodes_find_each_other_by_name(slurm: PrivateSlurm) -> None:
    job = slurm.sbatch(
        "#!/bin/bash\nsrun getent hosts n4\n", "-w", "n1", "-o", str(slurm.folder / "names.out")
    )
    assert slurm.wait_state(job, "COMPLETED", "FAILED").state == "COMPLETED"
    assert (slurm.folder / "names.out").read_text().split() == ["127.0.0.1", "n4"]


def test_no_variable_of_an_outer_job_reaches_a_client(
    slurm: PrivateSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SBATCH_PARTITION", "urgent")
    assert {k for k in slurm.env() if k.startswith(("SLURM", "SBATCH"))} == {"SLURM_CONF"}
    assert slurm.job(slurm.sbatch(SLEEP)).partition == "main"


def test_what_cannot_run_is_refused_with_slurms_words(slurm: PrivateSlurm) -> None:
    with pytest.raises(SlurmError, match=r"Requested node configuration is not available|Node count"):
        slurm.sbatch(SLEEP, "-N5")
    with pytest.raises(SlurmError, match="Invalid job array specification"):
        slurm.sbatch(SLEEP, "--array=1001")


def test_sacct_knows_jobs_when_there_is_accounting_and_says_why_not_when_there_is_none(
    slurm: PrivateSlurm, slurm_accounting: PrivateSlurm
) -> None:
    assert "accounting storage is disabled" in slurm.run(["sacct"], check=False).stderr
    job = slurm_accounting.sbatch("#!/bin/bash\nexit 3\n")
    slurm_accounting.wait(
        lambda: (
            slurm_accounting.run(["sacct", "-nPX", "-o", "JobID,State,ExitCode"]).stdout
            == f"{job}|FAILED|3:0\n"
        )
    )


def test_two_clusters_side_by_side_know_nothing_of_each_other(
    slurm: PrivateSlurm, private_slurm: Callable[..., PrivateSlurm]
) -> None:
    other = private_slurm(nodes=1, gpus=0)
    job = other.sbatch(SLEEP)
    assert other.wait_state(job, "RUNNING").nodes == ("n1",)
    assert other.folder != slurm.folder
    assert all(job.over for job in slurm.jobs().values())


def test_waiting_in_vain_ends_with_the_queue_and_the_logs(slurm: PrivateSlurm) -> None:
    job = slurm.sbatch(SLEEP, "--job-name=waiter", "--hold")
    with pytest.raises(SlurmError, match=r"not so after 0.1 s(.|\n)*waiter(.|\n)*--- slurmctld"):
        slurm.wait(lambda: slurm.job(job).state == "RUNNING", 0.1)
    with pytest.raises(SlurmError, match="no job 999; slurmctld knows"):
        slurm.job("999")


def test_slurmctld_restarted_still_knows_its_jobs(slurm: PrivateSlurm) -> None:
    job = slurm.sbatch(SLEEP)
    slurm.wait_state(job, "RUNNING")
    slurm.restart_controller()
    assert slurm.job(job).state == "RUNNING"
    assert slurm.job(job).restarts == 0


def test_slurmd_killed_leaves_its_tasks_and_comes_back(slurm: PrivateSlurm) -> None:
    job = slurm.sbatch("#!/bin/bash\nsleep 301\n", "-w", "n2")
    slurm.wait(lambda: any("sleep 301" in line for line in slurm.processes("n2").values()))
    slurm.kill_slurmd("n2")
    slurm.wait(lambda: not any(line.startswith("slurmd") for line in slurm.processes("n2").values()))
    assert any("sleep 301" in line for line in slurm.processes("n2").values())
    slurm.start_node("n2")
    slurm.wait(lambda: any(line.startswith("slurmd") for line in slurm.processes("n2").values()))
    slurm.run(["scancel", job])
    slurm.wait_state(job, "CANCELLED")
    slurm.node_fails("n2")
    slurm.wait_idle()


@pytest.mark.slow
def test_a_node_without_power_or_network_is_noticed_and_its_job_requeued(
    private_slurm: Callable[..., PrivateSlurm],
) -> None:
    cluster = private_slurm(isolation="net", slurmd_timeout=3)
    job = cluster.sbatch(SLEEP, "-N2", "-w", "n1,n2")
    cluster.wait_state(job, "RUNNING")
    cluster.kill_node("n2")
    assert cluster.processes("n1")
    cluster.wait(lambda: cluster.job(job).restarts == 1, 60)
    cluster.start_node("n2")
    cluster.cut("n3")
    cluster.wait(lambda: cluster.states()["n3"] == "down*", 60)
    cluster.join("n3")
    cluster.wait_idle(90)


@pytest.mark.parametrize("isolation", ["ns", "net"])
def test_sigkill_of_the_owner_leaves_no_process(isolation: str, slurm: PrivateSlurm) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, isolation],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert owner.stdout is not None
    with owner.stdout as said:
        folder = Path(said.readline().strip())
    before = set(tagged(folder))
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    slurm.wait(lambda: not any(list(tagged(folder, pid)) for pid in before), 30)
    assert len(before) >= 8  # munged, slurmctld, two nodes of an unshare, a shell and a slurmd each


_OWNER = """
import sys, time
from tests.slurm.cluster import PrivateSlurm
with PrivateSlurm(nodes=2, isolation=sys.argv[1]) as cluster:
    job = cluster.sbatch("#!/bin/bash\\nsrun sleep 302\\n", "-N2")
    cluster.wait(lambda: all("sleep 302" in str(cluster.processes(node)) for node in cluster.nodes))
    print(cluster.folder, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_closing_leaves_neither_process_nor_folder() -> None:
    cluster = PrivateSlurm(nodes=1)
    with cluster:
        cluster.sbatch("#!/bin/bash\nexec sleep 303\n")
        folder = cluster.folder
        cluster.wait(lambda: any("sleep 303" in line for line in cluster.processes("n1").values()))
    assert not folder.exists()
    assert not list(tagged(folder))
    cluster.close()


def test_nodes_that_a_short_lived_thread_started_outlive_it(slurm: PrivateSlurm) -> None:
    from threading import Thread

    slurm.kill_node("n4")
    thread = Thread(target=slurm.start_node, args=["n4"])
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert slurm.processes("n4")
    assert os.getpid() not in slurm.processes("n4")


def test_what_is_missing_is_said_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("tests.slurm.daemons.SBIN", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing() == "slurmctld is not installed (Debian: slurmctld slurmd slurm-client munge)"
    (tmp_path / "slurmctld").touch(mode=0o755)
    assert missing() == "a private SLURM needs root, to unshare namespaces for its nodes"


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_cluster_that_cannot_start_says_what_its_daemons_said_and_leaves_nothing() -> None:
    cluster = PrivateSlurm(nodes=1, extra=("Nonsense=1",))
    with pytest.raises(SlurmError, match=r"(n1|slurmctld) ended with 1(.|\n)*Nonsense"):
        cluster.__enter__()
    assert not cluster.folder.exists()
    assert not list(tagged(cluster.folder))


def test_jobs_are_read_element_by_element_whatever_their_names() -> None:
    text = (
        "JobId=9 ArrayJobId=9 ArrayTaskId=2-3,6%2 JobName=a b JobState=PENDING Reason=Priority Restarts=0 "
        "Partition=main ExitCode=0:0 NodeList= Dependency=(null)\n"
        "JobId=11 ArrayJobId=9 ArrayTaskId=1 JobName=a b JobState=RUNNING Reason=None Restarts=2 "
        "Partition=main ExitCode=0:0 NodeList=n[1-2,4] TRES=cpu=2,node=2\n"
    )
    found = jobs.parse(text)
    assert [job.id for job in found] == ["9_1", "9_2", "9_3", "9_6"]
    assert found[0].nodes == ("n1", "n2", "n4")
    assert (found[0].raw, found[1].raw, found[0].restarts, found[1].name) == ("11", "9", 2, "a b")
    assert found[0].fields["TRES"] == "cpu=2,node=2"
    assert jobs.parse("No jobs in the system\n") == []
