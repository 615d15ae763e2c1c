"""The whole path on a real SLURM: three stages over 2 nodes x 2 ranks, a sweep of two, and a preemption in the middle.

SLURM's defaults: GraceTime 0 and no user signal, so that the ranks have KillWait (30 s, the default too) to save.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.files import read_lines
from launch.record import RunFolder
from tests.slurm.cluster import PrivateSlurm

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30
CHAIN = [
    "cluster.executor=slurm",
    "cluster.partition=main",
    "cluster.gpus_per_node=2",
    "cluster.cpus_per_gpu=1",
    "cluster.walltime=20m",
    "cluster.grace=1m",
    "cluster.sbatch={gres: 'gpu:h100:8'}",  # a node each, so that two elements share none
    "gpus=4",
    "wandb.mode=offline",
    "stage1_align:train.steps=3",
    "stage1_align:train.micro_batch=8",
    "stage2_instruct:train.steps=4",
    "stage2_instruct:train.micro_batch=8",
    f"train.steps={STEPS}",
    "train.micro_batch=8",
]

SMALL = ["cluster.gpus_per_node=1", "gpus=2"]  # a rank a node: the start of each takes ten seconds of a core


@pytest.fixture
def cluster(private_slurm: Callable[..., PrivateSlurm]) -> PrivateSlurm:
    return private_slurm(kill_wait=30)


def submit(cluster: PrivateSlurm, runs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    spec = ROOT / "experiments" / "demo" / "stage3_moe.yaml"
    settings = {word.split("=")[0]: word for word in (*CHAIN, f"runs={runs}", *arguments) if "=" in word}
    options = [word for word in arguments if "=" not in word]
    command = [sys.executable, ROOT / "launch" / "submit.py", spec, *settings.values(), *options]
    return cluster.run(command, cwd=runs.parent, timeout=120)


def status(cluster: PrivateSlurm, runs: Path) -> dict[str, dict[str, Any]]:
    done = cluster.run([sys.executable, ROOT / "launch" / "runs.py", "--runs", runs, "status", "--json"])
    return {row["run"]: row for row in json.loads(done.stdout)}


def finished(cluster: PrivateSlurm, runs: Path, *names: str) -> Callable[[], bool]:
    """For `cluster.wait`: whether these runs are done. That none has failed is asked now and then: it takes a core."""
    asked = time.monotonic()

    def done() -> bool:
        nonlocal asked
        over = all((runs / name / "handoff.json").exists() for name in names)
        if not over and time.monotonic() < asked + 15:
            return False
        asked = time.monotonic()
        rows = status(cluster, runs)
        states = {name: rows[name]["name"] for name in names if name in rows}
        broken = {
            name: rows[name] for name, state in states.items() if state in ("failed", "stopped", "cancelled")
        }
        if broken:
            logs = sorted(runs.rglob("logs/*/rank_0.log"), key=os.path.getmtime)
            pytest.fail(f"{broken}\n{logs[-1].read_text()[-3000:] if logs else ''}\n{cluster.describe()}")
        return len(states) == len(names) and set(states.values()) == {"done"}

    return done


def history(folder: RunFolder) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_lines(folder.metrics_file)]


@pytest.mark.slurm
@pytest.mark.slow
def test_three_stages_as_chained_arrays_and_a_preemption_that_loses_nothing(
    cluster: PrivateSlurm, demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_ROOT", str(demo_data))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs = tmp_path / "runs"
    sweep = "sweep={train.optim.lr: [1e-3, 2e-3]}"
    said = submit(cluster, runs, sweep).stdout
    assert said.count("submitted demo/") == 3
    jobs = cluster.jobs()
    assert [
        jobs[f"{array}_{index}"].fields["Dependency"].split("(")[0]
        for array, index in ((2, 0), (3, 0), (3, 1))
    ] == [
        "afterok:1_0",
        "afterok:2_0",
        "afterok:2_0",
    ]
    # The same command again: nothing is submitted twice.
    assert "nothing to do" in submit(cluster, runs, sweep).stdout
    assert set(cluster.jobs()) == {"1_0", "2_0", "3_0", "3_1"}

    disturbed = RunFolder(runs / "demo" / "stage3_moe" / "lr=1e-3")
    other = RunFolder(runs / "demo" / "stage3_moe" / "lr=2e-3")
    cluster.wait(finished(cluster, runs, "demo/stage1_align/run", "demo/stage2_instruct/run"), 240, every=1)
    cluster.wait(lambda: disturbed.last_metrics().get("step", 0) >= 3, 240, every=0.1)
    nodes = ",".join(cluster.job("3_0").nodes)
    urgent = cluster.sbatch(
        "#!/bin/sh\nsleep 2\n", "--partition=urgent", "--exclusive", "-N2", f"--nodelist={nodes}"
    )
    cluster.wait(lambda: cluster.job("3_0").restarts == 1, 60)
    cluster.wait_state(urgent, "COMPLETED", timeout=90)
    names = ["demo/stage3_moe/lr=1e-3", "demo/stage3_moe/lr=2e-3"]
    cluster.wait(finished(cluster, runs, *names), 400, nudge=True, every=1)

    # One restart, of the one element, on one warning; nothing was trained twice and nothing is missing.
    assert {id: job.restarts for id, job in cluster.jobs().items() if id.startswith("3_")} == {
        "3_0": 1,
        "3_1": 0,
    }
    starts = [record for record in disturbed.journal if record["event"] == "start"]
    ends = [(r["outcome"], r["reason"]) for r in disturbed.journal if r["event"] == "ended"]
    assert ends == [("preempted", "SIGTERM"), ("finished", "")]
    assert 0 < starts[1]["step"] < STEPS
    assert [step for step, _ in history(disturbed)] == list(range(1, STEPS + 1))
    assert [step for step, _ in history(other)] == list(range(1, STEPS + 1))

    # The undisturbed run, from the same parent, ends in the same weights, losses and handoff, bit for bit.
    submit(cluster, runs, "sweep={train.optim.lr: [1e-3]}", "name=demo/undisturbed", "--only", "moe")
    cluster.wait(finished(cluster, runs, "demo/undisturbed/lr=1e-3"), 240, every=1)
    undisturbed = RunFolder(runs / "demo" / "undisturbed" / "lr=1e-3")
    assert sum(record["event"] == "start" for record in undisturbed.journal) == 1
    assert history(disturbed) == history(undisturbed)
    ours, theirs = (json.loads(folder.handoff_file.read_text()) for folder in (disturbed, undisturbed))
    assert ours["shards"] == theirs["shards"]
    assert ours["digest"] == theirs["digest"]
    assert ours["digest"] != json.loads(other.handoff_file.read_text())["digest"]
    same = ("identity", "stage", "step", "tokenizer", "parent", "code", "version")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    # One W&B run a run, under one id, whatever the attempts.
    files = {path.name for path in disturbed.path.glob("wandb/**/offline-run-*/run-*.wandb")}
    assert files == {f"run-{disturbed.run['id']}.wandb"}


@pytest.mark.slurm
def test_cancel_is_final(
    cluster: PrivateSlurm, demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_ROOT", str(demo_data))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs = tmp_path / "runs"
    endless = ["stage1_align:train.steps=5000", "--only", "align", *SMALL]
    submit(cluster, runs, *endless)
    folder = RunFolder(runs / "demo" / "stage1_align" / "run")
    cluster.wait(lambda: folder.last_metrics().get("step", 0) >= 2, 120, every=0.1)
    cluster.run([sys.executable, ROOT / "launch" / "runs.py", "--runs", runs, "cancel", "stage1"])
    cluster.wait(lambda: cluster.job("1_0").over, 60, every=0.2)
    assert cluster.job("1_0").restarts == 0
    assert status(cluster, runs)["demo/stage1_align/run"]["name"] == "cancelled"
    # What was trained is kept, and submitting again goes on from there.
    saved = folder.last("saved")
    assert saved is not None
    submit(cluster, runs, *endless)
    cluster.wait(lambda: folder.last_metrics().get("step", 0) > saved["step"] + 1, 120, every=0.1)
    assert [r["step"] for r in folder.journal if r["event"] == "start"] == [0, saved["step"]]
    cluster.run([sys.executable, ROOT / "launch" / "runs.py", "--runs", runs, "cancel", "stage1"])
    cluster.wait(lambda: cluster.job("2_0").over, 60, every=0.2)


@pytest.mark.slurm
@pytest.mark.slow
def test_with_a_grace_and_the_user_signal_the_verdict_requeues_once(
    private_slurm: Callable[..., PrivateSlurm],
    demo_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATA_ROOT", str(demo_data))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cluster = private_slurm(user_signal=True, grace=60)
    runs = tmp_path / "runs"
    steps = ["stage1_align:train.steps=40", "--only", "align", *SMALL]
    submit(cluster, runs, "cluster.partition=grace", *steps)
    folder = RunFolder(runs / "demo" / "stage1_align" / "run")
    cluster.wait(lambda: folder.last_metrics().get("step", 0) >= 3, 120, every=0.1)
    nodes = ",".join(cluster.job("1_0").nodes)
    urgent = cluster.sbatch(
        "#!/bin/sh\nsleep 1\n", "--partition=urgent", "--exclusive", "-N2", f"--nodelist={nodes}"
    )
    cluster.wait(lambda: cluster.job("1_0").restarts == 1, 60)
    cluster.wait_state(urgent, "COMPLETED", timeout=90)
    cluster.wait(finished(cluster, runs, "demo/stage1_align/run"), 200, nudge=True, every=1)
    cluster.wait_state("1_0", "COMPLETED", timeout=60)  # its last word comes after the handoff
    assert cluster.job("1_0").restarts == 1
    verdicts = [(r["verdict"], r["reason"]) for r in folder.journal if r["event"] == "verdict"]
    assert verdicts == [("preempted", "SIGUSR2"), ("finished", "")]
    submit(cluster, runs, "stage1_align:name=demo/again", *steps)
    cluster.wait(finished(cluster, runs, "demo/again/run"), 200, every=1)
    again = RunFolder(runs / "demo" / "again" / "run")
    assert history(folder) == history(again)
    assert (
        json.loads(folder.handoff_file.read_text())["digest"]
        == json.loads(again.handoff_file.read_text())["digest"]
    )
