"""Samples a second on one core: the reference's data path on its pins and on today's libraries, and ours.

    python tests/bench/data_loading.py [--pins PYTHON] [--rounds 7] [--samples 48] [--json FILE]

PYTHON is an interpreter with the versions that the reference pins (`data_pins.py` says how to make one); it takes
its turn in each round. First all are shown to give the same ids, labels and pictures. Then they take turns, in
another order each round; the clock counts processor time on one thread, and a ratio is the median of the rounds'
ratios with a bootstrap interval. Decoding alone and copying alone are the limits of the two kinds of path.
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

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from data.images import normalise  # noqa: E402
from tests.bench import data_corpus  # noqa: E402
from tests.bench.data_paths import FORMAT, contenders  # noqa: E402
from tests.bench.data_pins import Pins  # noqa: E402

BATCH, RECORDS = 8, 256
PINS, FIVE, PILLOW_FIVE = "reference, its pins", "transformers 5, tensors", "transformers 5, Pillow"
GOALS = {
    ("ours, quick", PINS): 6.0,
    ("ours, quick", FIVE): 2.5,
    ("ours, quick", PILLOW_FIVE): 2.5,
    ("ours, quick", "limit: libjpeg-turbo decodes"): 0.65,
    ("ours, prepared", PINS): 200.0,
    ("ours, prepared", FIVE): 80.0,
    ("ours, prepared", PILLOW_FIVE): 80.0,
    ("ours, prepared", "limit: copying"): 0.5,
}
Timed = Callable[[list[list[int]]], float]


def same(want: dict[str, Any], got: dict[str, Any], far: float, name: str) -> None:
    """A fast wrong path cannot win: ids and labels are equal, pictures to `far`."""
    for key in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(got[key], want[key]), (name, key)
    pictures = got["pixel_values"]
    if pictures.dtype == torch.uint8:
        floats = torch.empty(pictures.shape)
        for raw, out in zip(pictures, floats, strict=True):
            normalise(raw.numpy(), FORMAT, out)
        pictures = floats
    apart = (pictures - want["pixel_values"]).abs().max().item()
    assert apart <= far, (name, apart)


def timed(path: Callable[[list[int]], Any], repeats: int) -> Timed:
    """Processor seconds of a path in this process."""

    def seconds(batches: list[list[int]]) -> float:
        start = time.process_time()
        for _ in range(repeats):
            for batch in batches:
                path(batch)
        return (time.process_time() - start) / repeats

    return seconds


def interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """A bootstrap interval, 95 %, of the median."""
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[1949]


def measure(them: dict[str, Timed], rounds: int, samples: int) -> dict[str, list[float]]:
    """Seconds a sample of each, round by round."""
    numbers = random.Random(0).sample(range(RECORDS), samples)
    batches = [numbers[at : at + BATCH] for at in range(0, len(numbers), BATCH)]
    seconds: dict[str, list[float]] = {name: [] for name in them}
    names = list(them)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took = them[name](batches) / len(numbers)
            if turn:  # the first round warms up
                seconds[name].append(took)
    return seconds


def told(seconds: dict[str, list[float]]) -> tuple[dict[str, Any], int]:
    """Print the table and the goals; the facts and how many goals were missed."""
    milli = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    peers = [name for name in (PINS, FIVE) if name in milli]
    print(f"{'path':30}{'ms/sample':>12}{'samples/s':>12}" + "".join(f"{'x ' + peer:>28}" for peer in peers))
    for name, value in milli.items():
        to = "".join(f"{milli[peer] / value:28.1f}" for peer in peers)
        print(f"{name:30}{value:12.3f}{1e3 / value:12.0f}{to}")
    missed, facts = 0, {}
    for (name, peer), goal in GOALS.items():
        if peer not in seconds:
            print(f"{name} over {peer}: not measured")
            continue
        ratios = [slow / fast for slow, fast in zip(seconds[peer], seconds[name], strict=True)]
        ratio, (low, high) = statistics.median(ratios), interval(ratios)
        facts[f"{name} / {peer}"] = {"ratio": ratio, "interval": [low, high], "goal": goal}
        missed += high < goal
        verdict = "reached" if ratio >= goal else "within its interval" if high >= goal else "missed"
        print(f"{name} over {peer}: {ratio:.2f} [{low:.2f}, {high:.2f}], goal {goal:g}: {verdict}")
    return {"ms": milli, "ratios": facts}, missed


def main() -> int:
    """Measure; exit code 1 when a goal is missed by more than its interval."""
    parser = argparse.ArgumentParser(description="Samples a second on one core.")
    parser.add_argument("--pins", help="an interpreter with the versions that the reference pins")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root, tokenizer = Path(folder), data_corpus.tokenizer()
        paths = contenders(root, RECORDS, tokenizer)
        first = random.Random(1).sample(range(RECORDS), BATCH)
        want = paths["reference, fast tokenizer"](first)
        for name, path in paths.items():
            if not name.startswith("limit"):
                # Two grey levels where the kernel is torch's.
                same(want, path(first), 0.031 if name in (FIVE, "ours, quick") else 1e-5, name)
        # The quick ones take many turns, or the clock would be all that is measured.
        often = ("ours, prepared", "limit: copying")
        them = {name: timed(path, 20 if name in often else 1) for name, path in paths.items()}
        pins = Pins(options.pins, root / "mix.json", root, tokenizer) if options.pins else None
        if pins:
            same(want, pins.batch(first, root / "batch.pt"), 1e-5, PINS)
            them = {PINS: pins.seconds, **them}
        seconds = measure(them, options.rounds, options.samples)
        if pins:
            pins.close()
            print("pins:", ", ".join(f"{name} {version}" for name, version in pins.versions.items()))
    facts, missed = told(seconds)
    load = os.getloadavg()[0]
    print(f"load {load:.1f} on {os.cpu_count()} cores; torch {torch.__version__}, Pillow {Image.__version__}")
    if options.json:
        options.json.write_text(json.dumps({**facts, "load": load}, indent=1))
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
