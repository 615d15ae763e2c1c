"""Private SLURM clusters for tests: one a session for each common kind, cleared after each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.slurm.cluster import PrivateSlurm, SlurmError, missing


class _Shared:
    """A cluster for many tests: started for the first, cleared after each, given up when that fails."""

    def __init__(self, **options: object) -> None:
        self.options = options
        self.stack = ExitStack()
        self.cluster: PrivateSlurm | None = None

    def lend(self) -> Iterator[PrivateSlurm]:
        if self.cluster is None:
            self.cluster = _start(self.stack, **self.options)
        yield self.cluster
        try:
            self.cluster.clear()
        except SlurmError:
            self.cluster = None  # so that this test fails, and no other for its sake
            self.stack.close()
            raise


def _start(stack: ExitStack, **options: object) -> PrivateSlurm:
    if reason := missing():
        pytest.skip(reason)
    return stack.enter_context(PrivateSlurm(**options))


def _shared(**options: object) -> Iterator[_Shared]:
    shared = _Shared(**options)
    with shared.stack:
        yield shared


@pytest.fixture(scope="session")
def _plain() -> Iterator[_Shared]:
    yield from _shared()


@pytest.fixture(scope="session")
def _warned() -> Iterator[_Shared]:
    yield from _shared(user_signal=True)


@pytest.fixture(scope="session")
def _accounted() -> Iterator[_Shared]:
    yield from _shared(accounting="dbd")


@pytest.fixture
def slurm(_plain: _Shared) -> Iterator[PrivateSlurm]:
    """Four nodes as SLURM's defaults have it: no accounting, preemption without grace or user signal."""
    yield from _plain.lend()


@pytest.fixture
def slurm_user_signal(_warned: _Shared) -> Iterator[PrivateSlurm]:
    """The same where preemption sends the job's --signal first; partition `grace` has time to heed it."""
    yield from _warned.lend()


@pytest.fixture
def slurm_accounting(_accounted: _Shared) -> Iterator[PrivateSlurm]:
    """The same with slurmdbd, so that sacct knows."""
    yield from _accounted.lend()


@pytest.fixture
def private_slurm() -> Iterator[Callable[..., PrivateSlurm]]:
    """Start a cluster of one's own: `private_slurm(isolation="net", slurmd_timeout=3)`; Options has all."""
    with ExitStack() as stack:
        yield lambda **options: _start(stack, **options)
