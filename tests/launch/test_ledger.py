"""Where the time went: scripted attempts whose every second is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.files import append_line, write_json
from launch.operating import ledger
from launch.operating.ledger import Row
from launch.operating.status import State
from launch.record import RunFolder

# Asked for at 1, SLURM starts it at 100, its ranks at 110, the first step at 140. Steps take 10 s, every fifth is
# saved, which holds up the step after it by 4 s. Killed at 250 after step 10; noticed at 300. Again at 400 from
# step 5, which was saved at 190: steps 6 to 10 are computed again. Warned at step 14, saves 6 s, ends at 560.
FIRST = {"attempt": "7_0-0"}
SECOND = {"attempt": "7_0-1"}
JOURNAL = [
    {"event": "submitting", "time": 1.0, "batch": "b", "index": 0},
    {"event": "launched", "time": 110.0, "job_started": 100.0, **FIRST},
    {"event": "start", "time": 140.0, "step": 0, "world": 8, "number": 0, **FIRST},
    {"event": "saved", "time": 190.0, "step": 5, **FIRST},
    {"event": "verdict", "time": 300.0, "verdict": "infrastructure", "reason": "", "again": True, **FIRST},
    {"event": "launched", "time": 400.0, **SECOND},
    {"event": "start", "time": 430.0, "step": 5, "last": 10, "last_time": 244.0, "number": 1, **SECOND},
    {"event": "saved", "time": 480.0, "step": 10, **SECOND},
    {"event": "saved", "time": 530.0, "step": 14, **SECOND},
    {"event": "ended", "time": 532.0, "outcome": "preempted", "reason": "SIGTERM", **SECOND},
    {"event": "verdict", "time": 540.0, "verdict": "preempted", "reason": "SIGTERM", "again": True, **SECOND},
]
ROWS = [Row(140.0 + 10 * n, n, 10.0) for n in range(1, 6)]
ROWS += [Row(430.0 + 10 * n, 5 + n, 10.0) for n in range(1, 6)]
ROWS += [Row(484.0 + 10 * n, 10 + n, 14.0 if n == 1 else 10.0) for n in range(1, 5)]


def test_every_second_is_in_one_part() -> None:
    found = ledger.settle(ledger.attempts(JOURNAL), ROWS, State("queued"), 8, now=600.0, asked=540.0)
    assert found.seconds == pytest.approx(
        {
            "queue": 99 + 100 + 60,  # to the first start, to the second, and since
            "start": 10,
            "load": 30 + 30,
            "train": 50 + 50 + 40,
            "replay": 244 - 190,
            "save": 4 + (530 - 524),
            "eval": 0,
            "lost": (300 - 244) + (540 - 530),
        }
    )
    assert found.allocated == 200 + 140
    assert found.gpu_hours == pytest.approx(8 * 340 / 3600)
    assert found.goodput == pytest.approx(140 / 340)


def test_a_run_that_is_running_is_counted_to_now() -> None:
    found = ledger.settle(ledger.attempts(JOURNAL[:4]), ROWS[:5], State("running"), 4, now=200.0)
    assert found.allocated == 100
    assert found.seconds["train"] == 50
    assert found.seconds["lost"] == 10  # since the last step; it becomes train when the step is done


def test_attempts_of_old_journals_without_a_launch_are_counted_from_their_start() -> None:
    journal = [record for record in JOURNAL if record["event"] != "launched"]
    found = ledger.settle(ledger.attempts(journal), ROWS, State("stopped"), 8, now=600.0)
    assert found.seconds["load"] == 0
    assert found.allocated == (300 - 140) + (540 - 430)


def test_an_attempt_that_never_came_to_a_step_is_load() -> None:
    journal = [JOURNAL[0], {**JOURNAL[1], "job_started": 0.0}, {**JOURNAL[4], "time": 150.0}]
    found = ledger.settle(ledger.attempts(journal), [], State("failed"), 8, now=600.0)
    assert (found.seconds["load"], found.allocated, found.goodput) == (40, 40, 0.0)


def test_the_run_folder_is_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for record in JOURNAL:
        append_line(folder.journal_file, record)
    rows = [json.dumps({"step": row.step, "time": row.time, "step_seconds": row.seconds}) for row in ROWS]
    folder.metrics_file.write_text("\n".join(rows) + "\n")
    write_json(folder.spec_file, {"gpus": 8, "cluster": {"device": "cuda"}})
    found = ledger.of(folder, State("stopped"))
    assert found.plain()["gpu_hours"] == round(8 * 340 / 3600, 4)
    assert found.plain()["seconds"]["replay"] == 54
    write_json(folder.spec_file, {"gpus": 8, "cluster": {"device": "cpu"}})
    assert ledger.of(folder, State("stopped")).gpu_hours == 0
    assert ledger.of(RunFolder(tmp_path / "none"), State("new")).goodput is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.4, "12s"), (250, "4m10s"), (11100, "3h05m"), (187200, "2d04h"), (3599.7, "1h00m")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert ledger.brief(seconds) == text
