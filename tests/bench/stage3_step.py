"""A whole step of stage moe, from a micro-batch on the host to updated weights: ours against the reference's.

    python tests/bench/stage3_step.py                                                       # CPU, tiny, a minute
    python tests/bench/stage3_step.py --device cuda --shape stablelm --shape phi2 --minutes 9

The model is the stage's own with random weights, in the stage's engine (DeepSpeed, ZeRO 2, one process), on samples
long as the 665k mix's. All take the same samples with the same weights: ours in packed sequences, ours in padded
batches of eight, the reference's step told again (padding routed, capacity 1.5, the einsum dispatch, activations
computed twice, logits of every position, eager attention), and transformers 5's way with experts (padding routed,
nothing dropped, rows picked, grouped products, added back; activations computed twice, logits of every position).
First it is shown that they compute the same loss and gradient. Then all run in turn, in another order each round; a
ratio is the median of the rounds' ratios. MFU counts real tokens and what the mathematics needs (moe/flops.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch.utils.flop_counter import FlopCounterMode

from moe.engine import Engine
from moe.flops import Work, peak
from tests.bench.moe_layer import ceiling, clock
from tests.bench.moe_layer_verdicts import ratio
from tests.bench.stage3_counts import ATTENTION, Split, split
from tests.bench.stage3_parts import (
    FIVE,
    MOE,
    PACKED,
    PADDED,
    SHAPES,
    THEIRS,
    WAYS,
    Samples,
    Way,
    engine,
    memory,
    samples,
    taking,
)

GOALS = {"mfu": 0.5, "grouped": 0.8, "executed": 1.05, THEIRS: 5.0, FIVE: 1.8}
TOKENS = {"tiny": 1024, "stablelm": 16384, "phi2": 16384}
Result = dict[str, Any]


def prove(device: str) -> str:
    """Loss and gradient agree where the mathematics is the same; the rest of the file only takes times."""
    held, given = engine("tiny", device), samples("tiny", 1024, 1)
    held.vlm.moe = replace(MOE, aux_loss=0.0)  # it is a batch's, and batches differ
    plain = [replace(way, factor=4 / 2) for way in WAYS]  # nothing dropped
    found = [told(way, held, given) for way in plain]
    rough = 3e-2 if device == "cuda" else 1e-4
    for way, (ce, norm) in zip(plain, found, strict=True):
        for got, want in ((ce, found[0][0]), (norm, found[0][1])):
            assert abs(got - want) <= rough * want, f"{way.name}: {got}, {PACKED}: {want}"
    # The reference's rules, drops included, as our own layer has them.
    theirs = next(way for way in WAYS if way.name == THEIRS)
    dropping = told(theirs, held, given)
    for layer in held.vlm.layers():
        if hasattr(layer.mlp, "router"):
            layer.mlp.router.spec = replace(MOE, rules="moe_llava", capacity_factor=1.5)
    ours = told(replace(theirs, moves=""), held, given)
    assert all(abs(a - b) <= rough * b for a, b in zip(dropping, ours, strict=True)), (dropping, ours)
    assert device == "cuda" or abs(dropping[0] - found[0][0]) > 1e-3, "nothing was dropped"
    return f"equal, loss {found[0][0]:.4f} and gradient norm {found[0][1]:.4f}; with drops {dropping[0]:.4f}"


def told(way: Way, held: Engine, given: Samples) -> tuple[float, float]:
    """Loss and gradient norm of a step."""
    with taking(way, held):
        seen = held.train_step(way.batches(given))
    return seen["ce"], seen["grad_norm"]


def executed(held: Engine, given: Samples, work: Work) -> dict[str, float]:
    """FLOPs counted over useful ones, by way."""
    shares = {}
    for way in WAYS:
        with taking(way, held), FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            held.train_step(way.batches(given))
        shares[way.name] = counter.get_total_flops() / given.useful(work)
    return shares


def ours_keeps(held: Engine, given: Samples, trained: int) -> bool:
    """Whether our ways can keep activations: what a quarter of a sequence leaves behind, times four, has room."""
    whole = given.packed[0]
    part = whole["input_ids"].shape[1] // 4
    short = {name: tensor[:, :part] for name, tensor in whole.items() if name != "pixel_values"}
    short["pixel_values"] = whole["pixel_values"][: int((short["input_ids"] == -200).sum())]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    output = held.vlm(**{name: tensor.to(held.device) for name, tensor in short.items()})
    kept = (torch.cuda.memory_allocated() - before) * whole["input_ids"].shape[1] / part
    del output
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] - 4 * trained  # gradients added up
    print(f"activations of a sequence: {kept / 2**30:.0f} GiB, room for {free / 2**30:.0f}")
    return 1.2 * kept < free


def measure(shape: str, tokens: int, sequences: int, rounds: int, device: str, until: float) -> Result:
    """One row a way: seconds of its rounds, peak memory, loss."""
    given = samples(shape, tokens, sequences)
    _, trained, _ = memory(shape)
    ways, left_out = {way.name: way for way in WAYS}, {}
    while True:
        held = engine(shape, device, sequences)
        work = Work.of(held.vlm, held.patches)  # type: ignore[arg-type]
        if device == "cuda" and not ours_keeps(held, given, trained):
            ways |= {name: replace(ways[name], recompute=True) for name in (PACKED, PADDED) if name in ways}
        at = ""
        try:
            rows: dict[str, Any] = {name: {"seconds": []} for name in ways}
            names = list(ways)
            for turn in range(rounds + 1):
                longest = sum(row["seconds"][-1] for row in rows.values() if row["seconds"])
                if turn > 1 and time.monotonic() + 1.5 * longest > until:
                    break
                for place in range(len(names)):
                    at = names[(place + turn) % len(names)]
                    rows[at] |= once(held, ways[at], given, device, rows[at]["seconds"], warm=turn > 0)
            facts = {
                "useful": given.useful(work),
                "samples": len(given.lengths),
                "positions": sum(given.lengths),
            }
            found = {"shape": shape, "tokens": tokens, "rows": rows, "left_out": left_out, **facts}
            found["recompute"] = ways[PACKED].recompute
            if shape == "tiny" and device == "cpu":
                found["executed"] = executed(held, given, work)
            if device == "cuda":
                with taking(ways[PACKED], held):
                    found["split"] = split(held, given.packed, MOE.top_k)
            return found
        except torch.OutOfMemoryError:
            if at in (PACKED, PADDED) and not ways[at].recompute:
                ways[at] = replace(ways[at], recompute=True)
            elif at == PACKED:
                raise
            else:
                left_out[at] = "does not fit into memory"
                del ways[at]
        del held  # what it was in the midst of is lost with it
        gc.collect()
        torch.cuda.empty_cache()


def once(
    held: Engine, way: Way, given: Samples, device: str, seconds: list[float], warm: bool
) -> dict[str, Any]:
    """A step; the first of each way is not counted."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with taking(way, held):
        start = clock(device)
        seen = held.train_step(way.batches(given))
        spent = clock(device) - start
    if warm:
        seconds.append(spent)
    top = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return {"seconds": seconds, "ce": seen["ce"], "padding": seen["padding"], "peak_gib": top}


def table(result: Result, top: float, most: float | None) -> str:
    """The rows of one shape; `top`: FLOP/s of a plain product, `most`: of the data sheet."""
    lines = [
        f"\n{result['shape']}, sequences of {result['tokens']}: {result['samples']} samples, {result['positions']} "
        f"positions, {result['useful'] / 1e12:.3g} TFLOP a step; activations of ours "
        f"{'computed twice' if result['recompute'] else 'kept'}",
        f"{'':18}{'ms':>9}{'tokens/s':>10}{'samples/s':>10}{'MFU':>7}{'ceiling':>9}{'GiB':>7}{'padding':>9}"
        f"{'loss':>9}  executed / useful",
    ]
    for name, row in result["rows"].items():
        spent = statistics.median(row["seconds"])
        rate = result["useful"] / spent
        lines.append(
            f"{name:18}{1e3 * spent:9.1f}{result['positions'] / spent:10.0f}{result['samples'] / spent:10.1f}"
            + (f"{rate / most:7.1%}" if most else f"{'':7}")
            + f"{rate / top:9.1%}{row['peak_gib']:7.1f}{row['padding']:9.1%}{row['ce']:9.4f}"
            + (f"{result['executed'][name]:9.2f}" if "executed" in result else "")
        )
    lines += [f"{name:18}{words}" for name, words in result["left_out"].items()]
    if "split" in result:
        lines.append(Split(**result["split"]).words(top))
    return "\n".join(lines)


def verdicts(result: Result, top: float, most: float | None) -> list[str]:
    """Which goals are met; those of time are an H200's, and elsewhere the figures alone are told."""
    said, rows = [], result["rows"]

    def judge(found: tuple[float, float, float], what: str, goal: float, sign: int, real: bool) -> None:
        median, low, high = found
        better = low if sign > 0 else high
        met = "met" if sign * median <= sign * goal else "open" if sign * better <= sign * goal else "MISSED"
        said.append(
            f"{met if real else '':6} {result['shape']}: {median:.3f} [{low:.3f}, {high:.3f}] {what}"
            + (f" (goal {goal:g})" if real else "")
        )

    mine = rows[PACKED]["seconds"]
    for name in (THEIRS, FIVE, PADDED):
        if name in rows:
            faster = ratio(rows[name]["seconds"], mine)
            judge(faster, f"times the speed: {name}", GOALS.get(name, 1.0), -1, bool(most) and name in GOALS)
    if "executed" in result:
        share = result["executed"][PACKED]
        judge((share,) * 3, "executed over useful FLOPs, ours packed", GOALS["executed"], 1, True)
    if most:
        mfu = [result["useful"] / spent / most for spent in mine]
        judge((statistics.median(mfu), min(mfu), max(mfu)), "MFU of real tokens", GOALS["mfu"], -1, True)
    if "split" in result:
        grouped = Split(**result["split"]).grouped_rate / top
        judge((grouped,) * 3, "of the matmul ceiling in grouped products", GOALS["grouped"], -1, True)
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--tokens", type=int, help="of a packed sequence; default 16384, tiny: 1024")
    parser.add_argument("--sequences", type=int, help="of a step; default 4, tiny: 1")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no round is begun")
    parser.add_argument("--json", type=Path, help="write the results there")
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    shapes = given.shape or ["tiny"]
    print(prove(given.device), flush=True)
    gc.collect()
    top = ceiling(given.device, torch.bfloat16 if given.device == "cuda" else torch.float32)
    name = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    print(
        f"torch {torch.__version__}, {name}; load {os.getloadavg()[0]:.1f}; matmul {top / 1e12:.3f} TFLOP/s"
    )
    results: list[Result] = []
    for place, shape in enumerate(shapes):
        parameters, trained, needs = memory(shape)
        print(
            f"{shape}: {parameters / 1e9:.2f} billion parameters, {trained / 1e9:.2f} trained; with gradients and "
            f"Adam's state in ZeRO 2 {needs / 2**30:.0f} GiB"
            + " (twice that in fp32)"
            * (given.device == "cpu")
        )
        if given.device == "cuda" and needs > 0.95 * torch.cuda.get_device_properties(0).total_memory:
            print(f"{shape}: does not fit into this device; nothing is measured")
            continue
        now = time.monotonic()
        until = now + (end - now) / (len(shapes) - place)
        tokens = given.tokens or TOKENS[shape]
        sequences = given.sequences or (1 if shape == "tiny" else 4)
        result = measure(shape, tokens, sequences, given.rounds, given.device, until)
        results.append(result)
        most = peak(name) if given.device == "cuda" else None
        print("\n".join([table(result, top, most), *verdicts(result, top, most)]), flush=True)
        if given.json:
            given.json.write_text(json.dumps({"device": name, "ceiling": top, "results": results}, indent=1))
        gc.collect()
        if given.device == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
