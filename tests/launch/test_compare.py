"""What a difference between a run and a spec would mean for the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.files import write_json
from launch.identity import FREE, plain
from launch.operating import compare
from launch.plan import load, make
from tests.launch import chain

ROOT = Path(__file__).resolve().parents[2]
SWEEP = "sweep: {train.optim.lr: [1e-5, 2e-5]}\n"


def recorded(tmp_path: Path, sweep: str = SWEEP) -> Path:
    """The chain's files with the folders of its last stage's runs, as a submission would leave them."""
    file = chain.write(tmp_path, sweep3=sweep)
    for run in make(file).stages[2].runs:
        write_json(run.folder.spec_file, plain(run.spec))
        write_json(run.folder.run_file, run.record("0123456789abcdef"))
    return file


def runs(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "runs.py"), "--runs", str(tmp_path / "runs"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ})


def test_differences_are_told_by_what_they_mean(tmp_path: Path) -> None:
    file = recorded(tmp_path, sweep="")
    changes = ["gpus=2", "train.optim.lr=3e-5", "cluster.partition=high", "train.save_every=7", "moe.top_k=1"]
    done = runs(tmp_path, "diff", "s3", str(file), changes[0], "--json", *changes[1:])
    assert done.returncode == 0, done.stderr
    found = {row["key"]: (row["was"], row["now"], row["group"]) for row in json.loads(done.stdout)}
    assert found == {
        "gpus": (4, 2, "resume-safe"),
        "cluster.partition": ("main", "high", "free"),
        "moe.top_k": (2, 1, "new run"),
        "train.optim.lr": (found["train.optim.lr"][0], 3e-5, "new run"),
        "train.save_every": (found["train.save_every"][0], 7, "free"),
    }


def test_the_text_names_the_lines(tmp_path: Path) -> None:
    file = recorded(tmp_path)
    file.write_text(file.read_text().replace("expert_parallel: 2", "expert_parallel: 4, top_k: 1"))
    text = runs(tmp_path, "diff", "lr=2e-5", str(file)).stdout
    assert "needs a new run" in text
    assert "  moe.top_k: 2 -> 1    " in text
    assert f"{file}:4" in text
    assert "resume-safe" in text
    assert "moe.expert_parallel: 2 -> 4" in text


def test_a_run_is_as_its_spec_and_differs_from_its_neighbour_in_the_sweep(tmp_path: Path) -> None:
    file = recorded(tmp_path)
    assert "do not differ" in runs(tmp_path, "diff", "lr=1e-5", str(file)).stdout
    [row] = json.loads(runs(tmp_path, "diff", "lr=1e-5", "lr=2e-5", "--json").stdout)
    assert (row["key"], row["group"]) == ("train.optim.lr", "new run")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lr=1e-5", "nowhere.yaml"], "nowhere.yaml"),
        (["lr=1e-5", "elsewhere"], "elsewhere: no such run"),
        (["s3", "lr=1e-5"], "s3 means 2 runs"),
        (["lr=", "lr=1e-5"], "lr= may mean s3/lr=1e-5, s3/lr=2e-5"),
        (["lr=1e-5", "s3"], "s3 means several runs; name one"),
    ],
)
def test_what_a_wrong_command_says(tmp_path: Path, arguments: list[str], words: str) -> None:
    recorded(tmp_path)
    done = runs(tmp_path, "diff", *arguments)
    assert done.returncode == 2
    assert words in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_a_point_that_the_experiment_no_longer_has_is_told(tmp_path: Path) -> None:
    file = recorded(tmp_path)
    file.write_text(file.read_text().replace("1e-5", "9e-5"))
    done = runs(tmp_path, "diff", "lr=1e-5", str(file))
    assert (done.returncode, "has the points lr=9e-5, lr=2e-5, and none is lr=1e-5" in done.stderr) == (
        2,
        True,
    )


def test_every_setting_that_a_run_may_change_is_in_a_group_of_its_own_meaning(tmp_path: Path) -> None:
    spec = plain(load(recorded(tmp_path)).spec)
    keys = [key for key, _ in compare._flat(spec)]
    groups = {key: compare._group(key, dense=False) for key in keys}
    identity = {key for key in keys if groups[key] == "new run"}
    assert not {key for key in identity if any(key == free or key.startswith(free + ".") for free in FREE)}
    assert set(compare.RESUME_SAFE) <= set(FREE)
    assert {"train.steps", "train.global_batch", "seed", "model.backbone", "moe.experts"} <= identity
    assert compare._group("moe.experts", dense=True) == "free"
