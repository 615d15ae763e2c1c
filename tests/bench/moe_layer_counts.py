"""What a sparse layer's pass comes to besides time: FLOPs, peak memory, bytes sent.

FLOPs and bytes sent are counted, not derived, and do not depend on the machine; peak memory is the kernel's (or the
GPU's) own figure.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.bench.moe_layer_peers import TOP_K, Einsum, Weights, ours

CAPACITY = 1.5  # MoE-LLaVA's
LEFT = 8 * 2**30  # bytes of a CPU's memory that are left to other programs


def sample(tokens: int, weights: Weights) -> tuple[Tensor, Tensor]:
    """(x, what the output is multiplied with)."""
    draw = torch.Generator().manual_seed(1)
    shape = (tokens, weights.router.shape[1])
    x, r = (torch.randn(shape, generator=draw) for _ in range(2))
    x[:, 0] = 1  # carries the skew
    place = {"device": weights.router.device, "dtype": weights.router.dtype}
    return x.to(**place).requires_grad_(), r.to(**place)


def step(layer: nn.Module, x: Tensor, r: Tensor) -> Tensor:
    """Forward and backward."""
    y: Tensor = layer(x)
    y.backward(r)
    return y


def clean(layer: nn.Module, x: Tensor) -> None:
    """Let go of the gradients."""
    x.grad = None
    layer.zero_grad(set_to_none=True)


# ------------------------------------------------------------------ FLOPs


def grouped_flops(a: Any, b: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    """Rows x in x out x 2, in either direction of torch's grouped product."""
    rows, inner = (a.shape[0], a.shape[1]) if hasattr(a, "shape") else (a[0], a[1])
    other = b.shape if hasattr(b, "shape") else b
    return 2 * int(rows) * int(inner) * int(other[-1])


def added_flops(_: Any, a: Any, b: Any, *__: Any, out_val: Any = None, **___: Any) -> int:
    """As of addmm, in place."""
    return grouped_flops(a, b)


COUNTED = {torch.ops.aten._grouped_mm: grouped_flops, torch.ops.aten.addmm_: added_flops}


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


# ------------------------------------------------------------------ memory


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


def one_hots(device: str, dtype: torch.dtype, tokens: int = 4096, experts: int = 4) -> float:
    """How many fp32 tensors of [S, E, C] the einsum's layer holds at its peak: counted where they are small."""
    weights = Weights.draw(32, 32, experts, 0.0, device, dtype)
    layer = Einsum(weights, CAPACITY)
    x, r = sample(tokens, weights)
    step(layer, x, r)  # what is allocated once and stays
    return Memory(device).peak(layer, x, r) / one_hot_bytes(tokens, experts)


def one_hot_bytes(tokens: int, experts: int) -> int:
    """Of one [S, E, C] in fp32."""
    return 4 * tokens * experts * -(-int(tokens * TOP_K * CAPACITY) // experts)


def room(device: str) -> int:
    """Bytes one contender may take."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] * 0.9)
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return free - LEFT


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
    names = ["torch"] + (["tutel"] if importlib.util.find_spec("tutel") else [])
    for name in names:
        for skew in (0.0, 1.0):
            each = ranks(4)(sent, name, skew)
            found[f"{name}, skew {skew:g}"] = sum(s for s, _ in each) / sum(i for _, i in each)
    return found
