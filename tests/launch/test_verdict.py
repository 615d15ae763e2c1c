"""Verdicts from what an attempt left, and budgets from the journal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cluster, verdict
from launch.files import read_lines, write_json, write_text
from launch.record import RunFolder
from launch.recovery import successor
from launch.recovery.findings import Finding, comes_back, of_attempt


def failed(folder: RunFolder, rank: int, message: str, time: float, kind: str = "error") -> None:
    facts = {"kind": kind, "message": message, "time": time, "rank": rank, "node": f"n{rank}"}
    write_json(folder.logs("a") / f"failure_{rank}.json", facts)


def test_what_the_ranks_agreed_on_is_the_verdict(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.note("start", attempt="a")
    folder.note("ended", attempt="a", outcome="preempted", reason="SIGUSR2")
    assert of_attempt(folder, "a", 0) == Finding("preempted", "SIGUSR2")
    assert comes_back(folder, "preempted")


def test_of_many_failures_the_first_knows_why(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.note("start", attempt="a")
    failed(folder, 0, "RuntimeError: connection closed by peer", 20.0)
    failed(folder, 1, "ValueError: no such dataset", 10.0, kind="bad spec")
    assert of_attempt(folder, "a", 1) == Finding("bad spec", "ValueError: no such dataset", rank=1)


def test_ranks_that_left_no_word_were_lost(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert of_attempt(folder, "a", 1).verdict == "infrastructure"
    folder.note("start", attempt="a")
    assert of_attempt(folder, "a", 137) == Finding(
        "infrastructure",
        "srun ended with 137 and no rank said why: a node or a rank was lost",
    )


@pytest.mark.parametrize(("kind", "attempts"), [("error", 2), ("infrastructure", 6), ("bad spec", 1)])
def test_each_cause_has_a_budget_that_a_saved_step_renews(tmp_path: Path, kind: str, attempts: int) -> None:
    folder = RunFolder(tmp_path)

    def until_held() -> int:
        made = 1
        while comes_back(folder, kind):
            verdict.speak(folder, str(made), Finding(kind), again=True)
            made += 1
        return made

    assert until_held() == attempts
    folder.note("saved", attempt="x", step=10)
    assert until_held() == attempts


def test_preemptions_are_never_counted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for n in range(50):
        assert comes_back(folder, "preempted")
        verdict.speak(folder, str(n), Finding("preempted"), again=True)


def test_a_cancelled_run_stays_cancelled_until_it_is_submitted_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.note("submitting", batch="b", index=0)
    folder.note("start", attempt="a")
    folder.note("cancelled", by="me")
    folder.note("ended", attempt="a", outcome="preempted", reason="SIGTERM")
    assert of_attempt(folder, "a", 0).verdict == "cancelled"
    assert not comes_back(folder, "cancelled")
    folder.note("submitting", batch="c", index=0)
    folder.note("ended", attempt="b", outcome="preempted", reason="SIGTERM")
    assert of_attempt(folder, "b", 0).verdict == "preempted"


def test_a_full_disk_keeps_no_run_from_coming_back(tmp_path: Path) -> None:
    """No file can be written, the log and the journal among them; SLURM is asked all the same."""
    scontrol, asked = tmp_path / "bin" / "scontrol", tmp_path / "asked"
    write_text(
        scontrol,
        f"#!/bin/sh\n[ -d {asked} ] && state=PENDING || state=RUNNING\n"
        f'case "$*" in "requeue 1_0") mkdir {asked};;\n'
        '*"show job"*) echo "JobId=1 JobState=$state Restarts=0 Reason=None";; esac\n',
    )
    scontrol.chmod(0o755)
    run, batch = tmp_path / "run", tmp_path / "batches" / "b"
    run.mkdir()
    write_json(batch / "plan.json", {"runs": {"0": str(run)}})
    place = {"SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_NODELIST": "n1"}
    with open("/dev/full", "w") as full:
        subprocess.run(
            ["prlimit", "--fsize=0", sys.executable, "-m", "launch.verdict", str(batch), "143"],
            env={**os.environ, **place, "PATH": f"{scontrol.parent}:{os.environ['PATH']}"},
            cwd=Path(__file__).resolve().parents[2],
            stdout=full,
            timeout=60,
        )
    assert asked.is_dir()


def test_a_controller_that_is_away_is_asked_until_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long an upgrade takes; what it refuses is refused after three times."""
    said: list[str] = ["Unable to contact slurm controller (connect failure)"] * 50
    slept: list[float] = []

    def call(*command: str, timeout: float) -> str:
        if said:
            raise cluster.SlurmError(said.pop())
        return ""

    monkeypatch.setattr(cluster, "call", call)
    monkeypatch.setattr("time.sleep", slept.append)
    assert verdict.requeue("1_0", 0) == ""
    assert (len(slept), sum(slept) > 200) == (50, True)
    said[:] = ["Unable to contact slurm controller (connect failure)"] * 50
    assert verdict.ask("1_0") == {}
    assert not said
    said[:] = ["Invalid job id specified"] * 5
    assert verdict.requeue("1_0", 0) == "Invalid job id specified"
    assert len(said) == 2
    said[:] = ["Requested operation is presently disabled"] * 5
    assert verdict.requeue("1_0", 0)
    assert len(said) == 4

    # Where jobs are not requeued, it is asked for a new one in the same way.
    (tmp_path / "b").mkdir()
    write_json(tmp_path / "b" / "plan.json", {"code": "c", "runs": {"0": str(tmp_path / "run")}})
    (tmp_path / "run").mkdir()
    answers = ["Unable to contact slurm controller"] * 3

    def sbatch(*command: str, **_: object) -> str:
        if command[0] == "sbatch" and not answers:
            return "77"
        raise cluster.SlurmError(answers.pop() if command[0] == "sbatch" else "no answer within 20 s")

    monkeypatch.setattr(cluster, "call", sbatch)
    folder = RunFolder(tmp_path / "run")
    assert verdict.succeed(tmp_path / "b", folder, "1_0-0", "1_0") == ""
    assert (folder.last("submitting") or {})["after"] == "1_0"
    answers[:] = ["Job violates accounting/QOS policy"]
    assert verdict.succeed(tmp_path / "b", folder, "2_0-0", "2_0") == "Job violates accounting/QOS policy"


class Job:
    """Element 1_0 of a run, as its batch script's environment and scontrol have it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.facts, self.asked = "JobState=RUNNING Restarts=0 Reason=None", list[str]()
        self.folder, self.batch = RunFolder(root / "run"), root / "batches" / "b"
        self.folder.path.mkdir()
        write_json(self.batch / "plan.json", {"code": "c", "runs": {"0": str(self.folder.path)}})
        for name, value in {"ARRAY_JOB_ID": "1", "ARRAY_TASK_ID": "0", "JOB_NODELIST": "n1"}.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        monkeypatch.setattr(cluster, "call", self.call)
        monkeypatch.setattr("time.sleep", lambda seconds: None)

    def call(self, *command: str, **_: object) -> str:
        self.asked.append(" ".join(command))
        if command[:2] == ("scontrol", "requeue"):
            self.facts = "JobState=PENDING Restarts=1 Reason=BeginTime"
        return f"JobId=1 {self.facts}\n" if "job" in command else ""

    def verdicts(self) -> list[tuple[str, bool]]:
        return [(r["verdict"], r["again"]) for r in self.folder.journal if r["event"] == "verdict"]


def test_a_node_that_was_cut_off_lets_the_attempt_be_that_runs_elsewhere_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batch script hears of the next attempt only when the network is back: a requeue would end that one."""
    job = Job(tmp_path, monkeypatch)
    job.facts = "JobState=RUNNING Restarts=1 Reason=None"
    assert verdict.requeue("1_0", 0) == ""
    assert not [words for words in job.asked if "requeue" in words]
    # The next attempt has told already why this one ended.
    verdict.speak(job.folder, "1_0-0", Finding("infrastructure", "SLURM lost n1"), again=True, late=True)
    assert verdict.main([str(job.batch), "137"]) == 1
    assert job.verdicts() == [("infrastructure", True)]
    assert not [words for words in job.asked if "requeue" in words or "update" in words]


def test_a_verdict_that_was_killed_after_it_had_spoken_is_acted_on_and_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path, monkeypatch)
    write_json(
        job.folder.logs("1_0-0") / "failure_0.json", {"kind": "error", "message": "shapes", "time": 1.0}
    )
    verdict.speak(job.folder, "1_0-0", Finding("error", "shapes"), again=True)
    assert verdict.main([str(job.batch), "1"]) == 1
    assert "scontrol requeue 1_0" in job.asked
    assert job.verdicts() == [("error", True)]  # by a second one, its budget would be used up


def test_a_requeue_names_one_element_and_one_that_is_pending_already_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path, monkeypatch)
    monkeypatch.setenv("SLURM_JOB_ID", "1")  # the last element's, and the whole array's

    def call(*command: str, **_: object) -> str:
        said = job.call(*command)
        if command[:2] == ("scontrol", "requeue"):
            raise cluster.SlurmError("Job is pending execution for job 1_0")
        return said

    monkeypatch.setattr(cluster, "call", call)
    assert verdict.main([str(job.batch), "143"]) == 1
    assert [words for words in job.asked if "requeue" in words] == ["scontrol requeue 1_0"]
    assert not [words for words in job.asked if words.startswith("sbatch")]


def test_where_a_new_job_cannot_be_written_down_the_old_one_is_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM would hold the job at the next launch it loses, and the disk is full."""
    job = Job(tmp_path, monkeypatch)
    job.facts += " BatchFlag=5"
    (tmp_path / "batches" / "b.after-1_0").touch()
    assert verdict.main([str(job.batch), "143"]) == 1
    assert "scontrol requeue 1_0" in job.asked


def test_the_end_of_an_execution_that_slurm_forgot_does_not_end_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """slurmctld died before it wrote down that it had started the job: it runs elsewhere now, under the same name."""
    asked: list[str] = []
    host = ["n2"]

    def call(*command: str, timeout: float) -> str:
        asked.append(command[1])
        return f"JobId=1 JobState=RUNNING Restarts=0 Reason=None BatchHost={host[0]}\n"

    monkeypatch.setattr(cluster, "call", call)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for name, value in {"ARRAY_JOB_ID": "1", "ARRAY_TASK_ID": "0", "JOB_NODELIST": "n1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    write_json(tmp_path / "batches" / "b" / "plan.json", {"runs": {"0": str(folder.path)}})
    assert verdict.main([str(tmp_path / "batches" / "b"), "143"]) == 1
    assert "runs on n2 by now" in capfd.readouterr().out
    assert (asked, folder.journal) == (["-o"], [])
    verdict.stay("1_0", 0)
    assert "requeue" not in asked
    host[0] = "n1"
    verdict.stay("1_0", 0, seconds=0.001)
    assert "requeue" in asked


@pytest.mark.parametrize(("before", "goes_on"), [(0, True), (4, True), (5, False)])
def test_a_spare_speaks_for_the_job_that_was_lost_and_ends_where_the_budget_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, goes_on: bool
) -> None:
    job = Job(tmp_path, monkeypatch)
    for n in range(before):
        verdict.speak(job.folder, f"{n}", Finding("infrastructure", "SLURM lost n0"), again=True)
    job.folder.note("launched", attempt="1_0-0", node="n1")
    job.folder.note("launched", attempt="2_0-0", node="n2")  # the spare's ranks may be as fast

    def call(*command: str, **_: object) -> str:
        job.asked.append(" ".join(command))
        if command[-1] == "1_0":
            return "JobId=1 JobState=NODE_FAIL NodeList=n1\n"
        shown = "JobId=2 JobState=RUNNING Comment=b.after-1_0\n"
        return "3" if command[0] == "sbatch" else shown if command[-1] == "2_0" else ""

    monkeypatch.setattr(cluster, "call", call)
    successor.prepare(job.batch, job.folder, "2_0")
    assert job.verdicts()[before:] == [("infrastructure", goes_on)]
    spoken = job.folder.last("verdict") or {}
    assert (spoken["attempt"], spoken["reason"]) == ("1_0-0", "SLURM lost one of its nodes (n1)")
    assert bool(spoken.get("held")) is not goes_on
    assert [record["node"] for record in read_lines(tmp_path / "nodes.jsonl")] == ["n1"]
    assert any(words.startswith("sbatch") for words in job.asked) is goes_on
    assert ("scancel 2" in job.asked) is not goes_on
    job.asked.clear()
    successor.prepare(job.batch, job.folder, "2_0")  # SLURM starts the spare anew: once is enough
    assert len(job.verdicts()) == before + 1
    assert ("scancel 2" in job.asked) is not goes_on
