"""What time there is after a warning, for what is told at the end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.spec import DataSpec
from launch import preemption
from launch.files import write_json
from launch.identity import plain
from launch.job import Place
from launch.preemption import Preemption
from launch.record import RunFolder
from launch.recovery.pulse import Pulse
from launch.spec import ExperimentSpec


@pytest.fixture
def warned() -> Iterator[Preemption]:
    before = {number: signal.getsignal(number) for number in Preemption.WARNINGS}
    yield Preemption()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_without_a_warning_there_is_no_end_of_time(warned: Preemption) -> None:
    assert warned.left(600) is None
    assert not warned()


@pytest.mark.parametrize(
    ("number", "grace", "since", "left"),
    [
        (signal.SIGUSR2, 600, 60, preemption.LONGEST),  # the warning before the walltime, a quick save
        (signal.SIGUSR2, 120, 100, 10.0),
        (signal.SIGUSR2, 120, 115, preemption.SHORTEST),  # the save took nearly all of it
        (signal.SIGTERM, 600, 5, 15.0),  # preempted: KillWait counts, whatever the preset's grace is
        (signal.SIGTERM, 600, 40, preemption.SHORTEST),
    ],
)
def test_what_is_left_follows_from_the_first_warning(
    warned: Preemption, number: int, grace: float, since: float, left: float
) -> None:
    os.kill(os.getpid(), number)
    first = warned.at
    assert abs(time.monotonic() - first) < 5
    warned.at -= since
    os.kill(os.getpid(), signal.SIGTERM if number == signal.SIGTERM else signal.SIGUSR2)
    assert warned.at == first - since  # a second one does not give more time
    found = warned.left(grace)
    assert found is not None
    assert found == pytest.approx(left, abs=1.0)


def test_warnings_that_come_at_once_are_one_warning(warned: Preemption) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, Preemption.WARNINGS)
    for number in (*Preemption.WARNINGS, *Preemption.WARNINGS):
        # One to the process may be given to a thread of some library.
        signal.pthread_kill(threading.get_ident(), number)
    assert not warned()
    begun = time.monotonic()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, Preemption.WARNINGS)  # both handlers, one within the other
    assert warned()
    assert begun <= warned.at <= time.monotonic()
    assert warned.warned in ("SIGUSR2", "SIGTERM")


def test_a_job_that_slurm_restarts_after_it_has_finished_ends_at_once(tmp_path: Path) -> None:
    from launch.stage import run_stage

    folder = RunFolder(tmp_path)
    write_json(
        folder.spec_file, plain(ExperimentSpec("align", data=DataSpec(mix="llava-pt", template="plain")))
    )
    write_json(folder.handoff_file, {"step": 7})
    pulse = Pulse(folder.logs("7_0-1"), 0, "n1", every=60)
    assert run_stage(folder, Place(0, 0, 2, "n1", "7_0-1"), lambda: False, pulse) == "finished"
    (ended,) = folder.journal
    assert (ended["event"], ended["outcome"]) == ("ended", "finished")
    assert not folder.lease_file.exists()
