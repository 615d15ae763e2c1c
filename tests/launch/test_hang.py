"""A rank that stands still, for real: stopped in mid-training, named, its peers' stacks kept, and gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.files import read_lines
from launch.record import RunFolder
from launch.recovery.pulse import beats

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, demo_data: Path
) -> None:
    folder = RunFolder(tmp_path / "runs" / "hung" / "run")
    settings = [f"train.steps={STEPS}", "train.save_every=5", "cluster.hang_after=8s", "wandb.mode=disabled"]
    places = ["name=hung", f"runs={tmp_path / 'runs'}", f"data.root={demo_data}"]
    experiment = ROOT / "experiments" / "demo" / "stage1_align.yaml"
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "submit.py"), str(experiment), *places, *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while folder.last_metrics().get("step", 0) < 7:
        assert time.monotonic() < end
        time.sleep(0.01)
    attempt = folder.journal[-1]["attempt"]
    pid = beats(folder.logs(attempt))[1].pid
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.5)
    before = rows(folder)
    said, _ = run.communicate(timeout=200)
    assert run.returncode == 0, said

    verdicts = [record for record in folder.journal if record["event"] == "verdict"]
    assert [(record["verdict"], record["again"]) for record in verdicts] == [
        ("hang", True),
        ("finished", False),
    ]
    reason = verdicts[0]["reason"]
    assert reason.startswith("rank 1 on localhost was silent for ")
    assert "its process stands still; the other 1 wait for it" in reason
    assert f"hang ({reason})" in said
    # The one that waited says where; the one that stood still was killed where it stood.
    stacks = folder.log_of(attempt, 0).read_text()
    assert "Thread 0x" in stacks
    assert "moe/train.py" in stacks.split("most recent call first", 1)[1]
    assert not Path(f"/proc/{pid}").exists()

    # What was computed before the hang and not saved is computed again, bit for bit, and once in the history.
    starts = [record["step"] for record in folder.journal if record["event"] == "start"]
    assert starts[0] == 0
    assert starts[1] in (5, 10)
    assert rows(folder)[: len(before)] == before
    assert [step for step, _ in rows(folder)] == list(range(1, STEPS + 1))


def rows(folder: RunFolder) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_lines(folder.metrics_file)]
