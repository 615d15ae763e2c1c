"""From a start to the first batch, and the memory it takes, by the number of records: the reference's way and ours.

    python tests/bench/data_start.py [--sizes 1000 10000 100000 1000000] [--kept FOLDER] [--json FILE]

Each number is of a fresh process: processor seconds from opening the data to the first batch, without imports, and
private dirty memory: of a rank then, and of a worker that has read 20,000 samples. The reference's workers are
forked, and what they touch becomes theirs; ours are the rank's own threads. A node is 8 ranks with 4 workers each,
added up from these. More than 100,000 records are as many times those 100,000 (data_tiles.py). 10^6 records take
6 GB of memory for the reference.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[0] = str(Path(__file__).resolve().parents[2])

READS, TILE = 20_000, 100_000
RANKS, WORKERS = 8, 4  # of a node; of a rank
CAPACITY = 8192
GOALS = {"seconds": 0.05, "slope": 0.05, "times faster": 300, "times less memory a node": 50}


def private_megabytes() -> float:
    """Memory that only this process has and has written."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/smaps_rollup has no Private_Dirty")


def reference(root: Path) -> dict[str, float]:
    """Parse all, count all words, order all, make the first batch."""
    import numpy as np

    from data.images import ImageFormat
    from data.sampler import by_modality
    from tests.bench import data_corpus
    from tests.bench.data_reference import Reference

    tokenizer = data_corpus.tokenizer()
    form = ImageFormat(8, (0.5,) * 3, (0.5,) * 3, "squash")  # type: ignore[arg-type]
    gc.collect()
    before, start = private_megabytes(), time.process_time()
    data = Reference(root / "mix.json", root, tokenizer, form)
    order = by_modality(np.array(data.lengths()), 8, 16).flat()
    for at in order[:8]:
        data.text(data.records[at]["conversations"], "image" in data.records[at])
    seconds, rank = time.process_time() - start, private_megabytes() - before

    def read() -> None:
        rng = random.Random(0)
        for _ in range(READS):
            copy.deepcopy(data.records[rng.randrange(len(data))]["conversations"])
        gc.collect()

    return {"seconds": seconds, "rank_mb": rank, "worker_mb": forked(read)}


def forked(work: Callable[[], None]) -> float:
    """Private dirty megabytes of a child after its work: what the fork shared it does not count until it is touched."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        work()
        os.write(writing, str(private_megabytes()).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        return float(file.read())


def ours(root: Path, workers: int = 0) -> dict[str, float]:
    """Open the index, pack a window, make the first packed batch; its pictures are tiny, decoding is not meant.

    With `workers` the rank goes on for 50 steps and READS samples before its memory is looked at.
    """
    from data.images import ImageFormat
    from data.loader import Loader
    from data.spec import DataSpec
    from tests.bench import data_corpus

    tokenizer = data_corpus.tokenizer()
    form = ImageFormat(8, (0.5,) * 3, (0.5,) * 3, "squash")  # type: ignore[arg-type]
    spec = DataSpec(
        root=str(root), mix="mix.json", template="phi", max_length=CAPACITY, packing=True, workers=workers
    )
    gc.collect()
    before, start = private_megabytes(), time.process_time()
    loader = Loader(spec, tokenizer, form, 576, micro_batch=1, accumulation=1, rank=0, world=1, seed=0)
    steps = loader.steps()
    next(steps)
    seconds = time.process_time() - start
    if workers:
        for _ in range(50):
            next(steps)
        rng = random.Random(0)
        for _ in range(READS):
            loader._row(rng.randrange(int(loader._mixture.starts[-1])))
        gc.collect()
    return {"seconds": seconds, "rank_mb": private_megabytes() - before, "worker_mb": 0.0}


def index(root: Path) -> dict[str, float]:
    """Build the index, once for all runs."""
    from data.index import open_index
    from tests.bench import data_corpus

    tokenizer = data_corpus.tokenizer()
    gc.collect()
    start = time.process_time()
    made = open_index(root / "mix.json", tokenizer, "phi")
    seconds = time.process_time() - start
    rate = made.meta["tokens"] / seconds / 1e6
    records = json.loads((root / "mix.json").read_text())[:2000]
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    start = time.process_time()
    found = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    alone = time.process_time() - start
    return {
        "encode_batch": sum(map(len, found)) / alone / 1e6,
        "seconds": seconds,
        "rank_mb": 0.0,
        "worker_mb": 0.0,
        "million_tokens_s": rate,
    }


def slope(sizes: list[int], values: list[float]) -> float:
    """Of the line through the points in doubly logarithmic scale."""
    xs, ys = [math.log(size) for size in sizes], [math.log(max(value, 1e-9)) for value in values]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    across = sum((x - mean_x) ** 2 for x in xs) or 1.0
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / across


@contextlib.contextmanager
def data(kept: Path | None, size: int) -> Iterator[Path]:
    """A root of so many records; a large one with its index, which tells nothing about building it."""
    from tests.bench import data_corpus, data_tiles

    if size <= TILE:
        with data_corpus.corpus(kept, size) as root:
            yield root
        return
    if size % TILE:
        raise SystemExit(f"--sizes {size}: above {TILE} it must be a multiple of that")
    with tempfile.TemporaryDirectory() as passing:
        folder, tokenizer = kept or Path(passing), data_corpus.tokenizer()
        data_tiles.proven(Path(passing) / "proof", tokenizer, "phi")
        root = folder / f"shared-{size}"
        if not (root / "whole").exists():
            with data_corpus.corpus(folder, TILE) as small:
                measure("index", small, 1)
                data_tiles.tiled(small, root, size // TILE, tokenizer, "phi")
            (root / "whole").touch()
        yield root


def measure(name: str, root: Path, repeats: int) -> dict[str, float]:
    """The quickest of some fresh processes."""
    command = [sys.executable, __file__, "--child", name, str(root)]
    done = [
        subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout for _ in range(repeats)
    ]
    results: list[dict[str, float]] = [json.loads(out.splitlines()[-1]) for out in done]
    return min(results, key=lambda result: result["seconds"])


def node(row: dict[str, float]) -> float:
    """Megabytes of a node's ranks and workers together."""
    return RANKS * (row["rank_mb"] + WORKERS * row["worker_mb"])


def main() -> int:
    """Measure at all sizes; exit code 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description="From start to first batch.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--kept", type=Path, help="folder in which data and indexes are kept for the next time"
    )
    parser.add_argument("--reference-up-to", type=int, default=1_000_000, help="records that fit into memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("NAME", "ROOT"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.child:
        name, root = options.child
        print(json.dumps(CHILDREN[name](Path(root))))
        return 0
    rows: dict[str, dict[int, dict[str, float]]] = {"reference": {}, "index": {}, "ours": {}}
    print(f"{'records':>10} {'path':10}{'CPU s':>10}{'a rank, MB':>12}{'a worker, MB':>14}{'a node, MB':>12}")
    for size in options.sizes:
        with data(options.kept, size) as root:
            for name, found in rows.items():
                if name == "reference" and size > options.reference_up_to:
                    continue
                if name == "index" and list(root.glob(".index/*/meta.json")):
                    continue
                once = name == "index" or (name == "reference" and size > 200_000)
                got = found[size] = measure(name, root, 1 if once else options.repeats)
                if name == "ours":
                    got["rank_mb"] = measure("threads", root, 1)["rank_mb"]
                rate = ""
                if name == "index":
                    speeds = got["million_tokens_s"], got["encode_batch"]
                    rate = "  {:.2f} million tokens/CPU-s, encode_batch alone {:.2f}".format(*speeds)
                print(
                    f"{size:>10} {name:10}{got['seconds']:10.4f}{got['rank_mb']:12.1f}{got['worker_mb']:14.1f}"
                    f"{node(got):12.0f}{rate}",
                    flush=True,
                )
    mine, theirs = rows["ours"], rows["reference"]
    largest = max(theirs)
    seconds = [mine[size]["seconds"] for size in options.sizes]
    facts: dict[str, Any] = {
        "seconds": max(seconds),
        "slope": slope(options.sizes, seconds),
        "times faster": theirs[largest]["seconds"] / mine[largest]["seconds"],
        "times less memory a node": node(theirs[largest]) / node(mine[largest]),
    }
    missed = 0
    for name, value in facts.items():
        reached = value <= GOALS[name] if name in ("seconds", "slope") else value >= GOALS[name]
        missed += not reached
        print(f"{name}: {value:.3f}, goal {GOALS[name]}: {'reached' if reached else 'missed'}")
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "facts": facts}, indent=1))
    return int(missed > 0)


CHILDREN: dict[str, Callable[[Path], dict[str, float]]] = {
    "reference": reference,
    "ours": ours,
    "threads": lambda root: ours(root, WORKERS),
    "index": index,
}


if __name__ == "__main__":
    sys.exit(main())
