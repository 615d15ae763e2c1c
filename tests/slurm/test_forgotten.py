"""slurmctld dies right after it has taken a requeue, before it wrote it down: the run comes back all the same."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import PrivateSlurm

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = f"""\
#!/bin/bash
[ ${{SLURM_RESTART_COUNT:-0}} = 0 ] || exit 0
trap : TERM
here=$PWD; touch up; until [ -e go ]; do sleep 0.05; done; cd {ROOT}
(trap '' TERM; exec {sys.executable} -c "
from pathlib import Path
from launch.cluster import element_id
from launch.verdict import requeue, stay
Path('$here/said').write_text(requeue(element_id()) or 'nothing')
stay(element_id(), 0)")
exit 1
"""


@pytest.mark.slurm
@pytest.mark.slow
def test_a_requeue_that_slurmctld_forgot_is_asked_for_again(
    private_slurm: Callable[..., PrivateSlurm], tmp_path: Path
) -> None:
    slurm = private_slurm(nodes=1, kill_wait=30)
    job = slurm.sbatch(SCRIPT, "--array=0", "--requeue", "-n1", "--output=log", cwd=tmp_path) + "_0"
    slurm.wait(lambda: (tmp_path / "up").exists(), 30)
    time.sleep(6)
    slurm.sbatch("#!/bin/sh\n", "--hold")  # makes it save, and no more within the next 5 s
    time.sleep(1)
    (tmp_path / "go").touch()
    slurm.wait(lambda: (tmp_path / "said").exists(), 30, every=0.01)
    slurm.kill_controller()
    slurm.start_controller()
    slurm.wait(lambda: "UP" in slurm.run(["scontrol", "ping"], check=False).stdout, 30)
    slurm.wait(lambda: slurm.job(job).over, 90, nudge=True, every=0.2)
    assert (tmp_path / "said").read_text() == "nothing"
    found = slurm.job(job)
    assert (found.state, found.restarts) == ("COMPLETED", 1), slurm.describe()
