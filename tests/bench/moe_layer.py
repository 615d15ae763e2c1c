"""One MoE layer, forward and backward, against all others: time, memory, FLOPs, bytes sent.

    python tests/bench/moe_layer.py                      # CPU, fp32, one thread
    python tests/bench/moe_layer.py --device cuda --shape phi2 --shape stablelm

First every contender is shown to compute the same, outputs and gradients: a fast wrong path cannot win. Then
all run in turn, in another order each round; a ratio is the median of the rounds' ratios. On a CPU the clock
counts processor time, so that other programs do not matter much; FLOPs are counted, not derived.
"""

from __future__ import annotations

import argparse
import ctypes
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
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.bench.moe_layer_peers import TOP_K, Einsum, Weights, contenders, ours

SHAPES = {  # width, inner width, experts
    "small": (256, 512, 4),
    "stablelm": (2048, 5632, 4),
    "phi2": (2560, 10240, 4),  # with a gate it does not have: every shape here is gated
}
CAPACITY = 1.5  # MoE-LLaVA's
GOALS = {"dense floor": 1.10, "best peer": 1.0, "executed/useful": 1.05, "bytes/ideal": 1.05}
EINSUM_GOALS = {8192: 3.0, 16384: 5.0, 32768: 8.0}


def grouped_flops(a: Any, b: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    """Rows x in x out x 2, in either direction of torch's grouped product."""
    rows, inner = (a.shape[0], a.shape[1]) if hasattr(a, "shape") else (a[0], a[1])
    other = b.shape if hasattr(b, "shape") else b
    return 2 * int(rows) * int(inner) * int(other[-1])


def added_flops(_: Any, a: Any, b: Any, *__: Any, out_val: Any = None, **___: Any) -> int:
    """As of addmm, in place."""
    return grouped_flops(a, b)


COUNTED = {torch.ops.aten._grouped_mm: grouped_flops, torch.ops.aten.addmm_: added_flops}


def sample(tokens: int, weights: Weights) -> tuple[Tensor, Tensor]:
    """(x, what the output is multiplied with)."""
    draw = torch.Generator().manual_seed(1)
    shape = (tokens, weights.router.shape[1])
    x, r = (torch.randn(shape, generator=draw) for _ in range(2))
    x[:, 0] = 1  # carries the skew
    place = {"device": weights.router.device, "dtype": weights.router.dtype}
    return x.to(**place).requires_grad_(), r.to(**place)


def step(layer: nn.Module, x: Tensor, r: Tensor) -> Tensor:
    y: Tensor = layer(x)
    y.backward(r)
    return y


def clean(layer: nn.Module, x: Tensor) -> None:
    x.grad = None
    layer.zero_grad(set_to_none=True)


def prove(device: str) -> list[str]:
    """Every contender gives our output and our gradient of the input, where nothing is dropped."""
    weights = Weights.draw(32, 48, 4, 0.7, device, torch.float32)
    x, r = sample(96, weights)
    reference = ours(weights)
    want = step(reference, x, r).detach()
    grad, router = x.grad.clone(), reference.router.weight.grad.clone()  # type: ignore[union-attr]
    shown = []
    for name, layer in contenders(weights, factor=4 / TOP_K):
        if name == "dense floor":
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


def useful(tokens: int, weights: Weights) -> int:
    """FLOPs of the chosen experts alone: three products forward, twice that backward."""
    _, inner, width = weights.gate.shape
    return 3 * 3 * 2 * tokens * TOP_K * inner * width


def executed(layer: nn.Module, tokens: int, weights: Weights) -> float:
    """Counted FLOPs over useful ones, the router's own left out of neither."""
    x, r = sample(tokens, weights)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        step(layer, x, r)
    clean(layer, x)
    return counter.get_total_flops() / useful(tokens, weights)


class Memory:
    """Peak bytes above what was held before."""

    def __init__(self, device: str) -> None:
        self.device = device

    def peak(self, layer: nn.Module, x: Tensor, r: Tensor) -> int:
        clean(layer, x)
        ctypes.CDLL(None).malloc_trim(0)
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(layer, x, r)
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        Path("/proc/self/clear_refs").write_text("5")
        before = self._status("VmRSS")
        step(layer, x, r)
        return self._status("VmHWM") - before

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def room(device: str) -> int:
    """Bytes one contender may take."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] * 0.9)
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")) // 2


def fits(name: str, tokens: int, experts: int, device: str) -> bool:
    """Some four [S, E, C] tensors of fp32 live at once in the einsum's backward pass."""
    if not name.startswith("einsum"):
        return True
    places = -(-tokens * TOP_K * CAPACITY // experts)
    return 4 * 4 * tokens * experts * places <= room(device)


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
    shape: str, tokens: int, skew: float, rounds: int, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """One row a contender: milliseconds, ratio to the floor, peak memory, executed over useful."""
    weights = Weights.draw(*SHAPES[shape], skew, device, dtype)
    x, r = sample(tokens, weights)
    layers = {
        name: layer
        for name, layer in contenders(weights, CAPACITY)
        if fits(name, tokens, len(weights.router), device)
    }
    names = list(layers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            clean(layers[name], x)
            start = clock(device)
            step(layers[name], x, r)
            spent = clock(device) - start
            if turn:  # the first round warms up
                times[name].append(spent)
            clean(layers[name], x)
    memory = Memory(device)
    rows = {}
    for name in names:
        ratio = statistics.median(a / b for a, b in zip(times[name], times["dense floor"], strict=True))
        best = min(times[name])
        rows[name] = {
            "ms": 1e3 * statistics.median(times[name]),
            "to_floor": ratio,
            "tflops": useful(tokens, weights) / best / 1e12,
            "peak_mb": memory.peak(layers[name], x, r) / 2**20,
            "executed": executed(layers[name], min(tokens, 4096), weights) if device == "cpu" else None,
        }
        clean(layers[name], x)
    return {"shape": shape, "tokens": tokens, "skew": skew, "rows": rows}


# ------------------------------------------------------------------ bytes sent


def sent(dispatcher: str, skew: float) -> tuple[int, int]:
    """(bytes this rank sent to others in one forward and backward pass, the least that would do)."""
    import torch.distributed as dist

    from moe.dispatch import choose
    from moe.experts import Experts
    from moe.layer import MoELayer
    from moe.parallel import Groups

    groups = Groups.create(4)
    weights = Weights.draw(64, 96, 4, skew, "cpu", torch.float32)
    layer = ours(weights)
    mine = slice(groups.rank, groups.rank + 1)
    stacked = {name: getattr(weights, name)[mine].clone() for name in ("gate", "up", "down")}
    layer = MoELayer(0, layer.router, Experts(stacked, torch.nn.functional.silu), choose(dispatcher, groups))
    torch.manual_seed(groups.rank)
    x = torch.randn(500 + 300 * groups.rank, 64)  # as many tokens as its samples have
    x[:, 0] = 1
    x.requires_grad_()
    real, counted = dist.all_to_all_single, [0]

    def counting(output: Tensor, given: Tensor, out: Any = None, splits: Any = None, **how: Any) -> Any:
        row = given.element_size() * (given.numel() // max(len(given), 1))
        parts = splits or [len(given) // groups.world] * groups.world
        counted[0] += row * (sum(parts) - parts[groups.rank])
        return real(output, given, out, splits, **how)

    dist.all_to_all_single = counting  # type: ignore[assignment]
    y = layer(x)
    y.backward(torch.ones_like(y))
    routing, _ = layer.router(x)
    foreign = int((routing.expert_TK != groups.rank).sum())
    came = torch.tensor([int((routing.expert_TK == rank).sum()) for rank in range(4)])
    came[groups.rank] = 0
    dist.all_reduce(came)
    # There in the forward pass, back in it, and the same again for gradients.
    return counted[0], 4 * 64 * (2 * foreign + 2 * int(came[groups.rank]))


def exchange() -> dict[str, float]:
    """Bytes sent over the least possible: four ranks, an expert each, unequal numbers of tokens."""
    from tests.ranks import ranks

    found = {}
    names = ["torch"] + (["tutel"] if __import__("importlib").util.find_spec("tutel") else [])
    for name in names:
        for skew in (0.0, 1.0):
            each = ranks(4)(sent, name, skew)
            found[f"{name}, skew {skew:g}"] = sum(s for s, _ in each) / sum(i for _, i in each)
    return found


# ------------------------------------------------------------------ the table


def einsum_ms(result: dict[str, Any], results: list[dict[str, Any]]) -> tuple[str, float] | None:
    """The einsum's time: measured, or where its memory is not there, from 4k and 8k by a n + b n^2, and said so."""
    if "einsum (0.9.5)" in result["rows"]:
        return "", result["rows"]["einsum (0.9.5)"]["ms"]
    alike = {
        r["tokens"]: r["rows"]["einsum (0.9.5)"]["ms"]
        for r in results
        if (r["shape"], r["skew"]) == (result["shape"], result["skew"]) and "einsum (0.9.5)" in r["rows"]
    }
    if not {4096, 8192} <= alike.keys():
        return None
    square = (alike[8192] / 8192 - alike[4096] / 4096) / 4096
    linear = alike[8192] / 8192 - square * 8192
    tokens = result["tokens"]
    return " (EXTRAPOLATED from 4k and 8k as a n + b n^2)", linear * tokens + square * tokens**2


def verdicts(results: list[dict[str, Any]], bytes_ratio: dict[str, float]) -> list[str]:
    """What of the goals is met, in words."""
    said = []
    for result in results:
        rows, tokens = result["rows"], result["tokens"]
        mine = rows["ours, torch"]
        where = f"{result['shape']}, {tokens} tokens, skew {result['skew']:g}"
        peers = {
            n: v["ms"] for n, v in rows.items() if n not in ("dense floor", "ours, torch", "ours, tutel")
        }
        best = min(peers, key=lambda n: peers[n])
        goals = [("of the best peer, " + best, mine["ms"] / peers[best], GOALS["best peer"], 1)]
        if tokens >= 16384:
            goals.append(("of the dense floor", mine["to_floor"], GOALS["dense floor"], 1))
        if mine["executed"]:
            goals.append(("executed over useful FLOPs", mine["executed"], GOALS["executed/useful"], 1))
        if tokens in EINSUM_GOALS and (einsum := einsum_ms(result, results)):
            how, spent = einsum
            goals.append((f"times the einsum's speed{how}", spent / mine["ms"], EINSUM_GOALS[tokens], -1))
        for what, value, goal, sign in goals:
            met = "met" if sign * value <= sign * goal else "MISSED"
            said.append(f"{met:6} {where}: {value:.2f} {what} (goal {goal:g})")
    for name, value in bytes_ratio.items():
        met = "met" if value <= GOALS["bytes/ideal"] else "MISSED" if name.startswith("torch") else "(tutel)"
        said.append(f"{met:6} all-to-all bytes over ideal, {name}: {value:.3f} (goal {GOALS['bytes/ideal']})")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--tokens", type=int, action="append", help="default: 1k to 64k")
    parser.add_argument("--skew", type=float, action="append", help="Zipf exponent; default 0 and 1")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    print("equal, outputs and gradients:", ", ".join(prove(given.device)))
    top = ceiling(given.device, dtype)
    load = os.getloadavg()[0]
    print(
        f"torch {torch.__version__}, {given.device}, {dtype}; load {load:.1f}; "
        f"matmul ceiling {top / 1e12:.3f} TFLOP/s"
    )
    results = []
    for shape in given.shape or ["small"]:
        for tokens in given.tokens or [1024 << n for n in range(7)]:
            for skew in given.skew or [0.0, 1.0]:
                result = measure(shape, tokens, skew, given.rounds, given.device, dtype)
                results.append(result)
                print(f"\n{shape} {SHAPES[shape]}, {tokens} tokens, skew {skew:g}")
                print(f"{'':18}{'ms':>9}{'x floor':>9}{'TFLOP/s':>9}{'ceiling':>9}{'peak MB':>9}  executed")
                for name, row in result["rows"].items():
                    done = f"{row['executed']:10.3f}" if row["executed"] else f"{'':10}"
                    share = row["tflops"] * 1e12 / top
                    print(
                        f"{name:18}{row['ms']:9.1f}{row['to_floor']:9.2f}{row['tflops']:9.3f}{share:9.0%}"
                        f"{row['peak_mb']:9.0f}{done}",
                        flush=True,
                    )
    ratios = exchange() if given.device == "cpu" else {}
    said = verdicts(results, ratios)
    print("\n" + "\n".join(said))
    if given.json:
        given.json.write_text(json.dumps({"ceiling": top, "results": results, "bytes": ratios}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
