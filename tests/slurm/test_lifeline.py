"""The job that waits for the case that no run is left to help another, on a real SLURM."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from launch.recovery import lifeline
from launch.spec import Duration
from tests.slurm.cluster import PrivateSlurm
from tests.slurm.test_limbo import mend, spoil
from tests.slurm.test_recovery import Submitted

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
WAIT = 6


def test_the_last_run_that_slurm_holds_is_let_go_by_a_job_that_never_starts_while_a_run_goes_on(
    private_slurm: Callable[..., PrivateSlurm], tmp_path: Path
) -> None:
    slurm = private_slurm(
        nodes=3, kill_wait=5, slurmd_timeout=30, message_timeout=2, extra=("BatchStartTimeout=1",)
    )
    run = Submitted(slurm, tmp_path, "run", "finish", lifeline=Duration(WAIT))
    place = tmp_path / "runs" / ".lifeline"

    def waits() -> dict[str, Any] | None:
        return json.loads((place / "job.json").read_text()) if (place / "job.json").exists() else None

    slurm.wait(waits, 30)
    first = waits()
    assert first is not None

    def begins() -> datetime:
        return datetime.fromisoformat(slurm.job(first["job"]).fields["StartTime"])

    at_first = begins()
    # The run goes on for longer than that, and puts it off.
    slurm.wait(lambda: begins() > at_first + timedelta(seconds=WAIT), 30)
    assert slurm.job(first["job"]).state == "PENDING"
    assert not (place / "log").exists()

    # The run's launch fails, SLURM holds it, and nothing of ours is left but the job that waits.
    slurm.run(["scontrol", "requeue", run.id])
    spools = [slurm.folder / "spool" / node / f"job{int(run.array):05}" for node in slurm.nodes]
    slurm.wait(lambda: slurm.job(run.id).state == "PENDING" and not any(map(Path.exists, spools)), 30)
    spoil(slurm, int(run.array))
    slurm.wait(lambda: run.of("freed"), 60, nudge=True)
    assert run.of("freed")[0]["job"] == run.id
    mend(slurm, int(run.array))
    slurm.wait(lambda: len(run.of("start")) > 1, 60, nudge=True)

    # It was let go by the job, which waits anew (and begins again where the run takes long to start); once the run is
    # done, the one that waits is taken back.
    said = [json.loads(line) for line in (place / "log").read_text().splitlines()]
    assert [run.id] in [row["freed"] for row in said]
    waited = [first["job"]]

    def done() -> bool:
        if (again := waits()) and again["job"] != waited[-1]:
            waited.append(again["job"])
        return run.state()[0] == "done"

    slurm.wait(done, 90, nudge=True)
    slurm.wait(lambda: waits() is None, 10)
    assert len(waited) > 1
    assert slurm.job(waited[-1]).state == "CANCELLED"


def test_it_asks_for_what_the_runs_ask_for_and_no_gpu(tmp_path: Path) -> None:
    batch = tmp_path / "my runs" / "batches" / "x-0"
    batch.mkdir(parents=True)
    (batch / "plan.json").write_text(json.dumps({"code": "/a/code of mine"}))
    spec = {
        "cluster": {
            "partition": "p",
            "account": "a b",
            "qos": "",
            "python": "/env/bin/python",
            "mem_gb_per_gpu": 4.0,
            "setup": ["module load cuda"],
            "sbatch": {"reservation": "r", "gres": "gpu:8", "exclusive": "user"},
        }
    }
    text = lifeline.script(batch, spec, 1800)
    for line in (
        "#SBATCH --partition=p",
        "#SBATCH '--account=a b'",
        "#SBATCH --reservation=r",
        "#SBATCH --mem=1G",
        "module load cuda",
        "cd '/a/code of mine'",
        f"exec /env/bin/python -m launch.recovery.lifeline '{tmp_path}/my runs' 1800",
    ):
        assert line in text.splitlines()
    assert not any(word in text for word in ("gpu", "qos", "exclusive"))
    assert lifeline.wait_of({}) == 1800
    assert lifeline.wait_of({"cluster": {"lifeline": "0s"}}) == 0
