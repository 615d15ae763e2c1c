"""From a start to the first batch, and the memory it takes, by the number of records: the reference's way and ours.

    python tests/bench/data_start.py [--sizes 1000 10000 100000] [--kept FOLDER] [--json FILE]

Each number is of a fresh process: processor seconds from opening the data to the first batch, without imports,
and private dirty memory then and after 20,000 samples were read, as a worker does. 10^6 records take 6 GB of
memory for the reference.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[0] = str(Path(__file__).resolve().parents[2])

READS = 20_000
CAPACITY = 8192
GOALS = {"seconds": 0.05, "slope": 0.05, "times faster": 300, "times less memory": 50}


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
    seconds, opened = time.process_time() - start, private_megabytes()
    rng = random.Random(0)
    for _ in range(READS):
        len(data.records[rng.randrange(len(data))]["conversations"])
    gc.collect()
    return {"seconds": seconds, "open_mb": opened - before, "read_mb": private_megabytes() - before}


def ours(root: Path) -> dict[str, float]:
    """Open the index, pack a window, make the first packed batch; its pictures are tiny, decoding is not meant."""
    from data.images import ImageFormat
    from data.loader import Loader
    from data.spec import DataSpec
    from tests.bench import data_corpus

    tokenizer = data_corpus.tokenizer()
    form = ImageFormat(8, (0.5,) * 3, (0.5,) * 3, "squash")  # type: ignore[arg-type]
    spec = DataSpec(
        root=str(root), mix="mix.json", template="phi", max_length=CAPACITY, packing=True, workers=0
    )
    gc.collect()
    before, start = private_megabytes(), time.process_time()
    loader = Loader(spec, tokenizer, form, 576, micro_batch=1, accumulation=1, rank=0, world=1, seed=0)
    next(loader.steps())
    seconds, opened = time.process_time() - start, private_megabytes()
    rng = random.Random(0)
    for _ in range(READS):
        loader._row(rng.randrange(int(loader._mixture.starts[-1])))
    gc.collect()
    return {"seconds": seconds, "open_mb": opened - before, "read_mb": private_megabytes() - before}


def index(root: Path) -> dict[str, float]:
    """Build the index, once for all runs."""
    from data.index import open_index
    from tests.bench import data_corpus

    tokenizer = data_corpus.tokenizer()
    gc.collect()
    before, start = private_megabytes(), time.process_time()
    made = open_index(root / "mix.json", tokenizer, "phi")
    seconds = time.process_time() - start
    rate = made.meta["tokens"] / seconds / 1e6
    return {
        "seconds": seconds,
        "open_mb": private_megabytes() - before,
        "read_mb": 0.0,
        "million_tokens_s": rate,
    }


def slope(sizes: list[int], values: list[float]) -> float:
    """Of the line through the points in doubly logarithmic scale."""
    xs, ys = [math.log(size) for size in sizes], [math.log(max(value, 1e-9)) for value in values]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    across = sum((x - mean_x) ** 2 for x in xs) or 1.0
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / across


def measure(name: str, root: Path, repeats: int) -> dict[str, float]:
    """The quickest of some fresh processes."""
    command = [sys.executable, __file__, "--child", name, str(root)]
    done = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(repeats)
    ]
    results: list[dict[str, float]] = [json.loads(out.splitlines()[-1]) for out in done]
    return min(results, key=lambda result: result["seconds"])


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
        print(json.dumps({"reference": reference, "ours": ours, "index": index}[name](Path(root))))
        return 0
    from tests.bench import data_corpus

    rows: dict[str, dict[int, dict[str, float]]] = {"reference": {}, "index": {}, "ours": {}}
    print(f"{'records':>10} {'path':10}{'CPU s':>10}{'open, MB':>12}{'after 20k reads, MB':>22}")
    for size in options.sizes:
        with data_corpus.corpus(options.kept, size) as root:
            for name, found in rows.items():
                if name == "reference" and size > options.reference_up_to:
                    continue
                if name == "index" and list(root.glob(".index/*/meta.json")):
                    continue
                repeats = (
                    1 if name == "index" or (name == "reference" and size > 200_000) else options.repeats
                )
                got = found[size] = measure(name, root, repeats)
                rate = f"  {got['million_tokens_s']:.2f} million tokens/CPU-s" if name == "index" else ""
                print(
                    f"{size:>10} {name:10}{got['seconds']:10.4f}{got['open_mb']:12.1f}{got['read_mb']:22.1f}{rate}",
                    flush=True,
                )
    mine, theirs = rows["ours"], rows["reference"]
    largest = max(theirs)
    seconds = [mine[size]["seconds"] for size in options.sizes]
    facts: dict[str, Any] = {
        "seconds": max(seconds),
        "slope": slope(options.sizes, seconds),
        "times faster": theirs[largest]["seconds"] / mine[largest]["seconds"],
        "times less memory": theirs[largest]["read_mb"] / max(mine[largest]["read_mb"], 0.1),
    }
    missed = 0
    for name, value in facts.items():
        reached = value <= GOALS[name] if name in ("seconds", "slope") else value >= GOALS[name]
        missed += not reached
        print(f"{name}: {value:.3f}, goal {GOALS[name]}: {'reached' if reached else 'missed'}")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "facts": facts}, indent=1))
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
