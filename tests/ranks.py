"""Run a test function on several ranks at once: real gloo processes on this machine.

A rank leaves by os._exit once its function has returned: with subgroups alive, torch's own teardown aborts
now and then. A rank that raises leaves its traceback behind, and the others are ended: they would wait
forever.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def free_port() -> int:
    """A port nobody uses: the kernel names it when 0 is bound."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def alone(test: Callable[..., None]) -> Callable[..., None]:
    """A test in a process of its own, without a launcher: what it starts for one rank would not survive a fork."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        ranks(1, launcher=False)(test, *args, **kwargs)

    return run


def ranks(world: int, timeout: float = 120.0, *, launcher: bool = True) -> Callable[..., list[Any]]:
    """`ranks(2)(function, *args)` calls the function on 2 ranks and returns what each returned, by rank.

    Ranks are forked, so that any function will do, and see RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT; what they return is pickled. Raises AssertionError with the first failing rank's traceback,
    or when they take longer than `timeout` seconds.
    """

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_initialized():
            raise RuntimeError(
                "this process is a rank itself: gloo does not survive a fork. Run what started it in @alone"
            )
        context = multiprocessing.get_context("fork")
        port = free_port()
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            processes = [
                context.Process(
                    target=_rank, args=(function, args, kwargs, rank, world, port if launcher else 0, folder)
                )
                for rank in range(world)
            ]
            for process in processes:
                process.start()
            try:
                failed = _wait(processes, timeout)
            finally:
                for process in processes:
                    if process.is_alive():
                        process.kill()
                    process.join()
            if failed is not None:
                said = sorted(Path(folder).glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
                raise AssertionError(said[0].read_text() if said else failed)
            return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world)]

    return run


def _wait(processes: list[Any], timeout: float) -> str | None:
    """None when all ranks ended well, else what the first bad one did."""
    end = time.monotonic() + timeout
    while True:
        codes = [process.exitcode for process in processes]
        for rank, code in enumerate(codes):
            if code not in (None, 0):
                return f"rank {rank} ended with exit code {code} and left no traceback"
        if all(code == 0 for code in codes):
            return None
        if time.monotonic() > end:
            waiting = [rank for rank, code in enumerate(codes) if code is None]
            return f"ranks {waiting} of {len(codes)} were still running after {timeout:.0f} s"
        time.sleep(0.01)


def _rank(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rank: int,
    world: int,
    port: int,
    folder: str,
) -> None:
    for name in NAMES:
        os.environ.pop(name, None)
    if port:
        values = (str(rank), str(world), str(rank), "127.0.0.1", str(port))
        os.environ.update(zip(NAMES, values, strict=True))
    import torch

    torch.set_num_threads(1)
    place = Path(folder)
    try:
        result = function(*args, **kwargs)
        (place / f"{rank}.result").write_bytes(pickle.dumps(result))
    except BaseException:
        text = f"rank {rank} of {world}:\n{traceback.format_exc()}"
        half = place / f"{rank}.half"
        half.write_text(text)
        half.rename(place / f"{rank}.error")
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    # Before leaving, wait for the others: rank 0 keeps the store that they may still be reading.
    end = time.monotonic() + 30
    while (
        len(list(place.glob("*.result"))) < world
        and not list(place.glob("*.error"))
        and time.monotonic() < end
    ):
        time.sleep(0.005)
    os._exit(0)
