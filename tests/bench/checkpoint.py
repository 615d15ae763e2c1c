"""Checkpoints against torch.save and torch's distributed checkpoints: python tests/bench/checkpoint.py

One process, one state (fp32 weights and Adam's two averages) in three sizes, in 48 tensors and in tensors of 64 KiB;
with 1024 open files, which a login shell allows. All contenders in turn, in another order each round; a ratio is the
median of the rounds' ratios, with the 95 % interval of that median. The first round is not counted.
`stall`: until the state may change again. `durable`: until every byte is on disk (peers' files are flushed
too). `restore`: into the tensors that are there, from a warm cache; ours checks every byte against its digest and
brings the weights up to date, the others check nothing. `speed`: of a training loop of small operations while the
rest is written, of its speed alone; `with cores`: the same but for the time the loop waited for a core, as where
there are enough of them; `lost`: seconds it lost to the save, stall and slower running. Then a state that two
ranks wrote is restored by one. About six minutes on a calm machine; `--rounds 2 --mib 64` takes half of one.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from moe.checkpoint import Checkpoints
from moe.parallel import Groups
from tests.bench.checkpoint_peers import (
    ASYNC,
    DCP,
    LIMIT,
    OURS,
    PROCESS,
    THREAD,
    TORCH,
    Loop,
    Times,
    contenders,
    engine_of,
)
from tests.bench.moe_layer_verdicts import ratio, slope
from tests.ranks import ranks

Rows = dict[str, list[Times]]
COLUMNS = ("stall", "durable", "restore", "speed", "with cores", "lost", "first stall")
OTHER = "2 ranks to 1"
FULL = 1024  # MiB: the size whose stall and durable time have goals; smaller ones wait three times for the disk too


def measure(mib: int, small: bool, rounds: int, only: list[str], folder: Path) -> Rows:
    """Each contender's times, a row a round."""
    loop = Loop()
    runners = contenders(mib, small, only)
    rows: Rows = {name: [] for name in only}
    first: Times = {}
    for turn in range(rounds + 1):
        for name in only[turn % len(only) :] + only[: turn % len(only)]:
            place = folder / name
            os.sync()  # the disk comes to rest: freeing the last one's files is work for it too
            time.sleep(0.2)
            loop.usual = loop.rates(lambda: True)[:2]
            times: Times = runners[name].save(place, loop)
            times |= runners[name].load(place)
            shutil.rmtree(place)
            if turn:
                rows[name].append(times | {"first stall": first[name]})
            else:
                first[name] = times["stall"]
    return rows


def two_ranks(mib: int, folder: Path) -> None:
    """One rank of two: write a state as ours and as DCP's, whose tensors are cut along their first dimension."""
    warnings.simplefilter("ignore")
    groups = Groups.create(1)
    engine = engine_of(mib, True, groups)
    Checkpoints(folder / OURS, groups).save(1, engine, {})
    mesh = init_device_mesh("cpu", (2,))
    state = {}
    for name, parameter in engine.vlm.named_parameters():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            half = parameter.detach().chunk(2)[groups.rank].clone()
            state[f"{name}.{kind}"] = DTensor.from_local(half, mesh, [Shard(0)], run_check=False)
    dcp.save(state, checkpoint_id=folder / DCP)
    dist.barrier()


def on_another_number_of_ranks(mib: int, rounds: int, folder: Path) -> Rows:
    """A state of tensors of 64 KiB that two ranks wrote, restored by this one process."""
    ranks(2)(two_ranks, mib, folder)
    engine = engine_of(mib, True)
    state = {f"{f.name}.{f.kind}": f.tensor.clone() for f in engine.fragments()}
    ours = Checkpoints(folder / OURS, engine.groups)
    restores = {
        OURS: functools.partial(ours.resume, engine),
        DCP: functools.partial(dcp.load, state, checkpoint_id=folder / DCP),
    }
    rows: Rows = {name: [] for name in restores}
    for turn in range(rounds + 1):
        for name in list(restores)[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            assert restores[name]() is not None or name == DCP
            if turn:
                rows[name].append({"restore": time.perf_counter() - began})
    for fragment in engine.fragments():  # both hold what was written
        if fragment.kind == "master":
            assert fragment.tensor.count_nonzero()
            assert state[f"{fragment.name}.master"].count_nonzero()
    return rows


def table(title: str, rows: Rows, load: tuple[float, float]) -> None:
    """Medians, in seconds."""
    print(f"\n{title}; load {load[0]:.1f} to {load[1]:.1f} on {os.cpu_count()} cores; medians, seconds")
    columns = [c for c in (*COLUMNS, "checked") if any(c in row for found in rows.values() for row in found)]
    print(f"{'':20}" + "".join(f"{column:>13}" for column in columns))
    for name, found in rows.items():
        cells = (
            f"{statistics.median(row[column] for row in found):13.3f}" if column in found[0] else f"{'':13}"
            for column in columns
        )
        print(f"{name:20}" + "".join(cells))


def goals(case: str, rows: Rows) -> list[dict[str, Any]]:
    """Each goal of one state, and what was reached."""
    full, small = case == f"{FULL} MiB, large", "small" in case
    wanted = [  # words, whose, what, over whose, what, at least, at most (0: no goal)
        ("stall: torch.save / ours", TORCH, "stall", ASYNC, "stall", 8.0 * full, 0.0),
        ("stall: DCP's thread / ours", THREAD, "stall", ASYNC, "stall", 2.5 * full, 0.0),
        ("stall: ours / one copy", ASYNC, "stall", LIMIT, "stall", 0.0, 1.3 * full),
        ("durable: ours / one plain write", OURS, "durable", LIMIT, "durable", 0.0, 1.2 * full),
        ("durable: DCP / ours", DCP, "durable", OURS, "durable", 5.0 * small, 0.0),
        ("restore: DCP / ours", DCP, "restore", OURS, "restore", 15.0 if small else 2.5, 0.0),
        ("restore: torch.save / ours", TORCH, "restore", OURS, "restore", 0.0, 0.0),
        ("restore: ours / bare read and digest", OURS, "restore", LIMIT, "checked", 0.0, 0.0),
        ("restore: DCP / bare read and digest", DCP, "restore", LIMIT, "checked", 0.0, 0.0),
    ]
    said = []
    for words, one, what, other, of, least, most in wanted:
        if not (rows.get(one) and rows.get(other) and what in rows[one][0] and of in rows[other][0]):
            continue
        value, low, high = ratio([row[what] for row in rows[one]], [row[of] for row in rows[other]])
        goal = f">= {least:g}" if least else f"<= {most:g}" if most else ""
        met = None if not goal else value >= least if least else value <= most
        said.append({"what": words, "ratio": value, "low": low, "high": high, "goal": goal, "met": met})
    return said


def judged(case: str, rows: Rows) -> list[dict[str, Any]]:
    """Print what a state's ratios came to."""
    found = goals(case, rows)
    for row in found:
        verdict = "" if row["met"] is None else "  met" if row["met"] else "  MISSED"
        goal = f"  goal {row['goal']}{verdict}" if row["goal"] else ""
        print(f"  {row['what']:40}{row['ratio']:7.2f}  [{row['low']:.2f}, {row['high']:.2f}]{goal}")
    return found


def growth(results: dict[str, Rows], kind: str) -> None:
    """How time grows with the size: 1 is linear."""
    cases = {int(case.split()[0]): rows for case, rows in results.items() if case.endswith(f", {kind}")}
    for name, what in (
        (ASYNC, "stall"),
        (OURS, "durable"),
        (OURS, "restore"),
        (DCP, "durable"),
        (DCP, "restore"),
    ):
        points = [
            (float(mib), statistics.median(row[what] for row in rows[name]))
            for mib, rows in cases.items()
            if rows.get(name)
        ]
        if len(points) > 1:
            print(f"  {kind}: {what} of {name:14} ~ size^{slope(points):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Save and restore, against torch's own ways.")
    parser.add_argument("--mib", type=int, nargs="+", default=[64, 256, 1024], help="sizes of the state")
    parser.add_argument(
        "--kinds", nargs="+", default=["large", "small", OTHER], choices=["large", "small", OTHER]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--process", action="store_true", help="DCP's process too: twice the time")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write; a temporary folder if not named"
    )
    parser.add_argument("--json", type=Path, default=None, help="write every round there too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)  # of the DCP process
    torch.set_num_threads(1)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard) if hard > 0 else 1024, hard))
    results: dict[str, Rows] = {}
    verdicts = {}

    def ran(case: str, title: str, rows: Rows, load: float) -> None:
        results[case] = rows
        table(title, rows, (load, os.getloadavg()[0]))
        verdicts[case] = judged(case, rows)
        sys.stdout.flush()

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if OTHER in options.kinds:  # first: ranks are forked while this process is small
            load, mib = os.getloadavg()[0], min(256, max(options.mib))
            rows = on_another_number_of_ranks(mib, options.rounds, Path(folder))
            ran(
                f"{mib} MiB, small, {OTHER}",
                f"{mib} MiB in tensors of 64 KiB, 2 ranks' restored by 1",
                rows,
                load,
            )
        for kind in ("large", "small"):
            for mib in options.mib if kind in options.kinds else ():
                many = kind == "small" and mib > 256
                names = [OURS, ASYNC, DCP] if many else [OURS, ASYNC, TORCH, DCP, THREAD, LIMIT]
                names += [PROCESS] if options.process else []
                load = os.getloadavg()[0]
                rounds = math.ceil(options.rounds / 2) if many else options.rounds
                rows = measure(mib, kind == "small", rounds, names, Path(folder))
                count = f"{mib << 4} tensors of 64 KiB" if kind == "small" else "48 tensors"
                ran(f"{mib} MiB, {kind}", f"{mib} MiB in {count}, {rounds} rounds", rows, load)
    print("\nGrowth, 1 is linear:")
    for kind in ("large", "small"):
        growth(results, kind)
    if options.json:
        options.json.write_text(json.dumps({"rounds": results, "ratios": verdicts}, indent=1))


if __name__ == "__main__":
    main()
