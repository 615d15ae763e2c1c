"""What SLURM 22.05 does to a job of two nodes and two ranks each: facts the launcher is built on, as tests.

The batch script traps TERM, runs `srun` in the foreground, then a verdict command, which asks `scontrol
show job A_a`. KillWait is 5 s here; SLURM's default is 30. In the table "+1" and "=" compare Restarts
with the attempt's SLURM_RESTART_COUNT.

| cause                    | ranks get       | batch gets | asked           | then                           |
|--------------------------|-----------------|------------|-----------------|--------------------------------|
| preempted, GraceTime 0   | TERM (twice)    | TERM       | COMPLETING, +1  | SLURM requeues, once,          |
|                          |                 |            |                 | whatever the exit code         |
| ... ranks not done       | KILL (KillWait) | KILL too   | no verdict      | SLURM requeues, once           |
| preempted, grace, signal | USR2 only       | nothing    | RUNNING, =,     | our requeue while RUNNING is   |
|                          |                 |            | PreemptTime set | the only one                   |
| ... and it just exits    | USR2 only       | nothing    | the same        | COMPLETED: nobody requeues it  |
| ... --signal=B:USR1      | nothing         | USR1 only  | the same        | the script must tell the ranks |
| scancel                  | TERM            | TERM       | COMPLETING, =   | CANCELLED; but our requeue     |
|                          |                 |            |                 | would bring it back to life    |
| walltime near, --signal  | USR2, early by  | nothing    | RUNNING, =,     | as it exits, or our requeue    |
|                          | up to 30 s      |            | no PreemptTime  |                                |
| walltime over            | TERM (twice)    | TERM       | COMPLETING, =,  | TIMEOUT; our requeue within    |
|                          |                 |            | TimeLimit       | KillWait still saves it        |
| another node fails       | TERM, on others | TERM       | COMPLETING, +1  | SLURM requeues, once           |
| the batch host fails     | TERM, on others | (gone)     | no verdict      | SLURM requeues, once           |
| scontrol requeue A_a     | TERM, if there  | TERM       | COMPLETING, +1  | a second one: "Job is pending  |
|                          |                 |            |                 | execution", rc 1, no harm      |

Every TERM comes with a CONT. srun's exit code stays the ranks' own, 0 when they left with 0 after TERM.
What the batch script started gets the signals too, a verdict's `scontrol` and `python` included: start
them with TERM ignored. Dependents (afterok:A_a, aftercorr) of an element that is requeued wait, even
when the preempted attempt ended with 1. The last element's SLURM_JOB_ID is the array's: only A_a names
one element.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.slurm.cluster import PrivateSlurm
from tests.slurm.probe import Probe, preempt

pytestmark = pytest.mark.slurm

REQUEUE = "[ $first ] && { scontrol requeue $me; note requeue=$?; sleep 1; }"
TWICE = "[ $first ] && { trap '' TERM; scontrol requeue $me; scontrol requeue $me 2> said; note requeue=$?; }"


def test_preemption_without_grace_leaves_the_batch_script_killwait_for_its_verdict(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    quick = Probe(slurm, tmp_path / "quick").submit()
    # Killed in the same moment as its ranks, unless it is very quick about its verdict, which Python is not.
    slow = Probe(slurm, tmp_path / "slow").submit(nodes="n3,n4", save=60, think=2)
    preempt(slurm, "n1,n2,n3,n4")
    assert quick.finish().restarts == 1
    assert slow.finish().restarts == 1
    told = min(quick.when("rank", "SIGTERM"))
    assert len(quick.when("rank", "SIGTERM")) in range(4, 9)  # twice each, of which Python may see one
    assert max(quick.when("rank", "SIGTERM")) - told < 1
    assert len(quick.when("rank", "saved")) == 4
    assert quick.when("batch", "SIGTERM")  # seen when srun is over: bash runs no trap before
    assert quick.when("batch", "srun=0")
    verdict = quick.verdict()
    assert verdict is not None
    assert (verdict.state, verdict.restarts, verdict.reason) == ("COMPLETING", 1, "None")
    assert quick.when("batch", "end")[0] - told < 4
    assert quick.attempts == [0, 1]
    # Ranks that need longer than KillWait take the batch script with them, and SLURM requeues all the same.
    assert slow.verdict() is None
    assert not slow.when("rank", "saved")
    assert slow.attempts == [0, 1]
    assert quick.log().count("DUE TO PREEMPTION") == 2  # the job and its step
    assert (verdict.id, verdict.raw) == (quick.id, quick.id.removesuffix("_0"))


def test_a_signal_within_the_grace_lets_the_job_requeue_itself_and_slurm_adds_nothing(
    slurm_user_signal: PrivateSlurm, tmp_path: Path
) -> None:
    options = ["--partition=grace", "--signal=USR2@60"]
    requeued = Probe(slurm_user_signal, tmp_path / "requeued").submit(*options, after=REQUEUE)
    ended = Probe(slurm_user_signal, tmp_path / "ended").submit(*options, nodes="n3,n4")
    urgent = preempt(slurm_user_signal, "n1,n2,n3,n4")
    assert requeued.finish().restarts == 1
    assert requeued.attempts == [0, 1]
    assert slurm_user_signal.job(urgent).state == "COMPLETED"
    assert len(requeued.when("rank", "SIGUSR2")) == 4
    assert not requeued.when("rank", "SIGTERM")
    assert len(requeued.when("rank", "saved")) == 4
    verdict = requeued.verdict()
    assert verdict is not None
    assert (verdict.state, verdict.restarts) == ("RUNNING", 0)
    assert verdict.fields["PreemptTime"] != "None"
    assert requeued.when("batch", "srun=0")[0] < requeued.when("batch", "SIGTERM")[0]  # our own requeue's
    # A job that ends within its grace has ended.
    assert (ended.job.state, ended.job.restarts, ended.attempts) == ("COMPLETED", 0, [0])


def test_a_user_signal_for_the_batch_script_does_not_reach_the_ranks(
    slurm_user_signal: PrivateSlurm, tmp_path: Path
) -> None:
    probe = Probe(slurm_user_signal, tmp_path / "job").submit(
        "--partition=grace", "--signal=B:USR1@60", seconds=4
    )
    preempt(slurm_user_signal, "n1,n2")
    probe.finish()
    assert len(probe.when("batch", "SIGUSR1")) == 1
    assert not probe.when("rank", "SIGUSR1")
    assert len(probe.when("rank", "finished")) == 4


def test_a_requeue_of_a_job_that_slurm_requeues_already_is_refused_and_does_no_harm(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    probe = Probe(slurm, tmp_path / "job").submit(seconds=0, after=TWICE)
    assert probe.finish().restarts == 1
    assert probe.when("batch", "requeue=1")
    assert "Job is pending execution" in (probe.folder / "said").read_text()
    assert probe.attempts == [0, 1]


def test_a_cancelled_job_gets_its_verdict_and_stays_cancelled_unless_it_requeues_itself(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    meek = Probe(slurm, tmp_path / "meek").submit()
    stubborn = Probe(slurm, tmp_path / "stubborn").submit(nodes="n3,n4", after=REQUEUE)
    slurm.run(["scancel", meek.id, stubborn.id])
    assert slurm.wait_state(meek.id, "CANCELLED").restarts == 0
    verdict = meek.verdict()
    assert verdict is not None
    assert (verdict.state, verdict.restarts, verdict.reason) == ("COMPLETING", 0, "None")
    assert (verdict.fields["PreemptTime"], meek.attempts) == ("None", [0])
    assert len(meek.when("rank", "saved")) == 4
    assert stubborn.finish().restarts == 1  # resurrected: what a launcher must not do
    assert stubborn.attempts == [0, 1]
    assert meek.job.state == "CANCELLED"


def test_what_the_batch_script_started_gets_the_signals_too(slurm: PrivateSlurm, tmp_path: Path) -> None:
    job = slurm.sbatch(
        f"#!/bin/bash\ntrap : TERM\ntouch {tmp_path}/up\nsleep 99\necho $? > {tmp_path}/code\n"
    )
    slurm.wait((tmp_path / "up").exists)
    slurm.run(["scancel", job])
    slurm.wait_state(job, "CANCELLED")
    assert (tmp_path / "code").read_text() == "143\n"


@pytest.mark.slow
def test_the_walltime_warning_comes_early_and_the_limit_ends_the_job_after_a_verdict(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    warned = Probe(slurm, tmp_path / "warned").submit("--time=1", "--signal=USR2@20")
    struck = Probe(slurm, tmp_path / "struck").submit("--time=1", nodes="n3,n4", seconds=300, after=REQUEUE)
    assert slurm.wait_state(warned.id, "COMPLETED", timeout=90).restarts == 0
    assert len(warned.when("rank", "SIGUSR2")) == 4
    assert not warned.when("batch", "SIGTERM")
    lasted = min(warned.when("rank", "SIGUSR2")) - warned.when("batch", "start")[0]
    assert 5 < lasted < 45  # asked for at 40 s; SLURM looks every 30 s, and rather early than late
    verdict = warned.verdict()
    assert verdict is not None
    assert (verdict.state, verdict.restarts, verdict.fields["PreemptTime"]) == ("RUNNING", 0, "None")
    slurm.wait(lambda: struck.verdict(), 120)
    assert len(struck.when("rank", "saved")) == 4
    verdict = struck.verdict()
    assert verdict is not None
    assert (verdict.state, verdict.restarts, verdict.reason) == ("COMPLETING", 0, "TimeLimit")
    assert struck.finish().restarts == 1  # else it would be TIMEOUT; the new attempt has its minute again
    assert struck.attempts == [0, 1]


def test_a_node_that_fails_has_slurm_requeue_the_job_once_and_others_are_told(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    probe = Probe(slurm, tmp_path / "job").submit()
    slurm.node_fails("n2")
    assert probe.finish().restarts == 1
    assert probe.attempts == [0, 1]
    told = {e.who for e in probe.events() if (e.attempt, e.what) == (0, "SIGTERM")}
    assert len(told - {"batch"}) == 2  # the two of the node that stayed
    verdict = probe.verdict()
    assert verdict is not None
    assert (verdict.state, verdict.restarts) == ("COMPLETING", 1)
    assert "Node failure on n2" in probe.log()


def test_a_batch_host_that_fails_leaves_no_verdict_and_slurm_requeues_the_job_once(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    probe = Probe(slurm, tmp_path / "job").submit()
    slurm.node_fails("n1")
    assert probe.finish().restarts == 1
    assert probe.attempts == [0, 1]
    assert probe.verdict() is None
    assert len(probe.when("rank", "saved")) == 2


def test_dependents_of_a_requeued_element_wait_whatever_its_exit_code_and_run_after_its_success(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    # The preempted attempt ends with 1, and the element that no one disturbs is over long before.
    script = (
        f"#!/bin/bash\ncd {tmp_path}\ntrap 'exit 1' TERM\n"
        "[ $SLURM_ARRAY_TASK_ID = 1 ] || [ ${SLURM_RESTART_COUNT:-0} = 1 ] || { sleep 60 & wait; }\n"
        "echo $SLURM_ARRAY_TASK_ID.${SLURM_RESTART_COUNT:-0} >> done\n"
    )
    dependent = f"#!/bin/bash\ncp {tmp_path}/done {tmp_path}/$SLURM_JOB_NAME.$SLURM_ARRAY_TASK_ID\n"
    first = slurm.sbatch(script, "--array=0,1", "--exclusive", "--nodelist=n1", "-o/dev/null")
    slurm.wait_state(f"{first}_0", "RUNNING")
    second = slurm.sbatch(dependent, "--array=0,1", f"--dependency=aftercorr:{first}", "-Jcorr")
    third = slurm.sbatch(dependent, f"--dependency=afterok:{first}_0", "-Jok")
    preempt(slurm, "n1")
    slurm.wait(lambda: slurm.job(f"{first}_0").restarts == 1)
    slurm.wait_state(f"{second}_1", "COMPLETED")
    assert (slurm.job(f"{second}_0").reason, slurm.job(third).reason) == ("Dependency", "Dependency")
    slurm.wait_state(f"{first}_0", "COMPLETED", nudge=True)
    slurm.wait_state(f"{second}_0", "COMPLETED")
    slurm.wait_state(third, "COMPLETED")
    assert slurm.job(f"{first}_0").restarts == 1
    assert (tmp_path / "corr.1").read_text() == "1.0\n"
    assert (tmp_path / "corr.0").read_text() == (tmp_path / "ok.").read_text() == "1.0\n0.1\n"


def test_the_last_element_has_the_arrays_own_number_so_only_a_a_names_one_element(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    script = f"#!/bin/bash\necho $SLURM_JOB_ID $SLURM_ARRAY_JOB_ID > {tmp_path}/$SLURM_ARRAY_TASK_ID\n"
    array = slurm.sbatch(script, "--array=0-2", "-o/dev/null")
    for i in range(3):
        slurm.wait_state(f"{array}_{i}", "COMPLETED")
    ids = [(tmp_path / str(i)).read_text().split() for i in range(3)]
    assert {own for _, own in ids} == {array}
    assert [raw for raw, _ in ids] == [str(int(array) + 1), str(int(array) + 2), array]
    assert [slurm.job(f"{array}_{i}").raw for i in range(3)] == [raw for raw, _ in ids]
    assert len(slurm.run(["scontrol", "-o", "show", "job", array]).stdout.splitlines()) == 3
    assert len(slurm.run(["scontrol", "-o", "show", "job", f"{array}_2"]).stdout.splitlines()) == 1
    assert "SLURM_JOB_ID" not in os.environ
