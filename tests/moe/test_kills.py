"""Ranks killed in the middle of a save they make together, and a disk that fills up: never a bad load, never none.

A short slice here; KILLS=200 python -m pytest tests/moe/test_kills.py for the long count.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe import storage
from moe.checkpoint import CheckpointError, Checkpoints
from moe.engine import Engine
from moe.fragments import FROZEN
from moe.parallel import Groups
from tests.moe import standin
from tests.ranks import NAMES, free_port, ranks

KILLS = int(os.environ.get("KILLS", "12"))


def engine_of(groups: Groups) -> Engine:
    return Engine(standin.Model(groups), standin.spec(), groups, total_steps=10)


def expected(fragment: Any, step: int) -> torch.Tensor:
    """What every element of the state is at a step, whichever rank holds it."""
    place = torch.arange(fragment.start, fragment.stop, dtype=torch.float64)
    of = sum(map(ord, fragment.name + fragment.kind)) % 97
    if fragment.kind == FROZEN:
        step = 0
    return (place % 1009 + of + 7 * step).to(fragment.tensor.dtype)


def save_for_ever(folder: Path, world: int, rank: int, port: int, background: bool, said: Any) -> None:
    """One rank: load what is there and see that it is whole, then save one step after another."""
    values = (str(rank), str(world), str(rank), "127.0.0.1", str(port))
    os.environ.update(zip(NAMES, values, strict=True))
    torch.set_num_threads(1)
    groups = Groups.create(2 if world == 2 else 1)
    engine = engine_of(groups)
    checkpoints = Checkpoints(folder, groups, keep=2)
    step = 0
    found = checkpoints.resume(engine)
    if found is not None:
        step = found[0].step
        assert found[1] == {"loader": step}
        assert engine.step == step
        for fragment in engine.fragments():
            assert torch.equal(fragment.tensor, expected(fragment, step)), (
                fragment.name,
                fragment.kind,
                step,
            )
    if rank == 0:
        said.send((step, checkpoints.faults))
    while True:
        step += 1
        for fragment in engine.fragments():
            fragment.tensor.copy_(expected(fragment, step))
        engine.step = step
        if rank == 0:
            said.send((step, []))
        if background:
            checkpoints.begin(step, engine, {"loader": step})
            checkpoints.settle()
        else:
            checkpoints.save(step, engine, {"loader": step})


def round_of(folder: Path, dice: random.Random) -> tuple[int, int, list[str]]:
    """Ranks that load and then save until one is killed: (the step loaded, the step being saved, faults)."""
    context = multiprocessing.get_context("fork")
    world, port = dice.choice([2, 2, 3]), free_port()
    hear, tell = context.Pipe(duplex=False)
    background = dice.random() < 0.5
    processes = [
        context.Process(target=save_for_ever, args=(folder, world, rank, port, background, tell))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        assert hear.poll(60), "no rank came up"
        loaded, faults = hear.recv()
        for _ in range(dice.choice([1, 3])):
            assert hear.poll(60)
            saving, _ = hear.recv()
        time.sleep(dice.uniform(0, 0.02))
        victim = dice.choice(processes)
        assert victim.is_alive(), f"rank ended by itself with {victim.exitcode}"
        os.kill(victim.pid or 0, signal.SIGKILL)
        time.sleep(dice.choice([0, 0.01]))  # the others go on for a while, as on other nodes
        while hear.poll(0):
            saving, _ = hear.recv()
        return loaded, saving, faults
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_a_rank_killed_while_all_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    dice = random.Random(int(os.environ.get("SEED", "0")))
    least = most = kills = undone = 0
    while kills < KILLS:
        loaded, saving, faults = round_of(tmp_path, dice)
        assert faults == []
        assert least <= loaded <= most  # the newest complete one, or the one that was being saved
        kills += 1
        undone += loaded < most
        least, most = max(saving - 1, 0), saving
    assert undone, "no kill hit a save"
    newest = storage.found(tmp_path)[0]
    record = storage.describe(newest.path)
    assert storage.faults(newest.path, record, record["files"]) == []


# --- a full disk ---


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of so many bytes; False where none may be mounted."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield made.returncode == 0
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_up(folder: Path, mounted: bool) -> tuple[list[str], list[str], int]:
    groups = Groups.create(2)
    engine = engine_of(groups)
    checkpoints = Checkpoints(folder, groups, keep=2)
    checkpoints.save(2, engine, {})
    ballast = folder / f"ballast_{groups.rank}"
    if mounted:  # another user's file takes what there is
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    groups.barrier()
    words = []
    for background in (False, True):
        if background:
            checkpoints.begin(3, engine, {})
        with pytest.raises(CheckpointError) as told:
            checkpoints.settle() if background else checkpoints.save(3, engine, {})
        words.append(str(told.value))
    left = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("ballast"))
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    groups.barrier()
    ballast.unlink(missing_ok=True)
    groups.barrier()
    return words, left, checkpoints.save(3, engine, {}).step


def test_a_full_disk_is_said_by_all_ranks_and_harms_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path, 1 << 20) as mounted:
        reason = "No space left on device" if mounted else "File too large"
        for words, left, later in ranks(2)(fill_up, tmp_path, mounted):
            for said in words:
                assert said.startswith(f"step_00000003 was not saved under {tmp_path} (")
                assert reason in said
                assert "step_00000002 is still the newest" in said
            assert left == ["step_00000002"]
            assert later == 3
