"""The watch's judgement on what ranks wrote, and what it learns from a run's own steps."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch.record import RunFolder
from launch.recovery.findings import of_attempt
from launch.recovery.pulse import Beat, Pulse, beats
from launch.recovery.watch import Limits, Silence, Watch, note


def beat(rank: int, phase: str, step: int, count: int, alive: int, slowest: float = 0.1) -> Beat:
    return Beat(rank, f"n{rank // 2}", 7, phase, step, count, alive, slowest)


def until(watch: Watch, seconds: float, ranks: list[Beat], *, frozen: tuple[int, ...] = ()) -> Silence | None:
    """What the watch says of ranks that do nothing more; all but the frozen go on writing so."""
    every, at = watch.limits.every, 0.0
    while at < seconds:
        at += every
        ranks = [b if b.rank in frozen else Beat(*{**vars(b), "alive": b.alive + 1}.values()) for b in ranks]
        if silence := watch.look({b.rank: b for b in ranks}, every):
            return silence
    return None


def test_the_rank_that_others_wait_for_is_named() -> None:
    ranks = [beat(n, "agree", 8, 20, 5) for n in range(4)]
    ranks[2] = beat(2, "data", 8, 18, 5)
    watch = Watch(Limits(60, 600), 4)
    assert until(watch, 55, ranks) is None
    silence = until(watch, 20, ranks)
    assert silence is not None
    assert (silence.kind, silence.ranks, silence.nodes) == ("hang", (2,), ("n1",))
    assert "rank 2 on n1 was silent for 6" in silence.message
    assert ", in step 8 (waiting for its data); the other 3 wait for it (limit 60 s)" in silence.message


def test_of_ranks_at_one_place_the_one_that_stands_still_is_named() -> None:
    ranks = [beat(n, "step", 8, 20, 5) for n in range(4)]
    silence = until(Watch(Limits(60, 600), 4), 100, ranks, frozen=(3,))
    assert silence is not None
    assert silence.ranks == (3,)
    assert "its process stands still" in silence.message
    silence = until(Watch(Limits(60, 600), 4), 100, ranks)
    assert silence is not None
    assert silence.ranks == ()
    assert "all 4 ranks" in silence.message
    assert "none stands out" in silence.message


def test_what_is_too_long_is_learned_from_the_slowest_step() -> None:
    ranks = [beat(n, "step", 8, 20, 5, slowest=30.0 if n else 2.0) for n in range(2)]
    watch = Watch(Limits(60, 600), 2)
    assert until(watch, 290, ranks) is None
    assert until(watch, 30, ranks) is not None


@pytest.mark.parametrize("phase", ["load", "save", "evaluate", "end"])
def test_loading_saving_and_evaluating_are_no_hangs(phase: str) -> None:
    ranks = [beat(n, phase, 8, 20, 5) for n in range(2)]
    watch = Watch(Limits(60, 600), 2)
    assert until(watch, 580, ranks) is None
    assert until(watch, 60, ranks) is not None


def test_the_first_steps_may_be_slow() -> None:
    ranks = [beat(n, "step", 1, 2, 5, slowest=0.0) for n in range(2)]
    assert until(Watch(Limits(60, 600), 2), 580, ranks) is None


def test_ranks_that_never_start_are_the_clusters_fault() -> None:
    watch = Watch(Limits(60, 600), 4)
    silence = until(watch, 700, [beat(0, "load", 0, 0, 5)])
    assert silence is not None
    assert silence.kind == "infrastructure"
    assert "ranks 1, 2, 3 not started within 60" in silence.message
    silence = until(Watch(Limits(60, 600), 4), 700, [])
    assert silence is not None
    assert silence.message.startswith("no rank started within 60")


def test_a_full_disk_keeps_no_attempt_that_stands_still_from_being_ended(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "logs").touch()  # nothing can be written there
    note(folder, "7_0-0", Silence("hang", "rank 1 was silent"))
    (tmp_path / "logs").unlink()
    note(folder, "7_0-0", Silence("hang", "rank 1 was silent"))
    assert of_attempt(folder, "7_0-0", 137).reason == "rank 1 was silent"


def test_time_in_which_the_watch_stood_still_itself_does_not_count() -> None:
    watch = Watch(Limits(60, 600), 2)
    seen = {n: beat(n, "step", 8, 20, 5) for n in range(2)}
    assert watch.look(seen, 1.0) is None
    assert watch.look(seen, 5000.0) is None  # the job was suspended, or the file system was


def test_no_limit_is_no_watch() -> None:
    assert until(Watch(Limits(0, 0), 2), 10_000, [beat(n, "step", 8, 20, 5) for n in range(2)]) is None


def test_limits_come_from_the_runs_spec() -> None:
    assert Limits.of({"cluster": {"hang_after": "90s", "load_within": "2h"}}) == Limits(90.0, 7200.0)
    assert Limits.of({}) == Limits(300.0, 1800.0)
    assert Limits(300, 1800).every == 10.0


def test_a_pulse_is_read_as_it_was_written(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path / "a", 3, "n7", every=60)
    found = beats(tmp_path / "a")[3]
    assert (found.node, found.pid, found.phase, found.step) == ("n7", os.getpid(), "load", 0)
    for step in (1, 2):
        for phase in ("data", "step", "agree"):
            pulse(phase, step)
    pulse._write()
    newer = beats(tmp_path / "a")[3]
    assert (newer.phase, newer.step, newer.count, newer.alive) == ("agree", 2, 6, found.alive + 1)
    assert 0 < newer.slowest < 1
    (tmp_path / "a" / "beat_4").write_text(json.dumps([4, "n7"]))  # cut short
    assert set(beats(tmp_path / "a")) == {3}
    assert beats(tmp_path / "none") == {}
