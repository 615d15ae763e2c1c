"""The drill on this machine: real ranks, real signals, a card that says what they came to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def drill(folder: Path, data: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    small = ["wandb.mode=disabled", "gpus=1", "data.held_out="]  # 0.1 s a step: a fault finds it training
    command = [sys.executable, str(ROOT / "launch" / "runs.py"), "--runs", str(folder), "drill"]
    return subprocess.run(
        [*command, str(ROOT / "experiments" / "demo" / "stage1_align.yaml"), *small, *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "DATA_ROOT": str(data), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_a_checkpoint_is_torn_and_the_card_says_what_it_cost(tmp_path: Path, demo_data: Path) -> None:
    done = drill(tmp_path, demo_data, "--kinds", "torn checkpoint", "--save-every", "5", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    card = json.loads(done.stdout)
    assert card["passed"]
    assert card["faults"] == []
    [torn] = card["scores"]
    assert torn["kind"] == "torn checkpoint"
    assert "cut in half" in torn["done"]
    assert torn["verdict"].startswith("infrastructure")
    assert 5 < torn["lost"] <= torn["bound"] == 10  # the torn one was not gone on from


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kinds", "flood"], "flood: no such fault; there are warning, preemption, rank killed"),
        (["train.lrr=3"], "train.lrr: no such setting"),
    ],
)
def test_what_a_wrong_command_says(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = drill(tmp_path, tmp_path, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
