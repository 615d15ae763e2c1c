"""The second door over run folders in each state, without SLURM's accounting and without SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.launch import chain

from launch.record import RunFolder, write_json

ROOT = Path(__file__).resolve().parents[2]


def call(runs: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "runs.py"), "--runs", str(runs), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": path or os.environ["PATH"]},
    )


@pytest.fixture()
def runs(tmp_path: Path) -> Path:
    """Runs in five states, of one array with SLURM's id 100."""
    root = tmp_path / "runs"
    batch = root / "batches" / "t-0"
    write_json(batch / "batch.json", {"state": "submitted", "token": "t-0", "job": "100"})
    for index, name in enumerate(["done", "running", "queued", "failed", "cancelled", "new"]):
        folder = RunFolder(root / "sweep" / name)
        write_json(folder.run_file, {"id": f"sweep-{name}-1234", "stage": "moe"})
        if name != "new":
            folder.note("submitting", batch=str(batch), index=index)
        if name in ("done", "running", "failed"):
            folder.note("start", attempt=f"100_{index}-0", steps=50)
            folder.metrics_file.write_text('{"step": 7, "loss": 2.5}\n')
            log = folder.log_of(f"100_{index}-0", 0)
            log.parent.mkdir(parents=True)
            log.write_text(f"rank 0 of {name}\n")
        if name == "done":
            write_json(folder.handoff_file, {"step": 50})
        if name == "failed":
            folder.note("verdict", attempt="100_3-0", verdict="error", reason="ValueError: 3", again=False)
            folder.log_of("100_3-0", 1).write_text("Traceback of rank 1\n")
            write_json(folder.logs("100_3-0") / "failure_1.json", {"kind": "error"})
        if name == "cancelled":
            folder.note("cancelled", by="me")
    return root


@pytest.fixture()
def path(tmp_path: Path) -> str:
    """A PATH with a squeue that knows two of the elements."""
    slurm = chain.fake_slurm(tmp_path / "bin")
    (slurm / "queue").write_text("100_1|RUNNING|None|n[1-2]|t-0\n100_2|PENDING|Priority||t-0\n")
    return chain.path_with(slurm)


def test_list_names_the_runs(runs: Path) -> None:
    done = call(runs, "list")
    assert done.stdout.split() == [
        f"sweep/{n}" for n in ("cancelled", "done", "failed", "new", "queued", "running")
    ]
    assert json.loads(call(runs, "list", "--json", "sweep/new").stdout) == ["sweep/new"]


def test_status_tells_each_state(runs: Path, path: str) -> None:
    rows = {row["run"]: row for row in json.loads(call(runs, "status", "--json", path=path).stdout)}
    assert {name.split("/")[1]: row["name"] for name, row in rows.items()} == {
        n: n for n in ("cancelled", "done", "failed", "new", "queued", "running")
    }
    assert rows["sweep/running"]["step"] == 7
    assert rows["sweep/running"]["job"] == "100_1"
    assert rows["sweep/queued"]["reason"] == "Priority"
    assert rows["sweep/failed"]["reason"] == "error: ValueError: 3"
    text = call(runs, "status", path=path).stdout
    assert "7/50" in text
    assert "n[1-2]" in text


def test_without_slurm_what_was_submitted_is_unknown_and_the_rest_is_told(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = call(runs, "status", "--json", path=str(tmp_path / "empty"))
    states = {row["run"].split("/")[1]: row["name"] for row in json.loads(done.stdout)}
    assert states["done"] == "done"
    assert states["new"] == "new"
    assert states["running"] == "unknown"


def test_exit_code_says_whether_all_are_done(runs: Path, path: str) -> None:
    assert call(runs, "status", "--exit-code", "sweep/done", path=path).returncode == 0
    assert call(runs, "status", "--exit-code", path=path).returncode == 1


def test_logs_open_the_rank_that_failed(runs: Path) -> None:
    assert call(runs, "logs", "failed").stdout == "Traceback of rank 1\n"
    assert call(runs, "logs", "failed", "--rank", "0").stdout == "rank 0 of failed\n"
    assert call(runs, "logs", "100_0").stdout == "rank 0 of done\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status", "nothing"], "nothing: no such run"),
        (["logs"], "logs shows one run, and 6 are meant"),
        (["logs", "new"], "has not started"),
        (["logs", "done", "--attempt", "9"], "9: no such attempt; there are 100_0-0"),
        (["logs", "done", "--rank", "5"], "rank_5.log: no such log"),
        (["cancel", "sweep"], "2 runs would be cancelled; say -y"),
    ],
)
def test_what_a_wrong_command_says(runs: Path, path: str, arguments: list[str], words: str) -> None:
    done = call(runs, *arguments, path=path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_empty_folder_has_no_runs(tmp_path: Path) -> None:
    assert "no runs in" in call(tmp_path, "status").stdout
