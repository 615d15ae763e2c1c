"""Private SLURM clusters for tests: one a session for each common kind, cleared after each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.slurm.cluster import PrivateSlurm, missing


def _start(stack: ExitStack, **options: object) -> PrivateSlurm:
    if reason := missing():
        pytest.skip(reason)
    return stack.enter_context(PrivateSlurm(**options))


@pytest.fixture(scope="session")
def _plain() -> Iterator[PrivateSlurm]:
    with ExitStack() as stack:
        yield _start(stack)


@pytest.fixture(scope="session")
def _warned() -> Iterator[PrivateSlurm]:
    with ExitStack() as stack:
        yield _start(stack, user_signal=True)


@pytest.fixture(scope="session")
def _accounted() -> Iterator[PrivateSlurm]:
    with ExitStack() as stack:
        yield _start(stack, accounting="dbd")


@pytest.fixture
def slurm(_plain: PrivateSlurm) -> Iterator[PrivateSlurm]:
    """Four nodes as SLURM's defaults have it: no accounting, preemption without grace or user signal."""
    yield _plain
    _plain.clear()


@pytest.fixture
def slurm_user_signal(_warned: PrivateSlurm) -> Iterator[PrivateSlurm]:
    """The same where preemption sends the job's --signal first; partition `grace` has time to heed it."""
    yield _warned
    _warned.clear()


@pytest.fixture
def slurm_accounting(_accounted: PrivateSlurm) -> Iterator[PrivateSlurm]:
    """The same with slurmdbd, so that sacct knows."""
    yield _accounted
    _accounted.clear()


@pytest.fixture
def private_slurm() -> Iterator[Callable[..., PrivateSlurm]]:
    """Start a cluster of one's own: `private_slurm(isolation="net", slurmd_timeout=3)`; Options has all."""
    with ExitStack() as stack:
        yield lambda **options: _start(stack, **options)
