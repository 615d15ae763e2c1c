"""Checkpoints against torch.save and torch's distributed checkpoints: python tests/bench/checkpoint.py
[--gib 1]

One process, one state (fp32 weights and Adam's two averages), contenders in turn, medians over rounds.
`stall`: until the state may change again. `durable`: until every byte is on disk (peers' files are flushed
too). `restore`: into the tensors that are there, from a warm cache; ours checks every byte against its digest,
the others check nothing. `speed`: how fast a loop of small tensor operations runs while the rest
is written, of its speed before. The state of many tensors is cut into pieces of 64 KiB.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from moe.checkpoint import Checkpoints
from moe.engine import Engine
from moe.parallel import Groups
from moe.spec import TrainSpec

PIECE = 64 << 10  # bytes of a small tensor


class Many(nn.Module):
    """Parameters and nothing else."""

    def __init__(self, number: int, elements: int) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(torch.randn(elements)) for _ in range(number))


def engine_of(gib: float, small: bool) -> Engine:
    """An engine whose state is `gib` GiB, in few large or many small tensors."""
    elements = int(gib * 2**30) // 12
    each = PIECE // 4 if small else elements // 16
    spec = TrainSpec(precision="fp32", zero=2, recompute=False, global_batch=1, micro_batch=1)
    engine = Engine(Many(elements // each, each), spec, Groups.single(), total_steps=1)
    for fragment in engine.fragments():
        fragment.tensor.uniform_()
    return engine


def flush(folder: Path) -> None:
    """Wait until a peer's files are on disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Loop:
    """A training loop that is all Python and small operations: what shares the interpreter slows it down."""

    def __init__(self) -> None:
        self.a = torch.randn(64, 64)

    def rate(self, until: Callable[[], bool], least: float = 0.2) -> float:
        """Iterations a second until something is done."""
        started, number = time.perf_counter(), 0
        while (passed := time.perf_counter() - started) < least or not until():
            for _ in range(50):
                self.a = torch.tanh(self.a @ self.a)
            number += 50
        return number / passed


Times = dict[str, float]


class Ours:
    def __init__(self, engine: Engine, background: bool) -> None:
        self.engine, self.background = engine, background
        self.checkpoints: Checkpoints | None = None
        self.step = 0

    def save(self, folder: Path, loop: Loop) -> Times:
        if self.checkpoints is None:
            self.checkpoints = Checkpoints(folder, self.engine.groups, keep=1_000)  # `quiet` removes the old
        self.step += 1
        began = time.perf_counter()
        times: Times = {}
        if self.background:
            self.checkpoints.begin(self.step, self.engine, {})
            times["stall"] = time.perf_counter() - began
            times["rate"] = loop.rate(self.checkpoints.ready)
            self.checkpoints.settle()
        else:
            self.checkpoints.save(self.step, self.engine, {})
            times["stall"] = time.perf_counter() - began
        return times | {"durable": time.perf_counter() - began}

    def load(self, folder: Path) -> Times:
        assert self.checkpoints is not None
        began = time.perf_counter()
        assert self.checkpoints.resume(self.engine) is not None
        return {"restore": time.perf_counter() - began}


class TorchSave:
    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def save(self, folder: Path, loop: Loop) -> Times:
        folder.mkdir()
        began = time.perf_counter()
        torch.save(self.state, folder / "state.pt")
        stall = time.perf_counter() - began
        flush(folder)
        return {"stall": stall, "durable": time.perf_counter() - began}

    def load(self, folder: Path) -> Times:
        began = time.perf_counter()
        for name, tensor in torch.load(folder / "state.pt").items():
            self.state[name].copy_(tensor)
        return {"restore": time.perf_counter() - began}


class Dcp:
    def __init__(self, state: dict[str, Tensor], kind: AsyncCheckpointerType | None) -> None:
        self.state, self.kind = state, kind

    def save(self, folder: Path, loop: Loop) -> Times:
        began = time.perf_counter()
        if self.kind is None:
            dcp.save(self.state, checkpoint_id=folder)
            return {"stall": time.perf_counter() - began, "durable": time.perf_counter() - began}
        future: Any = dcp.async_save(self.state, checkpoint_id=folder, async_checkpointer_type=self.kind)
        times = {"stall": time.perf_counter() - began, "rate": loop.rate(future.done)}
        future.result()
        return times | {"durable": time.perf_counter() - began}

    def load(self, folder: Path) -> Times:
        began = time.perf_counter()
        dcp.load(self.state, checkpoint_id=folder)
        return {"restore": time.perf_counter() - began}


class Raw:
    """The limits: one copy in memory, one write of as many bytes, one read."""

    def __init__(self, size: int) -> None:
        self.source, self.target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)

    def save(self, folder: Path, loop: Loop) -> Times:
        folder.mkdir()
        began = time.perf_counter()
        self.target.copy_(self.source)
        stall = time.perf_counter() - began
        began = time.perf_counter()
        with (folder / "raw").open("wb", buffering=0) as file:
            view = memoryview(self.source.numpy())
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        return {"stall": stall, "durable": time.perf_counter() - began}

    def load(self, folder: Path) -> Times:
        began = time.perf_counter()
        with (folder / "raw").open("rb", buffering=0) as file:
            view = memoryview(self.target.numpy())
            while view:
                view = view[file.readinto(view) :]
        return {"restore": time.perf_counter() - began}


def quiet(place: Path) -> None:
    """Remove what a contender saved before, and let the disk come to rest: freeing a file is work for it too."""
    shutil.rmtree(place, ignore_errors=True)
    os.sync()
    time.sleep(1)


def measure(gib: float, small: bool, rounds: int, folder: Path) -> dict[str, Times]:
    """Medians by contender; the first round is warm-up and not counted."""
    engine = engine_of(gib, small)
    state = {f"{f.name}.{f.kind}": f.tensor.clone() for f in engine.fragments()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    contenders: dict[str, Any] = {
        "ours": Ours(engine, background=False),
        "ours, async": Ours(engine, background=True),
        "torch.save": TorchSave(state),
        "DCP": Dcp(state, None),
        "DCP, async thread": Dcp(state, AsyncCheckpointerType.THREAD),
        "DCP, async process": Dcp(state, AsyncCheckpointerType.PROCESS),
        "copy; write; read": Raw(size),
    }
    loop = Loop()
    seen: dict[str, list[Times]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            place = folder / f"{name} {'small' if small else 'large'}"
            quiet(place)
            before = loop.rate(lambda: True)
            times = contenders[name].save(place, loop)
            if "rate" in times:
                times["speed"] = times.pop("rate") / before
            times |= contenders[name].load(place)
            if turn:
                seen[name].append(times)
    return {
        name: {key: statistics.median(times[key] for times in rows) for key in rows[0]}
        for name, rows in seen.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Save and restore, against torch's own ways.")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state of few large tensors")
    parser.add_argument("--small-gib", type=float, default=0.25, help="size of the state of many small ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write; a temporary folder if not named"
    )
    parser.add_argument("--json", type=Path, default=None, help="write the medians there too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)  # of the DCP process
    torch.set_num_threads(1)
    columns = ("stall", "durable", "restore", "speed")
    results = {}
    for small, gib in ((False, options.gib), (True, options.small_gib)):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            medians = measure(gib, small, options.rounds, Path(folder))
        results["small" if small else "large"] = medians
        print(f"\n{gib} GiB in {'pieces of 64 KiB' if small else '16 tensors, thrice'}, seconds")
        print(f"{'':20}" + "".join(f"{column:>19}" for column in columns))
        for name, times in medians.items():
            cells = (f"{times[column]:19.3f}" if column in times else f"{'':19}" for column in columns)
            print(f"{name:20}" + "".join(cells))
        ours, thread = medians["ours, async"], medians["DCP, async thread"]
        print(
            f"stall: {medians['torch.save']['stall'] / ours['stall']:.1f} x less than torch.save, "
            f"{thread['stall'] / ours['stall']:.1f} x less than DCP's async thread, "
            f"{ours['stall'] / medians['copy; write; read']['stall']:.2f} x one copy; durable: "
            f"{medians['ours']['durable'] / medians['copy; write; read']['durable']:.2f} x one write, "
            f"{medians['DCP']['durable'] / medians['ours']['durable']:.1f} x faster than DCP; restore: "
            f"{medians['DCP']['restore'] / medians['ours']['restore']:.1f} x faster than DCP"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
