"""What the rounds of `moe_layer.py` say: ratios, growth, and which goals are met.

A ratio is the median of the rounds' own ratios, with a bootstrapped 95 % interval. A goal counts as missed only when
the interval's better end misses it too; in between it is open.
"""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

FLOOR, OURS, EINSUM = "dense floor", "ours, torch", "einsum (0.9.5)"
NOT_PEERS = (FLOOR, OURS, "ours, tutel")
GOALS = {"dense floor": 1.10, "best peer": 1.0, "executed/useful": 1.05, "bytes/ideal": 1.05, "memory": 1.05}
EINSUM_GOALS = {8192: 3.0, 16384: 5.0, 32768: 8.0}

Result = dict[str, Any]  # of one shape, number of tokens and skew: `rows`, and `left_out` in words
Ratio = tuple[float, float, float]  # median, and where 95 % of resampled medians lie


def ratio(a: list[float], b: list[float], draws: int = 1000) -> Ratio:
    """Of seconds of the same rounds; where one contender ran in fewer, of those."""
    each = [x / y for x, y in zip(a, b, strict=False)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(each, k=len(each))) for _ in range(draws))
    return statistics.median(each), medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]


def slope(points: list[tuple[float, float]]) -> float:
    """The exponent n of y = c x^n, by least squares of the logarithms."""
    xs, ys = ([math.log(point[i]) for point in points] for i in (0, 1))
    return statistics.linear_regression(xs, ys).slope


def growth(results: list[Result]) -> list[str]:
    """How time and peak memory grow with the number of tokens: 1 is linear."""
    said = []
    for shape, skew in sorted({(r["shape"], r["skew"]) for r in results}):
        alike = sorted(
            (r for r in results if (r["shape"], r["skew"]) == (shape, skew)), key=lambda r: r["tokens"]
        )
        for name in dict.fromkeys(name for r in alike for name in r["rows"]):
            found = [r for r in alike if name in r["rows"]]
            if len(found) < 2:
                continue
            exponents = [
                slope([(r["tokens"], of(r["rows"][name])) for r in found])
                for of in (lambda row: statistics.median(row["seconds"]), lambda row: row["peak_mb"])
            ]
            first, last = found[0]["tokens"], found[-1]["tokens"]
            said.append(
                f"{shape}, skew {skew:g}, {first} to {last} tokens: {name:16} time ~ tokens^{exponents[0]:.2f}, "
                f"peak memory ~ tokens^{exponents[1]:.2f}"
            )
    return said


def einsum_seconds(result: Result, results: list[Result]) -> tuple[str, float] | None:
    """The einsum's time where its memory is not there: a n + b n^2 through its two largest sizes."""
    alike = {
        r["tokens"]: statistics.median(r["rows"][EINSUM]["seconds"])
        for r in results
        if (r["shape"], r["skew"]) == (result["shape"], result["skew"]) and EINSUM in r["rows"]
    }
    if len(alike) < 2:
        return None
    small, large = sorted(alike)[-2:]
    square = (alike[large] / large - alike[small] / small) / (large - small)
    linear = alike[large] / large - square * large
    tokens = result["tokens"]
    words = f" (EXTRAPOLATED from {small} and {large} tokens as a n + b n^2)"
    return words, linear * tokens + square * tokens**2


def verdicts(results: list[Result], bytes_ratio: dict[str, float]) -> list[str]:
    """What of the goals is met, in words."""
    said = []

    def judge(where: str, found: Ratio, what: str, goal: float, sign: int = 1) -> None:
        median, low, high = found
        better = low if sign > 0 else high
        met = "met" if sign * median <= sign * goal else "open" if sign * better <= sign * goal else "MISSED"
        said.append(f"{met:6} {where}: {median:.2f} [{low:.2f}, {high:.2f}] {what} (goal {goal:g})")

    for result in sorted(results, key=lambda r: (r["shape"], r["skew"], r["tokens"])):
        rows, tokens = result["rows"], result["tokens"]
        mine = rows[OURS]
        where = f"{result['shape']}, skew {result['skew']:g}, {tokens} tokens"
        peers = {
            name: statistics.median(row["seconds"]) for name, row in rows.items() if name not in NOT_PEERS
        }
        best = min(peers, key=lambda name: peers[name])
        against = ratio(mine["seconds"], rows[best]["seconds"])
        judge(where, against, f"of the best peer's time, {best}", GOALS["best peer"])
        if tokens >= 16384:
            floor = ratio(mine["seconds"], rows[FLOOR]["seconds"])
            judge(where, floor, "of the dense floor's time", GOALS[FLOOR])
        if mine["executed"]:
            judge(where, (mine["executed"],) * 3, "executed over useful FLOPs", GOALS["executed/useful"])
        if tokens in EINSUM_GOALS and EINSUM in rows:
            faster = ratio(rows[EINSUM]["seconds"], mine["seconds"])
            judge(where, faster, "times the einsum's speed", EINSUM_GOALS[tokens], -1)
        elif tokens in EINSUM_GOALS and (einsum := einsum_seconds(result, results)):
            value = einsum[1] / statistics.median(mine["seconds"])
            judge(where, (value,) * 3, f"times the einsum's speed{einsum[0]}", EINSUM_GOALS[tokens], -1)
    for shape, skew in sorted({(r["shape"], r["skew"]) for r in results}):
        points = [
            (r["tokens"], r["rows"][OURS]["peak_mb"])
            for r in results
            if (r["shape"], r["skew"]) == (shape, skew)
        ]
        if len(points) > 2:
            judge(
                f"{shape}, skew {skew:g}", (slope(points),) * 3, "as exponent of our memory", GOALS["memory"]
            )
    for name, value in bytes_ratio.items():
        met = "met" if value <= GOALS["bytes/ideal"] else "MISSED" if name.startswith("torch") else "(tutel)"
        said.append(f"{met:6} all-to-all bytes over ideal, {name}: {value:.3f} (goal {GOALS['bytes/ideal']})")
    return said
