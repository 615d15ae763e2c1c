"""A sweep of more runs than an array may have elements: several arrays on a SLURM that takes four a time."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.files import append_line, write_json
from launch.record import RunFolder
from tests.launch import chain
from tests.slurm.cluster import PrivateSlurm

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[2]
RATES = [f"{n}e-5" for n in range(1, 11)]
SWEEP = f"sweep: {{train.optim.lr: [{', '.join(RATES)}]}}\n"


def test_a_sweep_over_max_array_size_is_several_arrays_that_hang_together(
    private_slurm: Callable[..., PrivateSlurm], tmp_path: Path
) -> None:
    slurm = private_slurm(nodes=3, max_array=4)
    file = chain.write(tmp_path, sweep2=SWEEP, sweep3=SWEEP)
    runs = tmp_path / "runs"
    later = "cluster.sbatch={begin: 'now+1hour'}"  # nothing shall run

    # A node that failed other runs of late is not given to new ones either.
    append_line(runs / "nodes.jsonl", {"time": time.time(), "node": "n2", "verdict": "infrastructure"})

    def submit() -> str:
        command = [sys.executable, ROOT / "launch" / "submit.py", file, later]
        return slurm.run(command, cwd=tmp_path).stdout

    said = re.findall(r"submitted s(\d): job (\d+), (\d+) run\(s\)(?: after (\S+))?", submit())
    first = said[0][1]
    numbers = {stage: [job for s, job, *_ in said if s == stage] for stage in "123"}
    assert [(s, int(count)) for s, _, count, _ in said] == [
        ("1", 1),
        *[(s, n) for s in "23" for n in (4, 4, 2)],
    ]
    assert {after for s, *_, after in said if s == "2"} == {f"afterok:{first}_0"}
    assert [after for s, *_, after in said if s == "3"] == [f"aftercorr:{job}" for job in numbers["2"]]

    # Element e of a stage's array k is run 4 k + e, and its SLURM job is there.
    jobs = slurm.jobs()
    assert len(jobs) == 21
    assert {job.fields["ExcNodeList"] for job in jobs.values()} == {"n2"}
    for stage in "23":
        for k, job in enumerate(numbers[stage]):
            [batch] = [
                p for p in runs.glob("batches/*/batch.json") if json.loads(p.read_text()).get("job") == job
            ]
            plan = json.loads((batch.parent / "plan.json").read_text())["runs"]
            expected = {str(e): RATES[4 * k + e] for e in range(min(4, 10 - 4 * k))}
            assert {e: Path(path).name.removeprefix("lr=") for e, path in plan.items()} == expected
            assert all(f"{job}_{e}" in jobs for e in plan)
            for e, path in plan.items():
                assert RunFolder(Path(path)).run["index"] == 4 * k + int(e)
                assert not Path(path).exists()  # until its job starts

    # Again: nothing. After a submitter that died before SLURM's answer: its array is found, and nothing sent.
    assert "nothing to do" in submit()
    [batch] = [
        p
        for p in runs.glob("batches/*/batch.json")
        if json.loads(p.read_text()).get("job") == numbers["3"][1]
    ]
    write_json(batch, {"state": "intent", "token": batch.parent.name})
    assert "nothing to do" in submit()
    assert json.loads(batch.read_text())["job"] == numbers["3"][1]
    assert len(slurm.jobs()) == 21

    # A limit on the stage is one over its arrays.
    words = [sys.executable, ROOT / "launch" / "runs.py", "--runs", runs, "throttle", "s3", "5"]
    slurm.run(words)
    limits = {
        job: slurm.run(["scontrol", "-o", "show", "job", job])
        .stdout.split("ArrayTaskThrottle=")[1]
        .split()[0]
        for job in numbers["3"]
    }
    assert list(limits.values()) == ["2", "2", "1"]
