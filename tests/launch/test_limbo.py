"""When a job that SLURM holds for lost launches is let go, and by whom."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.batches import Batches
from launch.cluster import Job
from launch.files import write_json
from launch.operating.status import judge
from launch.operating.survey import Facts
from launch.record import RunFolder
from launch.recovery import limbo


def noted(folder: RunFolder, *events: str, at: float = 0.0) -> None:
    for event in events:
        folder.note(event, time=at, step=1)


def test_a_held_job_is_let_go_at_once_then_ever_later_and_not_for_ever(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    noted(folder, "submitting")
    assert limbo.due(folder, 1.0)
    now = 100.0
    for wait in limbo.WAITS[1:]:
        noted(folder, "freed", at=now)
        assert not limbo.due(folder, now + wait - 1)
        assert limbo.due(folder, now + wait)
        now += wait
    noted(folder, "freed", at=now)
    assert not limbo.due(folder, now + 1e6)
    noted(folder, "saved", at=now)  # it gets on
    assert limbo.due(folder, now + 1)


@pytest.mark.parametrize("end", ["cancelled", "finished"])
def test_what_is_over_stays_where_it_is(tmp_path: Path, end: str) -> None:
    folder = RunFolder(tmp_path)
    noted(folder, "submitting", "cancelled" if end == "cancelled" else "saved")
    if end == "finished":
        folder.handoff_file.write_text("{}")
    assert not limbo.due(folder, 1e9)


def test_of_all_who_share_the_runs_one_looks_in_a_minute(tmp_path: Path) -> None:
    assert [limbo.turn(tmp_path, now) for now in (1e9, 1e9 + 1, 1e9 + 59, 1e9 + 61, 1e9 + 62)] == [
        *(True, False, False),
        *(True, False),
    ]
    assert not limbo.turn(tmp_path / "nowhere", 1e9)


def test_only_lost_launches_are_meant() -> None:
    ours = ("launch failed requeued held", "launch_failed_requeued_held", "JobHoldMaxRequeue")
    others = ("JobHeldUser", "JobHeldAdmin", "job requeued in held state", "BeginTime", "None")
    assert all(limbo.LOST.search(reason) for reason in ours)
    assert not any(limbo.LOST.search(reason) for reason in others)


def test_a_job_counts_its_lost_launches_itself() -> None:
    assert [limbo.lost({"BatchFlag": flag}) for flag in ("0", "1", "5", "(null)")] == [0, 0, 4, 0]
    assert not limbo.worn({"BatchFlag": "1"})  # and SLURM is not even asked


def test_what_was_let_go_is_in_the_queue_though_slurm_keeps_its_state(tmp_path: Path) -> None:
    folder, batch = RunFolder(tmp_path / "r"), tmp_path / "batches" / "b"
    folder.note("submitting", batch=str(batch), index=3)
    write_json(batch / "batch.json", {"state": "submitted", "token": "b", "job": "7"})

    def state(reason: str) -> str:
        queue = {"7_3": Job("7_3", "REQUEUE_HOLD", reason, "", "b")}
        return judge(Facts.read(str(folder.path)), queue, Batches()).name

    assert [state(reason) for reason in ("JobHoldMaxRequeue", "BeginTime")] == ["held", "queued"]


def test_the_run_of_a_held_job_is_found_by_its_token(tmp_path: Path) -> None:
    write_json(tmp_path / "batches" / "b" / "plan.json", {"runs": {"3": str(tmp_path / "r")}})
    job = Job("7_3", "PENDING", "launch failed requeued held", "", "b")
    assert limbo.run_of(tmp_path, job) == RunFolder(tmp_path / "r")
    assert limbo.run_of(tmp_path, Job("7_4", job.state, job.reason, "", "b")) is None
    assert limbo.run_of(tmp_path / "others", job) is None
