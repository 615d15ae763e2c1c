"""Of two executions of a run the one that started last may write, whatever their names."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest

from launch import job
from launch.metrics import JsonlTracker
from launch.record import RunFolder
from launch.recovery.causes import kind
from launch.recovery.lease import FencedError, Lease
from launch.stage import Journal
from moe.storage import Checkpoint
from tests.launch import tracked
from tests.launch.tracked import descendants, is_online, log, start, state, steps, wait
from tests.wandb_server import WandbServer

server, folder = tracked.server, tracked.folder


@pytest.mark.parametrize(("second", "namesake"), [("7_0-1", False), ("7_0-0", True)])
def test_who_came_before_may_neither_save_nor_log(tmp_path: Path, second: str, namesake: bool) -> None:
    folder = RunFolder(tmp_path)
    before = Lease(folder, "7_0-0")
    journal = Journal(folder, "7_0-0", before, lambda seconds: None)
    before.guard()
    journal.log(1, {})
    now = Lease(folder, second)
    now.guard()
    saved = Checkpoint(tmp_path, 2)
    for act in (
        before.guard,
        lambda: journal.log(2, {}),
        lambda: journal.publish(saved),
        lambda: journal.table("answers", [], []),
        lambda: journal.summary({}),
    ):
        with pytest.raises(FencedError, match=f"attempt {second} has taken .* over; 7_0-0 stops") as caught:
            act()
        assert kind(caught.value) == "fenced"
        assert caught.value.namesake is namesake
    assert folder.last("saved") is None

    # Of a namesake's end nothing is left among the other's files: it would be taken for its own.
    place = job.Place(0, 0, 1, "n1", "7_0-0")
    job.StageJob._fail(folder, place, caught.value)
    assert any(folder.logs("7_0-0").glob("failure_*")) is not namesake


def test_without_a_lease_nobody_may_write(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lease = Lease(folder, "7_0-0")
    folder.lease_file.unlink()
    with pytest.raises(FencedError):
        lease.guard()


@pytest.mark.slow
@pytest.mark.parametrize("after", ["running", "finished"])
def test_who_wakes_up_after_another_took_over_leaves_its_page_alone(
    server: WandbServer, folder: Path, after: str
) -> None:
    """The first attempt's processes stand still, as on a node that is cut off, while the second trains."""
    before = Lease(RunFolder(folder), "7_0-0")
    first = start(folder, lease=before.token)
    log(first, 1, 5)
    wait(lambda: is_online(folder) and server.runs["demo-align"].steps[-1:] == [5])
    asleep = descendants(state(folder)["pid"])
    for pid in asleep:
        os.kill(pid, signal.SIGSTOP)
    now = Lease(RunFolder(folder), "7_0-1")
    second = start(folder, attempt=2, start_step=3, lease=now.token)
    log(second, 4, 9)
    if after == "finished":
        second.finish("finished")
    else:
        wait(lambda: server.runs["demo-align"].steps[-1:] == [9])
    assert server.runs["demo-align"].state == after
    for pid in asleep:
        os.kill(pid, signal.SIGCONT)
    first.finish("failed")
    assert server.runs["demo-align"].state == after
    assert state(folder)["outcome"] == "fenced"
    if after == "running":
        log(second, 10, 12)
        second.finish("finished")
        assert server.runs["demo-align"].steps == steps(folder / "metrics.jsonl") == list(range(1, 13))
    assert server.runs["demo-align"].state == "finished"


def test_who_failed_when_another_had_taken_over_is_fenced(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    before = Lease(folder, "7_0-0")
    assert before.ending() == "failed"
    Lease(folder, "7_0-1")
    assert before.ending() == "fenced"


def test_rows_that_wait_for_room_go_to_no_other_attempt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path, start_step=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        log(tracker, 1, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "wait in memory" in capsys.readouterr().err
    tracker.finish("fenced")
    assert steps(path) == []
