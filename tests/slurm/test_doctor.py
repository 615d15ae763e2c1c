"""The doctor and the verbs on a real SLURM, with accounting and without."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.reader import Layers
from launch.spec import ClusterSpec
from tests.slurm.cluster import PrivateSlurm

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[2]


def doctor(slurm: PrivateSlurm, *arguments: str) -> str:
    command = [sys.executable, ROOT / "launch" / "runs.py", "doctor", *arguments]
    return slurm.run(command, timeout=60).stdout


def facts(slurm: PrivateSlurm, *arguments: str) -> dict[str, dict[str, Any]]:
    return {fact["name"]: fact for fact in json.loads(doctor(slurm, "--json", *arguments))["facts"]}


def test_without_accounting(slurm: PrivateSlurm, tmp_path: Path) -> None:
    found = facts(slurm)
    values = {name: fact["value"] for name, fact in found.items()}
    assert values["version"].startswith("22.05")
    assert values["PreemptMode"] == "REQUEUE"
    assert values["GraceTime"] == "0 s"
    assert values["KillWait"] == "5 s"
    assert found["KillWait"]["level"] == "warn"
    assert values["send_user_signal"] == "no"
    assert values["requeue delay"] == "120 s"
    assert values["accounting"] == "SLURM keeps none"
    assert values["MaxArraySize"] == "1001"
    assert found["ProctrackType"]["level"] == "note"
    assert facts(slurm, "--partition", "grace")["GraceTime"]["value"] == "20 s"
    assert facts(slurm, "--partition", "urgent")["PreemptMode"]["value"] == "OFF"
    path = tmp_path / "here.yaml"
    assert f"wrote {path}" in doctor(slurm, "--partition", "main", "--write", str(path))
    spec = Layers.read(path).build(ClusterSpec)
    assert (spec.partition, spec.gpus_per_node, spec.cpus_per_gpu, spec.mem_gb_per_gpu) == ("main", 8, 8, 57)
    # The preset's own words are what sbatch takes: a job as the plan would ask for it, weighed and not sent.
    options = [
        f"--partition={spec.partition}",
        "-N2",
        "--ntasks-per-node=8",
        f"--cpus-per-task={spec.cpus_per_gpu}",
    ]
    options += [
        "--gres=gpu:8",
        f"--mem={int(spec.mem_gb_per_gpu * 8 * 1024)}M",
        f"--time={int(spec.walltime) // 60}",
    ]
    said = slurm.run(["sbatch", "--test-only", *options, "--wrap=true"]).stderr
    assert "to start at" in said


def test_with_accounting(slurm_accounting: PrivateSlurm) -> None:
    slurm_accounting.run(["sacctmgr", "-i", "modify", "user", "root", "set", "MaxSubmitJobs=77"])
    try:
        found = facts(slurm_accounting)
    finally:
        slurm_accounting.run(["sacctmgr", "-i", "modify", "user", "root", "set", "MaxSubmitJobs=-1"])
    assert found["accounting"]["value"] == "slurmdbd"
    assert found["MaxSubmit of root"]["value"] == "77"
    assert "accounts" not in found  # not enforced


def test_a_site_that_cancels_and_warns(private_slurm: Callable[..., PrivateSlurm]) -> None:
    slurm = private_slurm(nodes=1, preempt="CANCEL", requeue=False, user_signal=True, gpus=0, cred_expire=7)
    found = facts(slurm)
    assert (found["PreemptMode"]["value"], found["PreemptMode"]["level"]) == ("CANCEL", "warn")
    assert found["send_user_signal"]["value"] == "yes"
    assert found["JobRequeue"]["value"] == "0"
    assert found["requeue delay"]["value"] == "7 s"
    assert found["GPUs"]["level"] == "note"
