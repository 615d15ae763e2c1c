"""What a batch costs the process that trains: processor time of its own thread, without decoding.

    python tests/bench/data_handover.py [--batches 60] [--rounds 5] [--json FILE]

The reference's pictures come as float tensors from worker processes, through shared memory, and are stacked; ours
are written as bytes by the process's own threads into the batch's memory, and normalised on the device. Both are
given pictures that are ready, and take turns. Ours is the loader as training uses it, with its texts, from a
prepared shard; the other's batch holds the pictures and as many tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from data.loader import Loader  # noqa: E402
from data.shards import build  # noqa: E402
from data.spec import DataSpec  # noqa: E402
from tests.bench import data_corpus  # noqa: E402
from tests.bench.data_paths import FORMAT  # noqa: E402

BATCH, WORKERS, GOAL = 8, 2, 5.0
Sample = dict[str, torch.Tensor]


class Ready(Dataset[Sample]):
    """Samples whose pictures are ready."""

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, at: int) -> Sample:
        ids = torch.zeros(200, dtype=torch.int64)
        return {"input_ids": ids, "labels": ids.clone(), "image": torch.zeros(3, FORMAT.size, FORMAT.size)}


def listed(samples: list[Sample]) -> dict[str, Any]:
    """A batch as the reference's collator leaves it: its pictures in a list."""
    texts = {name: torch.stack([sample[name] for sample in samples]) for name in ("input_ids", "labels")}
    return {**texts, "images": [sample["image"] for sample in samples]}


def theirs() -> Iterator[torch.Tensor]:
    """Stacked pictures, batch after batch."""
    for batch in DataLoader(Ready(), BATCH, num_workers=WORKERS, collate_fn=listed):
        yield torch.stack(batch["images"])


def ours(root: Path, tokenizer: Any) -> Iterator[torch.Tensor]:
    """The loader's pictures."""
    spec = DataSpec(root=str(root), mix="mix.json", template="phi", workers=WORKERS, group_by="none")
    place = {"micro_batch": BATCH, "accumulation": 1, "rank": 0, "world": 1, "seed": 0}
    for step in Loader(spec, tokenizer, FORMAT, 576, **place).steps():
        yield step[0]["pixel_values"]


def main() -> int:
    """Measure; exit code 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description="What a batch costs the process that trains.")
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root, tokenizer = Path(folder), data_corpus.tokenizer()
        data_corpus.pictures(root)
        data_corpus.records(root / "mix.json", 256)
        names = [f"pictures/{at:03d}.jpg" for at in range(data_corpus.PICTURES)]
        build(root, names, FORMAT, "pad", 1)
        streams = {"reference": theirs(), "ours": ours(root, tokenizer)}
        milli: dict[str, list[float]] = {name: [] for name in streams}
        for turn, (name, stream) in itertools.product(range(options.rounds + 1), streams.items()):
            start = time.thread_time()
            for pictures in itertools.islice(stream, options.batches):
                assert pictures.shape[1:] == (3, FORMAT.size, FORMAT.size)
            if turn:  # the first round warms up
                milli[name].append((time.thread_time() - start) / options.batches * 1e3)
    ratio = statistics.median(a / b for a, b in zip(milli["reference"], milli["ours"], strict=True))
    for name, values in milli.items():
        print(f"{name:12}{statistics.median(values):8.3f} ms of the training thread a batch of {BATCH}")
    print(f"ratio {ratio:.1f}, goal {GOAL:g}: {'reached' if ratio >= GOAL else 'missed'}")
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if options.json:
        options.json.write_text(json.dumps({"ms": milli, "ratio": ratio}, indent=1))
    return int(ratio < GOAL)


if __name__ == "__main__":
    sys.exit(main())
