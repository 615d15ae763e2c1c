"""Of two executions of a run the one that started last may write, whatever their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import job
from launch.record import RunFolder
from launch.recovery.causes import kind
from launch.recovery.lease import FencedError, Lease
from launch.stage import Journal


@pytest.mark.parametrize(("second", "namesake"), [("7_0-1", False), ("7_0-0", True)])
def test_who_came_before_may_neither_save_nor_log(tmp_path: Path, second: str, namesake: bool) -> None:
    folder = RunFolder(tmp_path)
    before = Lease(folder, "7_0-0")
    journal = Journal(folder, "7_0-0", before, lambda seconds: None)
    before.guard()
    journal.log(1, {})
    now = Lease(folder, second)
    now.guard()
    for act in (before.guard, lambda: journal.log(2, {})):
        with pytest.raises(FencedError, match=f"attempt {second} has taken .* over; 7_0-0 stops") as caught:
            act()
        assert kind(caught.value) == "fenced"
        assert caught.value.namesake is namesake

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
