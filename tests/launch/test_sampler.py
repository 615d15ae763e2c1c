"""A node's load is sampled by a process of its own, which ends with the rank that started it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import sampler
from launch.files import read_lines
from tests.launch.tracked import ROOT, wait

SMI = """#!/bin/sh
echo "80, 40960, 400.5, 61"
echo "40, 20480, [N/A], 70"
"""


def test_a_sampler_writes_until_its_input_ends(tmp_path: Path) -> None:
    process = sampler.start(tmp_path, "n7")
    file = tmp_path / "wandb" / "nodes" / "n7.jsonl"
    assert file.parent.is_dir()
    process.communicate(timeout=20)
    assert process.returncode == 0
    command = [sys.executable, "-m", "launch.sampler", str(file), "0.1"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE) as fast:
        wait(lambda: len(list(read_lines(file))) >= 3)
        assert fast.poll() is None
        assert fast.stdin is not None
        fast.stdin.close()
        assert fast.wait(20) == 0
    for row in read_lines(file):
        assert 0 <= row["cpu"] <= 1
        assert 0 < row["memory_gb"] < 1e5
        assert abs(time.time() - row["time"]) < 60


def test_gpus_are_told_together_and_what_they_do_not_say_is_left_out(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    assert sampler.graphics(str(program)) == {
        "gpu_use": pytest.approx(0.6),
        "gpu_use_min": 0.4,
        "gpu_memory_gb": 42.95,  # 40960 MiB
        "gpu_watts": 400.5,
        "gpu_celsius": 70,
    }
    program.write_text("#!/bin/sh\necho Failed to initialize NVML\nexit 9\n")
    assert sampler.graphics(str(program)) == {}


def test_only_fresh_samples_count(tmp_path: Path) -> None:
    nodes = tmp_path / "wandb" / "nodes"
    nodes.mkdir(parents=True)
    for node, age in (("n1", 5.0), ("n2", 500.0)):
        (nodes / f"{node}.jsonl").write_text(
            json.dumps({"time": 900.0, "cpu": 0.1})
            + "\n"
            + json.dumps({"time": 1000.0 - age, "cpu": 0.4})
            + '\n{"ti'
        )
    assert sampler.newest(tmp_path, 1000.0) == {"n1": {"time": 995.0, "cpu": 0.4}}
    assert sampler.newest(tmp_path / "none", 1000.0) == {}


def test_processor_time_is_what_is_not_idle() -> None:
    assert sampler.processors([0] * 8, [10, 0, 10, 60, 20, 0, 0, 0]) == 0.2
