"""A submitter killed at any moment, and the command given again: one set of jobs, none of them dead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.files import read_json
from tests.launch import chain
from tests.launch.test_submission import sent, submit

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_killed_before_every_change_and_within_each_sbatch(tmp_path: Path) -> None:
    """And before each while the code is copied, some 500: python -m tests.launch.killed FOLDER"""
    done = subprocess.run(
        [sys.executable, "-m", "tests.launch.killed", str(tmp_path), "1", "60"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    trials = [json.loads(line) for line in done.stdout.splitlines()]
    assert [trial for trial in trials if trial["wrong"]] == []
    assert sum(trial["died"] for trial in trials) > 30
    assert sum("sbatch number" in trial["where"] for trial in trials) == 3
    places = " ".join(trial["where"] for trial in trials)
    for part in ("batch.json", "plan.json", "script.sbatch", "subprocess.Popen", "os.rename"):
        assert part in places


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    return chain.fake_slurm(tmp_path / "bin")


def test_a_job_that_comes_after_its_answer_was_given_up_is_not_sent_twice(
    tmp_path: Path, slurm: Path
) -> None:
    """slurmctld was busy: sbatch gives up, so do we, and then the job is there."""
    file = chain.write(tmp_path)
    (slurm / "mode").write_text("late")
    lost = submit(file, slurm=slurm)
    assert lost.returncode == 3
    assert "Socket timed out" in lost.stderr
    assert "repeat the command" in lost.stderr
    [batch] = tmp_path.glob("runs/batches/*/batch.json")
    with open(slurm / "queue", "a") as queue:
        queue.write(f"77_0|PENDING|Priority||{batch.parent.name}\n")
    (slurm / "mode").unlink()
    assert submit(file, slurm=slurm).returncode == 0
    assert len(sent(slurm)) == 2  # the two stages after it
    record = read_json(batch)
    assert record is not None
    assert (record["job"], record["adopted"]) == ("77", True)


def test_the_job_of_another_folder_of_the_same_runs_is_not_adopted(tmp_path: Path, slurm: Path) -> None:
    """Nor one of a folder that was removed since, which SLURM remembers all the same."""
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    assert submit(chain.write(tmp_path / "first"), slurm=slurm).returncode == 0
    file = chain.write(tmp_path / "second")
    (slurm / "mode").write_text("late")
    assert submit(file, slurm=slurm).returncode == 3
    (slurm / "mode").unlink()
    assert submit(file, slurm=slurm).returncode == 0
    jobs = [
        {
            facts.get("job")
            for facts in map(read_json, tmp_path.glob(f"{name}/runs/batches/*/batch.json"))
            if facts
        }
        for name in ("first", "second")
    ]
    assert not (jobs[0] & jobs[1]) - {None}


def test_a_job_that_never_came_is_sent_once_more(tmp_path: Path, slurm: Path) -> None:
    file = chain.write(tmp_path)
    (slurm / "mode").write_text("late")
    assert submit(file, slurm=slurm).returncode == 3
    (slurm / "mode").unlink()
    assert submit(file, slurm=slurm).returncode == 0
    assert len((slurm / "queue").read_text().splitlines()) == 3
    assert "nothing to do" in submit(file, slurm=slurm).stdout
