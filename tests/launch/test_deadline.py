"""When a run leaves before its walltime, by what its saves took; and who waits for a run's new job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch import cluster
from launch.files import read_json, write_json
from launch.operating.settings import Partition, Site
from launch.record import RunFolder
from launch.recovery.deadline import MARGIN, SLACK, Deadline, needed, save_seconds
from launch.recovery.margins import saves
from launch.recovery.successor import moved, place_of, submit, take_over
from tests.launch import chain

INF = float("inf")


@dataclass
class Clock:
    """A job of an hour, from 0 to 3600 s; `extended` is its end from the first question on."""

    now: float = 0.0
    end: float = 3600.0
    extended: float = 0.0
    asked: int = 0

    def ends(self) -> float:
        self.asked += 1
        return self.extended if self.extended and self.asked > 1 else self.end


class Warned:
    warned = ""

    def __call__(self) -> bool:
        return bool(self.warned)


def left(folder: RunFolder, clock: Clock, step: float = 1.0) -> float:
    """When the run leaves, in seconds from its begin."""
    deadline = Deadline(folder, Warned(), lambda: step, clock.ends, lambda: clock.now)
    while clock.now < 4 * 3600:
        if deadline():
            assert deadline.warned == "walltime"
            return clock.now
        clock.now += 1
    return INF


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "x" / "run")


def test_a_run_leaves_as_early_as_its_slowest_save_asks_for(folder: RunFolder) -> None:
    assert left(folder, Clock()) == INF  # nothing was measured yet: the warning alone
    for step, seconds in enumerate((100.0, 400.0, 90.0)):
        folder.note("saved", step=step, seconds=seconds)
    assert left(folder, Clock(), step=10) == pytest.approx(3600 - 400 * MARGIN - 20 - SLACK, abs=1)
    for step in range(20):
        folder.note("saved", step=10 + step, seconds=10.0)
    assert left(folder, Clock(), step=10) == pytest.approx(3600 - 10 * MARGIN - 20 - SLACK, abs=1)


def test_never_more_than_half_an_attempt_is_given_up(folder: RunFolder) -> None:
    folder.note("saved", step=1, seconds=5000.0)
    assert left(folder, Clock()) == pytest.approx(1800, abs=1)


def test_a_walltime_that_was_extended_is_noticed(folder: RunFolder) -> None:
    folder.note("saved", step=1, seconds=100.0)
    clock = Clock(extended=7200)
    assert left(folder, clock) == pytest.approx(7200 - 150 - 2 - SLACK, abs=1)
    assert clock.asked < 5


def test_saves_of_this_attempt_count_and_a_warning_comes_first(folder: RunFolder) -> None:
    clock, warned = Clock(now=3000), Warned()
    deadline = Deadline(folder, warned, lambda: 1.0, clock.ends, lambda: clock.now)
    assert not deadline()
    deadline.saved(500.0)
    clock.now += 300
    assert deadline()
    assert deadline.warned == "walltime"
    warned.warned = "SIGTERM"
    assert deadline.warned == "SIGTERM"


def test_where_nobody_knows_the_end_there_is_none(folder: RunFolder) -> None:
    folder.note("saved", step=1, seconds=100.0)
    assert left(folder, Clock(end=INF)) == INF
    assert needed([], 5.0) == 0.0
    assert save_seconds([{"event": "saved", "step": 1}, {"event": "start"}]) == []


@pytest.mark.parametrize(
    ("dependency", "waiting", "wanted"),
    [
        ("afterok:7_3(unfulfilled)", "9_0", "afterok:12_3"),
        ("afterok:7_2(unfulfilled)", "9_0", ""),
        ("afterok:17_3(unfulfilled)", "9_0", ""),
        ("aftercorr:7_*(unfulfilled)", "9_3", "afterok:12_3"),
        ("aftercorr:7_*(unfulfilled)", "9_2", ""),
        ("afterok:5_1(unfulfilled),afterok:7_3(unfulfilled)", "9_0", "afterok:5_1,afterok:12_3"),
        ("afterok:5_1:7_3(unfulfilled)", "9_0", "afterok:5_1:12_3"),
        ("afterany:7_3(unfulfilled)?afterok:8(unfulfilled)", "9_0", "afterany:12_3?afterok:8"),
        ("aftercorr:5_*(unfulfilled),afterok:7_3(unfulfilled)", "9_3", "aftercorr:5,afterok:12_3"),
        ("singleton(unfulfilled)", "9_0", ""),
        ("", "9_0", ""),
    ],
)
def test_what_waits_for_a_run_waits_for_its_new_job(dependency: str, waiting: str, wanted: str) -> None:
    assert moved(dependency, waiting, "7_3", "12_3") == wanted


@pytest.mark.parametrize(("grace", "level"), [(0, "warn"), (300, "ok")])
def test_doctor_says_whether_a_save_fits_into_what_a_preemption_leaves(
    folder: RunFolder, tmp_path: Path, grace: int, level: str
) -> None:
    write_json(folder.run_file, {"name": "x/run"})
    folder.note("saved", step=1, seconds=41.0)
    site = Site({"KillWait": "30 sec"}, ())
    partition = Partition("main", True, True, grace, "REQUEUE", 0, ())
    found = list(saves(site, partition, tmp_path / "runs"))
    assert [row[:3] for row in found] == [("slowest save", "41 s (x)", level)]
    assert ("30 s (KillWait)" in found[0][3]) is (level == "warn")
    assert not list(saves(site, partition, tmp_path / "none"))


def test_a_successor_is_submitted_once_whatever_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = chain.fake_slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", chain.path_with(slurm))
    batch = tmp_path / "runs" / "batches" / "x-0"
    write_json(batch / "plan.json", {"code": "/code/abc", "runs": {"2": "/r/2", "3": "/r/3"}})
    (batch / "script.sbatch").write_text("#SBATCH --comment=x-0\n#SBATCH --array=2-3\n")
    (slurm / "mode").write_text("refuse")
    with pytest.raises(cluster.SlurmError, match="invalid partition specified: main"):
        submit(batch, "7_3")
    place = place_of(batch, "7_3")
    assert (read_json(place / "batch.json") or {})["state"] == "refused"
    (slurm / "mode").unlink()
    assert [submit(batch, "7_3", "--begin=now+60") for _ in range(2)] == ["100_3", "100_3"]
    (sent,) = (json.loads(path.read_text()) for path in slurm.glob("sent_*"))
    assert sent["argv"][:4] == ["--parsable", "--array=3", "--comment=x-0.after-7_3", "--begin=now+60"]
    assert (read_json(place / "plan.json") or {})["runs"] == {"3": "/r/3"}
    # The successor's own successor is named after the first batch too, and taken over from once.
    assert place_of(place, "100_3").name == "x-0.after-100_3"
    folder = RunFolder(tmp_path / "runs" / "x")
    for _ in range(2):
        take_over(folder, place, "7_3")
    (taken,) = folder.journal
    assert (taken["event"], taken["index"], taken["code"], taken["after"]) == ("submitting", 3, "abc", "7_3")
