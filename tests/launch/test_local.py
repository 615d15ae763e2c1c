"""The demo's first stage on this machine: stopped by Ctrl-C, gone on with, found done; killed, and found running."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.files import read_lines
from launch.operating.status import alive, batch_of
from launch.record import RunFolder
from launch.recovery.hands import LocalHands

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "demo" / "stage1_align" / "run")


@pytest.fixture
def start(tmp_path: Path, demo_data: Path) -> Callable[..., subprocess.Popen[str]]:
    def submit(*arguments: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            str(ROOT / "launch" / "submit.py"),
            str(ROOT / "experiments" / "demo" / "stage1_align.yaml"),
            f"runs={tmp_path / 'runs'}",
            f"data.root={demo_data}",
            "wandb.mode=disabled",
            f"train.steps={STEPS}",
            *arguments,
        ]
        return subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return submit


def until(condition: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def steps(folder: RunFolder) -> list[int]:
    return [row["step"] for row in read_lines(folder.metrics_file)]


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(
    start: Callable[..., subprocess.Popen[str]], folder: RunFolder, tmp_path: Path
) -> None:
    first = start()
    until(lambda: len(steps(folder)) >= 3)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    said, complained = first.communicate(timeout=300)
    assert first.returncode == 130, complained
    assert "the ranks save and leave" in said
    assert "the same command goes on from the last saved step" in complained
    assert "Traceback" not in complained
    saved = folder.last("saved")
    assert saved is not None
    assert 3 <= saved["step"] < STEPS
    assert steps(folder) == list(range(1, saved["step"] + 1))

    second = start()
    said, complained = second.communicate(timeout=600)
    assert second.returncode == 0, complained
    assert [record["step"] for record in folder.journal if record["event"] == "start"] == [0, saved["step"]]
    assert steps(folder) == list(range(1, STEPS + 1))
    assert "align" in said
    assert (folder.path / "loss.png").stat().st_size > 1000

    before = folder.journal
    third = start()
    said, _ = third.communicate(timeout=300)
    assert third.returncode == 0
    assert "nothing to do: every run is done" in said
    assert folder.journal == before

    # What was saved and gone on with is what a run without a stop ends in.
    other = start("name=demo/other")
    assert other.wait(timeout=600) == 0, other.stderr
    again = RunFolder(tmp_path / "runs" / "demo" / "other" / "run")
    digests = [json.loads(f.handoff_file.read_text())["digest"] for f in (folder, again)]
    assert digests[0] == digests[1]
    for process in (first, second, third, other):
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def test_ctrl_c_while_the_ranks_load_ends_them_at_once(
    start: Callable[..., subprocess.Popen[str]], folder: RunFolder, tmp_path: Path
) -> None:
    python = tmp_path / "a b" / "python"  # a path with a blank is a path
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    first = start(f"cluster.python={python}")
    until(lambda: "pid" in (batch_of(folder) or ({}, 0))[0])
    batch = batch_of(folder)
    assert batch is not None
    os.killpg(first.pid, signal.SIGINT)
    _, complained = first.communicate(timeout=60)
    assert first.returncode == 130, complained
    assert "the same command goes on" in complained
    assert "Traceback" not in complained
    assert not alive(batch[0]["pid"], batch[0]["started"])
    assert [record["event"] for record in folder.journal if record["event"] in ("start", "verdict")] == [
        "verdict"
    ]
    last = folder.last("verdict")
    assert last is not None
    assert (last["verdict"], last["again"]) == ("preempted", False)


@pytest.mark.slow
def test_a_killed_submitter_leaves_a_run_that_the_next_one_follows(
    start: Callable[..., subprocess.Popen[str]], folder: RunFolder
) -> None:
    first = start()
    until(lambda: len(steps(folder)) >= 2)
    first.kill()
    first.wait()  # not communicate: the controller holds the pipe, and lives on
    batch = batch_of(folder)
    assert batch is not None
    assert alive(batch[0]["pid"], batch[0]["started"])
    second = start()
    _, complained = second.communicate(timeout=600)
    assert second.returncode == 0, complained
    assert sum(record["event"] == "start" for record in folder.journal) == 1
    assert steps(folder) == list(range(1, STEPS + 1))
    for stream in (first.stdout, first.stderr):
        assert stream is not None
        stream.close()


@pytest.mark.slow
def test_an_error_on_a_rank_ends_in_words(
    start: Callable[..., subprocess.Popen[str]], folder: RunFolder, tmp_path: Path
) -> None:
    (tmp_path / "torn.json").write_text('[{"id":')
    failed = start(f"data.mix={tmp_path / 'torn.json'}")
    said, complained = failed.communicate(timeout=600)
    assert failed.returncode == 1
    assert "torn.json, line 1, byte 7, record 0: not valid JSON" in complained
    assert "log: " in complained
    assert "Traceback" not in said + complained
    # What the data lack, they lack on a second attempt too.
    assert sum(record["event"] == "verdict" for record in folder.journal) == 1


@pytest.mark.slow
def test_a_full_disk_ends_it_at_once_and_the_same_command_goes_on(
    start: Callable[..., subprocess.Popen[str]], folder: RunFolder
) -> None:
    full = start("train.save_every=20")
    until(lambda: len(steps(folder)) > 2)
    assert LocalHands(folder, random.Random(0)).fill()
    said, complained = full.communicate(timeout=600)
    assert full.returncode == 1
    assert "starting again" not in said
    assert "full disk: step_00000020 was not saved" in complained
    assert "make room, or lower train.keep; the same command goes on" in complained
    assert [(r["verdict"], r["again"]) for r in folder.journal if r["event"] == "verdict"] == [
        ("full disk", False)
    ]
    again = start("train.save_every=20")
    again.communicate(timeout=600)
    assert again.returncode == 0
    assert steps(folder) == list(range(1, STEPS + 1))
