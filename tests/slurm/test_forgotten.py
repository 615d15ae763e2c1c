"""slurmctld dies right after a requeue, and forgets it: the run comes back all the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import PrivateSlurm
from tests.slurm.test_recovery import Submitted


@pytest.mark.slurm
@pytest.mark.slow
def test_a_requeue_that_slurmctld_forgot_is_asked_for_again(
    private_slurm: Callable[..., PrivateSlurm], tmp_path: Path
) -> None:
    slurm = private_slurm(nodes=2, kill_wait=30)
    run = Submitted(slurm, tmp_path, "run", "finish")
    slurm.wait(lambda: run.of("start"), 30)
    time.sleep(6)
    slurm.sbatch("#!/bin/sh\n", "--hold")  # makes it save, and no more within the next 5 s
    time.sleep(1)
    slurm.run(["scontrol", "requeue", run.id])  # not by the run: as where SLURM preempts it
    slurm.wait(lambda: run.of("verdict"), 30, every=0.01)
    slurm.kill_controller()
    slurm.start_controller()
    slurm.wait(lambda: "UP" in slurm.run(["scontrol", "ping"], check=False).stdout, 30)
    slurm.wait(lambda: run.state()[0] == "done", 90, nudge=True, every=0.5)
    assert run.of("verdict")[0]["again"]
    assert slurm.job(run.id).restarts >= 1
