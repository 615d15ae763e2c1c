"""Who saves and restores one state in the checkpoints' benchmark, each its own way, and what the machine allows.

A contender's `save` gives the seconds until the state may change again (`stall`), until every byte is on disk
(`durable`), and what a loop of small tensor operations lost meanwhile; its `load` those until the state is back in the
tensors that are there, and the weights that the model computes with are taken over from it (`restore`).
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from moe.checkpoint import Checkpoints
from moe.engine import Engine
from moe.parallel import Groups
from moe.spec import TrainSpec

PIECE = 64 << 10  # bytes of a small tensor
STRIDE = 512 << 10
OURS, ASYNC, TORCH, DCP, THREAD, PROCESS, LIMIT = (
    "ours",
    "ours, async",
    "torch.save",
    "DCP",
    "DCP, async thread",
    "DCP, async process",
    "limits",
)
Times = dict[str, float]


class Many(nn.Module):
    """Parameters and nothing else."""

    def __init__(self, number: int, elements: int) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(torch.randn(elements)) for _ in range(number))


def engine_of(mib: int, small: bool, groups: Groups | None = None) -> Engine:
    """An engine whose state (fp32 weights and Adam's averages) is `mib` MiB, in 48 large or many small tensors."""
    elements = (mib << 20) // 12
    each = PIECE // 4 if small else elements // 16
    spec = TrainSpec(precision="fp32", zero=2, recompute=False, global_batch=2, micro_batch=1)
    engine = Engine(Many(elements // each, each), spec, groups or Groups.single(), total_steps=1)
    for fragment in engine.fragments():
        fragment.tensor.uniform_()
    return engine


class Loop:
    """A training loop that is all Python and small operations: what shares the interpreter slows it down."""

    def __init__(self) -> None:
        self.a = torch.randn(64, 64)
        self.usual = (1.0, 1.0)  # what `rates` are, alone

    def rates(self, until: Callable[[], bool], least: float = 0.2) -> tuple[float, float, float]:
        """Iterations a second until something is done; those a second in which it ran or waited for what runs
        beside it in its process, not for a core; and the seconds.
        """
        started, queued, number = time.perf_counter(), _queued(), 0
        while (passed := time.perf_counter() - started) < least or not until():
            for _ in range(50):
                self.a = torch.tanh(self.a @ self.a)
            number += 50
        return number / passed, number / max(passed - (_queued() - queued), 1e-9), passed

    def beside(self, stall: float, until: Callable[[], bool]) -> Times:
        """Its speed until something is done, of its usual one, and what it lost to the save altogether."""
        rate, own, passed = self.rates(until, least=0.01)
        speed = rate / self.usual[0]
        return {
            "stall": stall,
            "speed": speed,
            "with cores": own / self.usual[1],
            "lost": stall + (1 - speed) * passed,
        }


def _queued() -> float:
    """Seconds this thread was ready to run and had no core."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


class Ours:
    def __init__(self, engine: Engine, background: bool) -> None:
        self.engine, self.background = engine, background
        self.checkpoints: Checkpoints | None = None
        self.step = 0

    def save(self, folder: Path, loop: Loop) -> Times:
        if self.checkpoints is None:
            self.checkpoints = Checkpoints(
                folder, self.engine.groups, keep=1_000
            )  # the benchmark removes them
        self.step += 1
        began = time.perf_counter()
        times: Times = {}
        if self.background:
            self.checkpoints.begin(self.step, self.engine, {})
            times = loop.beside(time.perf_counter() - began, self.checkpoints.ready)
            self.checkpoints.settle()
        else:
            self.checkpoints.save(self.step, self.engine, {})
            times["stall"] = times["lost"] = time.perf_counter() - began
        return times | {"durable": time.perf_counter() - began}

    def load(self, folder: Path) -> Times:
        assert self.checkpoints is not None
        began = time.perf_counter()
        assert self.checkpoints.resume(self.engine) is not None
        return {"restore": time.perf_counter() - began}


class TorchSave:
    def __init__(self, state: dict[str, Tensor], engine: Engine) -> None:
        self.state, self.engine = state, engine

    def save(self, folder: Path, loop: Loop) -> Times:
        folder.mkdir()
        began = time.perf_counter()
        torch.save(self.state, folder / "state.pt")
        stall = time.perf_counter() - began
        flush(folder)
        return {"stall": stall, "lost": stall, "durable": time.perf_counter() - began}

    def load(self, folder: Path) -> Times:
        began = time.perf_counter()
        for name, tensor in torch.load(folder / "state.pt").items():
            self.state[name].copy_(tensor)
        self.engine.refresh()
        return {"restore": time.perf_counter() - began}


class Dcp:
    def __init__(self, state: dict[str, Any], engine: Engine, kind: AsyncCheckpointerType | None) -> None:
        self.state, self.engine, self.kind = state, engine, kind

    def save(self, folder: Path, loop: Loop) -> Times:
        began = time.perf_counter()
        if self.kind is None:
            dcp.save(self.state, checkpoint_id=folder)
            stall = time.perf_counter() - began
            return {"stall": stall, "lost": stall, "durable": stall}
        future: Any = dcp.async_save(self.state, checkpoint_id=folder, async_checkpointer_type=self.kind)
        times = loop.beside(time.perf_counter() - began, future.done)
        future.result()
        return times | {"durable": time.perf_counter() - began}

    def load(self, folder: Path) -> Times:
        began = time.perf_counter()
        dcp.load(self.state, checkpoint_id=folder)
        self.engine.refresh()
        return {"restore": time.perf_counter() - began}


class Limits:
    """One copy in memory, one plain write of as many bytes, one plain read; and `checked`: the bare work of our
    restore, a read with a digest of every piece by a thread a core, into the memory it is for.
    """

    def __init__(self, size: int) -> None:
        self.source, self.target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)

    def save(self, folder: Path, loop: Loop) -> Times:
        folder.mkdir()
        began = time.perf_counter()
        self.target.copy_(self.source)
        stall = time.perf_counter() - began
        began = time.perf_counter()
        with (folder / "raw").open("wb", buffering=0) as file:
            view = memoryview(self.source.numpy())  # type: ignore[arg-type]
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        return {"stall": stall, "durable": time.perf_counter() - began}

    def load(self, folder: Path) -> Times:
        began = time.perf_counter()
        view = memoryview(self.target.numpy())  # type: ignore[arg-type]
        with (folder / "raw").open("rb", buffering=0) as file:
            rest = view
            while rest:
                rest = rest[file.readinto(rest) :]
            plain = time.perf_counter() - began
            began = time.perf_counter()
            threads = len(os.sched_getaffinity(0))
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda n: _digested(file.fileno(), view, n, threads), range(threads)))
        return {"restore": plain, "checked": time.perf_counter() - began}


def _digested(descriptor: int, view: memoryview, first: int, every: int) -> None:
    for begin in itertools.count(first * STRIDE, every * STRIDE):
        if begin >= len(view):
            return
        part = view[begin : begin + STRIDE]
        os.preadv(descriptor, [part], begin)
        hasher = xxhash.xxh3_128()
        hasher.update(part)
        hasher.digest()


def flush(folder: Path) -> None:
    """Wait until a peer's files are on disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def contenders(mib: int, small: bool, only: list[str]) -> dict[str, Any]:
    """Those named, for one state that all of them hold."""
    engine = engine_of(mib, small)
    state = {f"{f.name}.{f.kind}": f.tensor.clone() for f in engine.fragments()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    makers: dict[str, Callable[[], Any]] = {
        OURS: lambda: Ours(engine, background=False),
        ASYNC: lambda: Ours(engine, background=True),
        TORCH: lambda: TorchSave(state, engine),
        DCP: lambda: Dcp(state, engine, None),
        THREAD: lambda: Dcp(state, engine, AsyncCheckpointerType.THREAD),
        PROCESS: lambda: Dcp(state, engine, AsyncCheckpointerType.PROCESS),
        LIMIT: lambda: Limits(size),
    }
    return {name: makers[name]() for name in only}
