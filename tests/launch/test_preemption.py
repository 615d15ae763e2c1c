"""What time there is after a warning, for what is told at the end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from launch import preemption
from launch.preemption import Preemption


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
