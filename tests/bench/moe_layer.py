"""One MoE layer, forward and backward, against all others: time, memory, FLOPs, bytes sent.

    python tests/bench/moe_layer.py                      # CPU, fp32, one thread
    python tests/bench/moe_layer.py --tokens 16384 --rounds 3 --json results.json
    python tests/bench/moe_layer.py --device cuda --shape phi2 --shape stablelm

First every contender is shown to compute the same, outputs and gradients: a fast wrong path cannot win. Then
all run in turn, in another order each round; a ratio is the median of the rounds' ratios. On a CPU the clock
counts processor time, so that other programs do not matter much; FLOPs are counted, not derived. What would not fit
into memory is not run: how much it needs is said. `--json` adds to the file's results and judges all it then holds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from tests.bench.moe_layer_counts import (
    CAPACITY,
    Memory,
    clean,
    exchange,
    executed,
    one_hot_bytes,
    one_hots,
    room,
    sample,
    step,
    useful,
)
from tests.bench.moe_layer_peers import TOP_K, Einsum, Weights, contenders, ours
from tests.bench.moe_layer_verdicts import EINSUM, FLOOR, Result, growth, ratio, verdicts

SHAPES = {  # width, inner width, experts
    "small": (256, 512, 4),
    "stablelm": (2048, 5632, 4),
    "phi2": (2560, 10240, 4),  # with a gate it does not have: every shape here is gated
}
SLOW = 5.0  # seconds a pass, from which three rounds must do


def prove(device: str) -> list[str]:
    """Every contender gives our output and our gradient of the input, where nothing is dropped."""
    weights = Weights.draw(32, 48, 4, 0.7, device, torch.float32)
    x, r = sample(96, weights)
    reference = ours(weights)
    want = step(reference, x, r).detach()
    grad, router = x.grad.clone(), reference.router.weight.grad.clone()  # type: ignore[union-attr]
    shown = []
    for name, layer in contenders(weights, factor=4 / TOP_K):
        if name == FLOOR:
            continue
        clean(layer, x)
        got = step(layer, x, r)
        for a, b in ((got, want), (x.grad, grad)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        shown.append(name)
    # The reference's own rules, drops included.
    for factor in (CAPACITY, 0.6):
        mine = ours(weights, rules="moe_llava", capacity_factor=factor)
        theirs = Einsum(weights, factor)
        results = []
        for layer in (mine, theirs):
            clean(layer, x)
            results.append((step(layer, x, r).detach(), x.grad.clone()))  # type: ignore[union-attr]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.router.weight.grad, theirs.router.grad, rtol=1e-3, atol=1e-4)
    assert router.abs().sum() > 0
    return shown


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def ceiling(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a plain large matrix product."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
    best = float("inf")
    for _ in range(5):
        start = clock(device)
        for _ in range(4):
            a @ b
        best = min(best, (clock(device) - start) / 4)
    return 2 * size**3 / best


def measure(
    shape: str, tokens: int, skew: float, rounds: int, device: str, dtype: torch.dtype, held: float
) -> Result:
    """One row a contender: seconds of its rounds, peak memory, executed over useful FLOPs.

    `held`: how many [S, E, C] the einsum holds, by which what it needs is known beforehand.
    """
    weights = Weights.draw(*SHAPES[shape], skew, device, dtype)
    x, r = sample(tokens, weights)
    layers = dict(contenders(weights, CAPACITY))
    needs, free = held * one_hot_bytes(tokens, len(weights.router)), room(device)
    left_out = {}
    if needs > free:
        del layers[EINSUM]
        left_out[EINSUM] = (
            f"needs {needs / 2**30:.1f} GiB ({held:.1f} tensors of {needs / held / 2**30:.1f} GiB at once); "
            f"{max(free, 0) / 2**30:.1f} GiB may be used here"
        )
    names = list(layers)
    times: dict[str, list[float]] = {name: [] for name in names}
    slow: set[str] = set()
    for turn in range(rounds + 1):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            if name in slow and turn > 3:
                continue
            clean(layers[name], x)
            start = clock(device)
            step(layers[name], x, r)
            spent = clock(device) - start
            if turn:  # the first round warms up
                times[name].append(spent)
            elif spent > SLOW:
                slow.add(name)
            clean(layers[name], x)
    memory = Memory(device)
    rows = {}
    for name in names:
        rows[name] = {
            "seconds": times[name],
            "tflops": useful(tokens, weights) / min(times[name]) / 1e12,
            "peak_mb": memory.peak(layers[name], x, r) / 2**20,
            "executed": executed(layers[name], min(tokens, 4096), weights) if device == "cpu" else None,
        }
        clean(layers[name], x)
    return {"shape": shape, "tokens": tokens, "skew": skew, "rows": rows, "left_out": left_out}


def table(result: Result, top: float) -> str:
    """The rows of one size; `top`: FLOP/s of a plain product."""
    rows = result["rows"]
    lines = [
        f"\n{result['shape']} {SHAPES[result['shape']]}, {result['tokens']} tokens, skew {result['skew']:g}",
        f"{'':18}{'ms':>9}{'x floor':>9}{'TFLOP/s':>9}{'ceiling':>9}{'peak MB':>9}  executed",
    ]
    for name, row in rows.items():
        lines.append(
            f"{name:18}{1e3 * statistics.median(row['seconds']):9.1f}"
            f"{ratio(row['seconds'], rows[FLOOR]['seconds'])[0]:9.2f}{row['tflops']:9.3f}"
            f"{row['tflops'] * 1e12 / top:9.0%}{row['peak_mb']:9.0f}"
            + (f"{row['executed']:10.3f}" if row["executed"] else "")
        )
    lines += [f"{name:18}{words}" for name, words in result["left_out"].items()]
    return "\n".join(lines)


def joined(
    path: Path | None, results: list[Result], rest: dict[str, Any]
) -> tuple[list[Result], dict[str, Any]]:
    """With what an earlier call left in the file; the file then holds all."""
    if path is None:
        return results, rest
    before = json.loads(path.read_text()) if path.exists() else {"results": []}
    key = ("shape", "tokens", "skew")
    new = {tuple(r[k] for k in key) for r in results}
    together = [r for r in before.pop("results") if tuple(r[k] for k in key) not in new] + results
    rest = before | {k: v for k, v in rest.items() if v}
    path.write_text(json.dumps({**rest, "results": together}))
    return together, rest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--tokens", type=int, action="append", help="default: 1k to 64k")
    parser.add_argument("--skew", type=float, action="append", help="Zipf exponent; default 0 and 1")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="add to this file's results")
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    print("equal, outputs and gradients:", ", ".join(prove(given.device)))
    top, held = ceiling(given.device, dtype), one_hots(given.device, dtype)
    load = os.getloadavg()[0]
    print(
        f"torch {torch.__version__}, {given.device}, {dtype}; load {load:.1f}; "
        f"matmul ceiling {top / 1e12:.3f} TFLOP/s"
    )
    results = []
    for shape in given.shape or ["small"]:
        for tokens in given.tokens or [1024 << n for n in range(7)]:
            for skew in given.skew or [0.0, 1.0]:
                result = measure(shape, tokens, skew, given.rounds, given.device, dtype, held)
                print(table(result, top), flush=True)
                results.append(result)
                joined(given.json, results, {"ceiling": top})
    rest = {"ceiling": top, "bytes": exchange() if given.device == "cpu" else {}}
    results, rest = joined(given.json, results, rest)
    print("\n" + "\n".join(growth(results) + verdicts(results, rest["bytes"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
