"""Checkpoints against torch.save and torch's distributed checkpoints: python tests/bench/checkpoint.py

One process, one state (fp32 weights and Adam's two averages) in three sizes, in 48 tensors and in tensors of 64 KiB;
with 1024 open files, which a login shell allows. All contenders in turn, in another order each round; a ratio is the
median of the rounds' ratios, with the 95 % interval of that median. The first round is not counted.
`stall`: until the state may change again. `durable`: until every byte is on disk (peers' files are flushed
too). `restore`: into the tensors that are there, from a warm cache, and from them into the model's weights; ours
checks every byte against its digest, the others check nothing; `its CPU`: seconds of processors for that, which a busy
machine changes least; `checked`: a bare read with a digest. `speed`: of a training loop of small operations while the
rest is written, of its speed alone; `with cores`: the same but for the time the loop waited for a core, as where
there are enough of them; `lost`: seconds it lost to the save, stall and slower running. Before all that, a state
two ranks wrote is restored by one. After six minutes (`--minutes`) rounds are left out, all but two of each kind.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
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
COLUMNS = ("stall", "durable", "speed", "with cores", "lost", "first stall", "restore", "its CPU", "checked")
OTHER = "2 ranks to 1"
FULL = 1024  # MiB: the size whose stall and durable time have goals; smaller ones wait three times for the disk too


def measure(
    mib: int, small: bool, rounds: int, only: list[str], folder: Path, until: float
) -> tuple[Rows, Rows]:
    """Each contender's saves, a row a round, and then its restores of its last one, with no disk between them.

    Two rounds of each at least; more of them while it is not later than `until`.
    """
    loop = Loop()
    runners = contenders(mib, small, only)
    first: Times = {}

    def saved(name: str) -> Times:
        shutil.rmtree(folder / name, ignore_errors=True)
        os.sync()  # the disk comes to rest: freeing a file is work for it too
        time.sleep(0.2)
        loop.usual = loop.rates(lambda: True)[:2]
        times: Times = runners[name].save(folder / name, loop)
        return times | {"first stall": first.setdefault(name, times["stall"])}

    def loaded(name: str) -> Times:
        worked = time.process_time()
        times: Times = runners[name].load(folder / name)
        return times | {"its CPU": time.process_time() - worked}

    began = time.monotonic()
    saves = in_turn(saved, only, rounds, began + 0.8 * (until - began))
    loads = in_turn(loaded, only, 2 * rounds, until)
    for name in only:
        shutil.rmtree(folder / name)
    return saves, loads


def in_turn(work: Callable[[str], Times], names: list[str], rounds: int, until: float) -> Rows:
    """What each gives, a row a round, in another order each round; the first round is not counted."""
    rows: Rows = {name: [] for name in names}
    for turn in range(rounds + 1):
        if turn > 2 and time.monotonic() > until:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found = work(name)
            if turn:
                rows[name].append(found)
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


def on_another_number_of_ranks(mib: int, rounds: int, folder: Path, until: float) -> Rows:
    """A state of tensors of 64 KiB that two ranks wrote, restored by this one process."""
    ranks(2)(two_ranks, mib, folder)
    engine = engine_of(mib, True)
    state = {f"{f.name}.{f.kind}": f.tensor.clone() for f in engine.fragments()}
    ours = Checkpoints(folder / OURS, engine.groups)

    def loaded(name: str) -> Times:
        began, worked = time.perf_counter(), time.process_time()
        if name == OURS:
            assert ours.resume(engine) is not None
        else:
            dcp.load(state, checkpoint_id=folder / DCP)
            engine.refresh()
        return {"restore": time.perf_counter() - began, "its CPU": time.process_time() - worked}

    rows = in_turn(loaded, [OURS, DCP], 2 * rounds, until)
    for fragment in engine.fragments():  # both hold what was written
        if fragment.kind == "master":
            assert fragment.tensor.count_nonzero()
            assert state[f"{fragment.name}.master"].count_nonzero()
    return rows


def table(title: str, saves: Rows, loads: Rows, load: tuple[float, float]) -> None:
    """Medians, in seconds."""
    counts = "; ".join(
        f"{len(next(iter(rows.values())))} rounds of {what}"
        for what, rows in (("saves", saves), ("restores", loads))
        if rows
    )
    print(
        f"\n{title}; {counts}; load {load[0]:.1f} to {load[1]:.1f} on {os.cpu_count()} cores; medians, seconds"
    )
    rows = {name: [saves.get(name, []), found] for name, found in loads.items()}
    columns = [
        c for c in COLUMNS if any(c in row for kinds in rows.values() for kind in kinds for row in kind)
    ]
    print(f"{'':20}" + "".join(f"{column:>13}" for column in columns))
    for name, kinds in rows.items():
        cells = []
        for column in columns:
            values = [row[column] for kind in kinds for row in kind if column in row]
            cells.append(f"{statistics.median(values):13.3f}" if values else f"{'':13}")
        print(f"{name:20}" + "".join(cells))


def goals(case: str, saves: Rows, loads: Rows) -> list[dict[str, Any]]:
    """Each goal of one state, and what was reached."""
    mib = int(case.split()[0])
    full, small, many = mib == FULL and "large" in case, "small" in case, mib >= 256 and "small" in case
    wanted = [  # words, whose, what, over whose, what, at least, at most (0: no goal)
        ("stall: torch.save / ours", TORCH, "stall", ASYNC, "stall", 8.0 * full, 0.0),
        ("stall: DCP's thread / ours", THREAD, "stall", ASYNC, "stall", 2.5 * full, 0.0),
        ("stall: ours / one copy", ASYNC, "stall", LIMIT, "stall", 0.0, 1.3 * full),
        ("durable: ours / one plain write", OURS, "durable", LIMIT, "durable", 0.0, 1.2 * full),
        ("durable: DCP / ours", DCP, "durable", OURS, "durable", 5.0 * many, 0.0),
        ("restore: DCP / ours", DCP, "restore", OURS, "restore", 15.0 * many if small else 2.5, 0.0),
        ("its CPU: DCP / ours", DCP, "its CPU", OURS, "its CPU", 0.0, 0.0),
        ("restore: torch.save / ours", TORCH, "restore", OURS, "restore", 0.0, 0.0),
        ("restore: ours / bare read and digest", OURS, "restore", LIMIT, "checked", 0.0, 0.0),
        ("restore: DCP / bare read and digest", DCP, "restore", LIMIT, "checked", 0.0, 0.0),
    ]
    said = []
    for words, one, what, other, of, least, most in wanted:
        rows = loads if what in ("restore", "its CPU", "checked") else saves
        if not (rows.get(one) and rows.get(other) and what in rows[one][0] and of in rows[other][0]):
            continue
        value, low, high = ratio([row[what] for row in rows[one]], [row[of] for row in rows[other]])
        goal = f">= {least:g}" if least else f"<= {most:g}" if most else ""
        met = None if not goal else value >= least if least else value <= most
        said.append({"what": words, "ratio": value, "low": low, "high": high, "goal": goal, "met": met})
    return said


def judged(case: str, saves: Rows, loads: Rows) -> list[dict[str, Any]]:
    """Print what a state's ratios came to."""
    found = goals(case, saves, loads)
    for row in found:
        verdict = "" if row["met"] is None else "  met" if row["met"] else "  MISSED"
        goal = f"  goal {row['goal']}{verdict}" if row["goal"] else ""
        print(f"  {row['what']:40}{row['ratio']:7.2f}  [{row['low']:.2f}, {row['high']:.2f}]{goal}")
    return found


def growth(results: dict[str, tuple[Rows, Rows]], kind: str) -> None:
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
            (float(mib), statistics.median(row[what] for row in rows[what == "restore"][name]))
            for mib, rows in cases.items()
        ]
        if len(points) > 1:
            print(f"  {kind}: {what} of {name:14} ~ size^{slope(points):.2f}")


def _share(mib: int, kind: str) -> float:
    """Of the time there is: about what a case takes."""
    return (mib + 200) * {"large": 1.0, "small": 1.5, OTHER: 0.7}[kind]


def main() -> None:
    parser = argparse.ArgumentParser(description="Save and restore, against torch's own ways.")
    parser.add_argument("--mib", type=int, nargs="+", default=[64, 256, 1024], help="sizes of the state")
    parser.add_argument(
        "--kinds", nargs="+", default=["large", "small", OTHER], choices=["large", "small", OTHER]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--minutes", type=float, default=6.0, help="after which rounds are left out, all but two"
    )
    parser.add_argument("--process", action="store_true", help="DCP's process too: twice the time")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write; a temporary folder if not named"
    )
    parser.add_argument("--json", type=Path, default=None, help="write every round there too")
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)  # of the DCP process
    torch.set_num_threads(1)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard) if hard > 0 else 1024, hard))
    results: dict[str, tuple[Rows, Rows]] = {}
    verdicts = {}
    cases = [
        (mib, kind)
        for kind in ("large", "small")
        if kind in options.kinds
        for mib in sorted(options.mib, reverse=kind == "large")
    ]
    cases += [(min(256, max(options.mib)), OTHER)] if OTHER in options.kinds else []
    cases.sort(key=lambda case: case[1] != OTHER)  # first: ranks are forked while this process is small
    left = sum(_share(*case) for case in cases)
    end = time.monotonic() + 60 * options.minutes
    for mib, kind in cases:
        load, now = os.getloadavg()[0], time.monotonic()
        until = now + (end - now) * _share(mib, kind) / left
        left -= _share(mib, kind)
        many = kind == "small" and mib > 256
        names = [OURS, ASYNC, DCP] if many else [OURS, ASYNC, TORCH, DCP, THREAD, LIMIT]
        names += [PROCESS] if options.process else []
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            if kind == OTHER:
                rows = {}, on_another_number_of_ranks(mib, options.rounds, Path(folder), until)
            else:
                rows = measure(mib, kind == "small", options.rounds, names, Path(folder), until)
        case = f"{mib} MiB, {'small, ' * (kind == OTHER)}{kind}"
        results[case] = rows
        count = "48 tensors" if kind == "large" else f"{mib << 4} tensors of 64 KiB"
        table(
            f"{mib} MiB in {count}{', written by 2 ranks and restored by 1' * (kind == OTHER)}",
            *rows,
            (load, os.getloadavg()[0]),
        )
        verdicts[case] = judged(case, *rows)
        sys.stdout.flush()
        if options.json:
            options.json.write_text(json.dumps({"rounds": results, "ratios": verdicts}, indent=1))
    print("\nGrowth, 1 is linear:")
    for kind in ("large", "small"):
        growth(results, kind)


if __name__ == "__main__":
    main()
