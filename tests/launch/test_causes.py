"""Exceptions and the causes they stand for; what attempts left and the verdicts on it; nodes that are avoided."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from launch.batches import Batches
from launch.cluster import Job
from launch.files import append_line, read_lines, write_json
from launch.operating.reasons import VERDICTS
from launch.operating.status import judge
from launch.operating.survey import Facts
from launch.record import RunFolder
from launch.recovery import avoid
from launch.recovery.causes import CAUSES, TOGETHER, kind
from launch.recovery.findings import Finding, comes_back, delay, held, of_attempt
from launch.recovery.pulse import Pulse
from launch.verdict import judged, progress, speak
from moe.storage import CheckpointError


class DataError(Exception):
    pass


class Fenced(RuntimeError):
    verdict = "fenced"


class OutOfMemoryError(RuntimeError):
    """As torch.cuda's is named."""


class DistBackendError(RuntimeError):
    """As torch.distributed's."""


SAID = [
    (ValueError("shapes differ"), "error"),
    (AssertionError("out of memory"), "error"),  # its own words, and no allocator's
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "error"),
    (RuntimeError("CUDA error: device-side assert triggered"), "error"),
    (FileNotFoundError(2, "No such file or directory"), "error"),
    (DataError("no such column"), "bad spec"),
    (Fenced("attempt 3 holds the lease"), "fenced"),
    (MemoryError(), "out of memory"),
    (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12 bytes"), "out of memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "out of memory"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
    (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "infrastructure"),
    (DistBackendError("NCCL error in ProcessGroupNCCL: ncclSystemError: System call failed"), "infrastructure"),
    (RuntimeError("No CUDA-capable device is detected"), "infrastructure"),
    (OSError(errno.ESTALE, "Stale file handle"), "infrastructure"),
    (OSError(errno.EIO, "Input/output error"), "infrastructure"),
    (OSError(errno.ENOSPC, "No space left on device"), "full disk"),
    (CheckpointError("step_00000030 was not saved: rank 0: state_00000.bin: File too large"), "full disk"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:546] Connection closed by peer [10.0.0.7]:3452"), "lost peer"),
    (DistBackendError("NCCL error: ncclRemoteError: remote process exited or there was a network error"), "lost peer"),
    (DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)"), "lost peer"),
    (ConnectionResetError(104, "Connection reset by peer"), "lost peer"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "cause"), SAID, ids=lambda value: repr(value)[:50])
def test_what_an_exception_stands_for(error: BaseException, cause: str) -> None:
    assert kind(error) == cause


def test_every_cause_has_its_sentences() -> None:
    assert set(CAUSES) - {"fenced"} <= set(VERDICTS)


def fails(folder: RunFolder, rank: int, kind: str, message: str, at: float) -> None:
    facts = {"kind": kind, "message": message, "rank": rank, "node": f"n{rank}", "time": at}
    write_json(folder.logs("a") / f"failure_{rank}.json", facts)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "x" / "run")
    folder.note("start", attempt="a", world=4)
    for rank in range(4):
        Pulse(folder.logs("a"), rank, f"n{rank}", every=60)
    return folder


def test_a_rank_that_is_gone_is_named_by_those_that_lost_it(folder: RunFolder) -> None:
    for rank in (0, 1, 3):
        fails(folder, rank, "lost peer", "Connection closed by peer", 10.0 + rank)
    assert of_attempt(folder, "a", 137) == Finding(
        "infrastructure", "rank 2 on n2 was lost (srun ended with 137) and left no word", ("n2",)
    )


def test_where_all_were_killed_srun_knows_who_was_first(folder: RunFolder, tmp_path: Path) -> None:
    log, end = tmp_path / "log", "srun: error: n1: task 0: Killed\nsrun: Force Terminated StepId=1.0\n"
    log.write_text(f"attempt a\nsrun: error: n2: task 2: Segmentation fault\nsrun: Terminating\n{end}")
    assert of_attempt(folder, "a", 139, log) == Finding(
        "infrastructure",
        "rank 2 on n2 was lost: segmentation fault (srun ended with 139) and left no word",
        ("n2",),
        2,
    )
    log.write_text(f"attempt a\nsrun: error: n2: task 2: Exited with exit code 1\n{end}")
    assert of_attempt(folder, "a", 1, log).nodes == ()


def test_one_rank_that_knows_why_outweighs_those_that_lost_it_before(folder: RunFolder) -> None:
    fails(folder, 0, "lost peer", "Connection closed by peer", 10.0)
    fails(folder, 1, "error", "ValueError: shapes differ", 11.0)
    assert of_attempt(folder, "a", 1) == Finding("error", "ValueError: shapes differ", (), 1)


def test_ranks_that_all_lost_each_other_blame_no_node(folder: RunFolder) -> None:
    for rank in range(4):
        fails(folder, rank, "lost peer", "Socket Timeout", 10.0 + rank)
    assert of_attempt(folder, "a", 1) == Finding(
        "infrastructure", "the ranks lost each other: Socket Timeout"
    )


def test_what_slurm_writes_of_memory_counts_for_this_attempt_alone(folder: RunFolder, tmp_path: Path) -> None:
    log = tmp_path / "log"
    oom = "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.\n"
    for rank in (0, 1, 3):
        fails(folder, rank, "lost peer", "Connection closed by peer", 10.0 + rank)
    log.write_text(f"attempt z\n{oom}attempt a\nsrun: error\n")
    assert of_attempt(folder, "a", 137, log).verdict == "infrastructure"
    log.write_text(f"attempt z\nattempt a\n{oom}")
    found = of_attempt(folder, "a", 137, log)
    assert found.verdict == "out of memory"
    assert "rank 2 on n2 was lost; SLURM says its node's memory was used up" in found.reason


def test_what_the_watch_found_is_the_verdict_whatever_the_killed_ranks_say(folder: RunFolder) -> None:
    write_json(
        folder.logs("a") / "hang.json",
        {"kind": "hang", "message": "rank 3 was silent", "ranks": [3], "nodes": ["n3"]},
    )
    fails(folder, 0, "lost peer", "Connection closed by peer", 10.0)
    assert of_attempt(folder, "a", 137) == Finding("hang", "rank 3 was silent", ("n3",), 3)


def test_ranks_that_leave_well_because_one_failed_do_not_hide_it(folder: RunFolder) -> None:
    fails(folder, 1, "error", "ValueError: shapes differ", time.time() - 1)
    folder.note("ended", attempt="a", outcome="preempted", reason="SIGTERM")
    assert of_attempt(folder, "a", 1).verdict == "error"
    fails(folder, 1, "error", "BrokenPipeError: W&B", time.time() + 1)  # it was over then
    assert of_attempt(folder, "a", 1) == Finding("preempted", "SIGTERM")


def test_a_job_preempted_before_it_could_speak_is_told_as_that() -> None:
    facts, batches = Facts(batch="b", element=3), Batches({"b": {"state": "submitted", "job": "7"}})
    state = judge(facts, {"7_3": Job("7_3", "PREEMPTED", "None", "", "")}, batches)
    assert state.name == "stopped"
    assert (
        "SLURM preempted it before it could speak, and does not requeue it; runs.py resubmit" in state.reason
    )


ENDS, AGAIN = {"JobState": "COMPLETING"}, {"JobState": "COMPLETING", "Restarts": "1"}
BROKEN = {**ENDS, "Reason": "NodeDown"}  # of a job that SLURM does not requeue
OFF = {**ENDS, "PreemptTime": "1700000000"}
RUNNING = {"JobState": "RUNNING", "Restarts": "0", "Reason": "None", "PreemptTime": "None"}
LOST = Finding("infrastructure", "srun ended with 143")
SAVED = Finding("preempted", "SIGUSR2")


@pytest.mark.parametrize(
    ("found", "facts", "asked", "lost", "verdict"),
    [
        (LOST, {}, False, (), LOST),
        (LOST, ENDS, False, (), Finding("cancelled", "scancel")),
        (LOST, OFF, False, (), Finding("preempted", "before a save")),
        (LOST, {**ENDS, "Reason": "TimeLimit"}, False, (), Finding("timeout", "before a save")),
        (LOST, AGAIN, False, (), Finding("preempted", "requeued by SLURM before a save")),
        (LOST, AGAIN, False, ("n2",), Finding("infrastructure", "SLURM lost n2", ("n2",))),
        (LOST, BROKEN, False, ("n2",), Finding("infrastructure", "SLURM lost n2", ("n2",))),
        (LOST, BROKEN, False, (), Finding("infrastructure", "SLURM lost one of its nodes")),
        (LOST, {}, True, (), Finding("preempted", "requeued on request, before its ranks could save")),
        (SAVED, {}, False, (), Finding("timeout", "SIGUSR2")),
        (SAVED, {"PreemptTime": "1700000000"}, False, (), SAVED),
        (SAVED, {}, True, (), SAVED),
        (Finding("finished"), {"JobState": "COMPLETING"}, False, (), Finding("finished")),
    ],
)  # fmt: skip
def test_the_verdict_in_the_light_of_what_slurm_says(
    found: Finding, facts: dict[str, str], asked: bool, lost: tuple[str, ...], verdict: Finding
) -> None:
    assert judged(found, {**RUNNING, **facts}, 0, asked=asked, lost=lost) == verdict


def test_walltimes_that_save_nothing_new_are_no_progress(folder: RunFolder) -> None:
    for step in (10, 20):
        folder.note("saved", attempt="a", step=step)
        assert comes_back(folder, "timeout")
        speak(folder, "a", Finding("timeout"), again=True)
    speak(folder, "a", Finding("timeout"), again=True)
    folder.note(
        "saved", attempt="a", step=20
    )  # the same step once more, after a torn checkpoint, is no progress
    found = progress(folder, Finding("timeout"))
    assert found.verdict == "no progress"
    assert found.reason.startswith("3 attempts ended so without a new step saved: the walltime is too short")
    folder.note("saved", attempt="a", step=30)
    assert progress(folder, Finding("timeout")) == Finding("timeout")


def test_causes_that_take_turns_do_not_go_on_for_ever(folder: RunFolder) -> None:
    made = 0
    while comes_back(folder, turn := ("infrastructure", "hang", "error", "out of memory")[made % 4]):
        speak(folder, str(made), Finding(turn), again=True)
        speak(folder, str(made), Finding("preempted"), again=True)  # costs nothing
        made += 1
        if turn in ("error", "out of memory") and made > 4:
            break
    assert made <= TOGETHER
    for n in range(TOGETHER):
        speak(folder, str(n), Finding("infrastructure" if n % 2 else "hang"), again=True)
    assert not comes_back(folder, "hang")


def test_faults_of_nodes_are_waited_out_longer_each_time(folder: RunFolder) -> None:
    waits = []
    while comes_back(folder, "infrastructure"):
        waits.append(delay(folder, "infrastructure"))
        speak(folder, "a", Finding("infrastructure"), again=True)
    assert waits == [0, 60, 300, 900, 900]
    assert held(folder, "infrastructure") == "6 attempts ended so without a new step saved"


# ------------------------------------------------------------------------------------------ nodes


def strike(root: Path, node: str, ago: float, verdict: str = "infrastructure") -> None:
    append_line(
        root / avoid.LEDGER, {"time": time.time() - ago, "node": node, "verdict": verdict, "run": "x"}
    )


def test_a_fault_is_held_against_a_node_for_two_hours_and_a_second_for_a_day(tmp_path: Path) -> None:
    strike(tmp_path, "n1", 3600)
    strike(tmp_path, "n2", 3 * 3600)
    strike(tmp_path, "n3", 23 * 3600)
    strike(tmp_path, "n3", 12 * 3600)
    strike(tmp_path, "n4", 25 * 3600)
    strike(tmp_path, "n5", 60, "hang")
    strike(tmp_path, "n6", 600, "hang")
    strike(tmp_path, "n6", 60, "hang")
    found = avoid.strikes(tmp_path, now := time.time())
    assert {node for node, one in found.items() if one.until > now} == {"n1", "n3", "n6"}
    assert (
        avoid.words(tmp_path)[1] == "avoiding n3 for another 12h00m: infrastructure in x, 2 faults in a day"
    )
    assert found["n3"].until == pytest.approx(now + 12 * 3600, abs=5)


@pytest.mark.parametrize(
    ("total", "needed", "avoided"),
    [(100, 8, ("n3", "n1", "n2")), (20, 8, ("n3", "n1")), (8, 4, ("n3",)), (8, 8, ()), (0, 1, ())],
)
def test_no_more_than_a_tenth_is_avoided_nor_what_the_run_needs(
    tmp_path: Path, total: int, needed: int, avoided: tuple[str, ...]
) -> None:
    strike(tmp_path, "n2", 200)
    strike(tmp_path, "n1", 100)
    strike(tmp_path, "n3", 400)
    strike(tmp_path, "n3", 300)
    assert avoid.chosen(avoid.strikes(tmp_path, now := time.time()), now, total, needed) == avoided


def test_what_slurm_is_told_keeps_the_specs_own_exclusions(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "x")
    write_json(folder.spec_file, {"cluster": {"exclude": "bad[1-2]"}})
    facts = {"Partition": "main", "NumNodes": "2-2", "ExcNodeList": "bad[1-2]"}
    nodes = avoid.Nodes.of(tmp_path, folder, facts)
    assert (nodes.needed, nodes.settings(())) == (2, ())
    assert nodes.settings(("n3",)) == ("ExcNodeList=bad[1-2],n3",)
    later = avoid.Nodes.of(tmp_path, folder, {**facts, "ExcNodeList": "bad[1-2],n3"})
    assert later.settings(()) == ("ExcNodeList=bad[1-2]",)  # its time is over
    nodes.blame(Finding("infrastructure", "lost", ("n3",)), "7_0-1")
    nodes.blame(Finding("infrastructure", "a switch", ("n4", "n5", "n6")), "7_0-2")
    nodes.blame(Finding("error", "no", ("n7",)), "7_0-3")
    assert [record["node"] for record in read_lines(tmp_path / avoid.LEDGER)] == ["n3"]


@pytest.mark.parametrize(
    ("partition", "nodes", "avoided"),
    [
        ("long,short", 14, ["--exclude=n1"]),  # 15 nodes together
        ("long,short", 15, []),
        ("short", 4, ["--exclude=n1"]),
        ("", 10, []),  # the default one
    ],
)
def test_of_several_partitions_the_nodes_count_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition: str, nodes: int, avoided: list[str]
) -> None:
    strike(tmp_path, "n1", 60)
    (tmp_path / "scontrol").write_text(
        "#!/bin/sh\n"
        "echo PartitionName=long Default=YES TotalNodes=10\n"
        "echo PartitionName=short Default=NO TotalNodes=5\n"
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert avoid.options(tmp_path, "", partition, nodes) == avoided
