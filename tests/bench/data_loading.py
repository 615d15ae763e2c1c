"""Samples a second on one core: the reference's data path, transformers 5's, and ours, decoding and prepared.

    python tests/bench/data_loading.py [--rounds 7] [--samples 48] [--json FILE]

First all are shown to give the same ids, labels and pictures. Then they take turns, in another order each
round; the clock counts processor time on one thread, and a ratio is the median of the rounds' ratios with a
bootstrap interval. Decoding alone and copying alone are the limits of the two kinds of path.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from data.collate import collate  # noqa: E402
from data.images import ImageFormat, load  # noqa: E402
from data.index import Index, open_index  # noqa: E402
from data.shards import build, open_shard  # noqa: E402
from tests.bench import data_corpus  # noqa: E402
from tests.bench.data_reference import Reference, collated  # noqa: E402

FORMAT = ImageFormat(336, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "crop")
BATCH = 8
GOALS = {
    ("ours, fast", "reference"): 6.0,
    ("ours, fast", "transformers 5"): 2.5,
    ("prepared, bytes", "reference"): 200.0,
    ("prepared, bytes", "transformers 5"): 80.0,
}
Contender = Callable[[list[int]], Any]


def ours(index: Index, root: Path, pad: int, fast: bool) -> Contender:
    """Tokens from the index, pictures decoded straight into the batch."""

    def batch(numbers: list[int]) -> dict[str, torch.Tensor]:
        rows = [index.row(number) for number in numbers]
        paths = [path for row in rows for path in row.images]
        pixels = torch.empty((len(paths), 3, FORMAT.size, FORMAT.size))
        for at, path in enumerate(paths):
            load(root / path, FORMAT, "pad", quick=fast, out=pixels[at])
        return collate(rows, pixels, pad)

    return batch


def prepared(index: Index, root: Path, pad: int, as_bytes: bool) -> Contender:
    """Tokens from the index, pictures from the shard: as floats, or as the bytes a GPU would normalise."""
    from data.images import normalise

    shard = open_shard(root, FORMAT, "pad")
    assert shard is not None

    def batch(numbers: list[int]) -> dict[str, torch.Tensor]:
        rows = [index.row(number) for number in numbers]
        paths = [path for row in rows for path in row.images]
        kind = torch.uint8 if as_bytes else torch.float32
        pixels = torch.empty((len(paths), 3, FORMAT.size, FORMAT.size), dtype=kind)
        for at, path in enumerate(paths):
            raw = shard.get(path)
            assert raw is not None
            if as_bytes:
                np.copyto(pixels[at].numpy(), raw)
            else:
                normalise(raw, FORMAT, pixels[at])
        return collate(rows, pixels, pad)

    return batch


def contenders(root: Path, count: int) -> dict[str, Contender]:
    """All of them, over the same records."""
    from transformers import CLIPImageProcessorPil

    annotation = root / "mix.json"
    data_corpus.records(annotation, count)
    data_corpus.pictures(root)
    tokenizer = data_corpus.tokenizer()
    index = open_index(annotation, tokenizer, "phi")
    paths = [path for number in range(count) for path in index.row(number).images]
    build(root, paths, FORMAT, "pad", 1)
    seed = Reference(annotation, root, tokenizer, FORMAT)
    side = {"height": 336, "width": 336}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=side)
    five = Reference(annotation, root, tokenizer, FORMAT, processor)
    pad = tokenizer.pad_token_id
    shard = open_shard(root, FORMAT, "pad")
    assert shard is not None

    def decode(numbers: list[int]) -> None:
        for number in numbers:
            for path in index.row(number).images:
                Image.open(root / path).load()

    def copy(numbers: list[int]) -> None:
        target = np.empty((3, FORMAT.size, FORMAT.size), np.uint8)
        for number in numbers:
            np.copyto(target, shard._pixels[number % len(shard._pixels)])

    return {
        "reference": lambda numbers: collated([seed[number] for number in numbers], pad),
        "transformers 5": lambda numbers: collated([five[number] for number in numbers], pad),
        "ours": ours(index, root, pad, fast=False),
        "ours, fast": ours(index, root, pad, fast=True),
        "prepared, floats": prepared(index, root, pad, as_bytes=False),
        "prepared, bytes": prepared(index, root, pad, as_bytes=True),
        "limit: decode": decode,
        "limit: copy": copy,
    }


def same(all_of_them: dict[str, Contender], numbers: list[int]) -> None:
    """A fast wrong path cannot win: ids and labels are equal, pictures are to 1e-5, or two grey levels."""
    want = all_of_them["reference"](numbers)
    for name, far in (
        ("transformers 5", 1e-5),
        ("ours", 1e-5),
        ("prepared, floats", 1e-5),
        ("ours, fast", 0.031),
    ):
        got = all_of_them[name](numbers)
        for key in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(got[key], want[key]), (name, key)
        apart = (got["pixel_values"] - want["pixel_values"]).abs().max().item()
        assert apart <= far, (name, apart)


def interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """A bootstrap interval, 95 %, of the median."""
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[1949]


def main() -> int:
    """Measure; exit code 1 when a goal is missed by more than its interval."""
    parser = argparse.ArgumentParser(description="Samples a second on one core.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        them = contenders(Path(folder), 256)
        numbers = random.Random(0).sample(range(256), options.samples)
        batches = [numbers[at : at + BATCH] for at in range(0, len(numbers), BATCH)]
        same(them, batches[0])
        seconds: dict[str, list[float]] = {name: [] for name in them}
        names = list(them)
        for turn in range(options.rounds + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                # The quick ones take many turns, or the clock would be all that is measured.
                repeats = 20 if name.startswith(("prepared", "limit: copy")) else 1
                start = time.process_time()
                for _ in range(repeats):
                    for batch in batches:
                        them[name](batch)
                if turn:  # the first round warms up
                    seconds[name].append((time.process_time() - start) / repeats / len(numbers))
    milli = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    print(f"{'path':20}{'ms/sample':>12}{'samples/s/core':>16}{'x reference':>14}{'x transformers 5':>18}")
    for name, value in milli.items():
        to = [milli[peer] / value for peer in ("reference", "transformers 5")]
        print(f"{name:20}{value:12.3f}{1e3 / value:16.0f}{to[0]:14.1f}{to[1]:18.1f}")
    print(f"share of bare decoding: {milli['limit: decode'] / milli['ours, fast']:.0%} (goal 65 %)")
    missed, facts = 0, {}
    for (name, peer), goal in GOALS.items():
        ratios = [slow / fast for slow, fast in zip(seconds[peer], seconds[name], strict=True)]
        low, high = interval(ratios)
        facts[f"{name} / {peer}"] = {
            "ratio": statistics.median(ratios),
            "interval": [low, high],
            "goal": goal,
        }
        verdict = "reached" if high >= goal else "missed"
        missed += high < goal
        print(
            f"{name} over {peer}: {statistics.median(ratios):.1f} [{low:.1f}, {high:.1f}], goal {goal:g}: {verdict}"
        )
    load_average = os.getloadavg()[0]
    print(
        f"load {load_average:.1f} on {os.cpu_count()} cores; torch {torch.__version__}, Pillow {Image.__version__}"
    )
    if options.json:
        options.json.write_text(json.dumps({"ms": milli, "ratios": facts, "load": load_average}, indent=1))
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
