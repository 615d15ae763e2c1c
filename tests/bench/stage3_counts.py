"""What a step of `stage3_step.py` comes to besides time: FLOPs of attention on a CPU, and where a GPU's time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moe.engine import Engine
from moe.layer import MoELayer
from tests.bench.moe_layer_counts import COUNTED

KINDS = {  # by a part of a kernel's name, the first that fits
    "grouped matmul": ("grouped", "groupproblem"),
    "attention": ("flash", "fmha", "attention"),
    "other matmul": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
}
REST = "the rest"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def _attended(q: Sequence[int], k: Sequence[int], products: int, causal: bool) -> int:
    """Of the causal kernels the half that they compute."""
    batch, heads, rows, width = q
    whole = products * 2 * batch * heads * rows * k[2] * width
    return whole * (rows + 1) // (2 * rows) if causal else whole


def forward_flops(
    q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, *_: Any, **__: Any
) -> int:
    """torch's attention kernel for CPUs, which its counter leaves out."""
    return _attended(q, k, 2, causal)


def backward_flops(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dropout: float, causal: bool, *_: Any, **__: Any
) -> int:
    """Its scores once more are the kernel's own affair, as in torch's count of the others."""
    return _attended(q, k, 4, causal)


ATTENTION: dict[Any, Any] = {
    **COUNTED,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_flops,
}


@dataclass(frozen=True)
class Split:
    """A step's kernels: milliseconds by kind, FLOPs of grouped products, and how often the host waited."""

    milliseconds: dict[str, float]
    grouped_flops: float
    waits: dict[str, int]

    @property
    def grouped_rate(self) -> float:
        """FLOP/s in grouped products."""
        return self.grouped_flops / max(1e-9, self.milliseconds.get("grouped matmul", 0.0)) * 1e3

    def words(self, top: float) -> str:
        whole = sum(self.milliseconds.values()) or 1.0
        parts = ", ".join(f"{kind} {ms:.0f} ms ({ms / whole:.0%})" for kind, ms in self.milliseconds.items())
        waits = ", ".join(f"{count} {name}" for name, count in self.waits.items()) or "none"
        return (
            f"a packed step's kernels: {parts}; grouped products at {self.grouped_rate / 1e12:.0f} TFLOP/s, "
            f"{self.grouped_rate / top:.0%} of the ceiling; the host waited: {waits}"
        )


def kind(kernel: str) -> str:
    """Which of KINDS a kernel is."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), REST)


def split(held: Engine, micro_batches: Sequence[Mapping[str, Tensor]], top_k: int) -> dict[str, Any]:
    """A step under torch's profiler; the engine takes it as it is set."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (held.device.type == "cuda")
    with profile(activities=activities) as seen:
        measured = held.train_step(micro_batches)
    milliseconds = dict.fromkeys([*KINDS, REST], 0.0)
    waits: dict[str, int] = {}
    for event in seen.events():
        if event.device_type == DeviceType.CUDA:
            milliseconds[kind(event.name)] += event.time_range.elapsed_us() / 1e3
        elif event.name in WAITS:
            waits[event.name] = waits.get(event.name, 0) + 1
    sparse = [module for module in held.vlm.modules() if isinstance(module, MoELayer)]
    weights = sum(w[0].numel() for m in sparse for w in m.experts.parameters() if w.ndim > 2)
    passes = 8 if held.vlm.language.is_gradient_checkpointing else 6  # type: ignore[union-attr]
    found = Split(milliseconds, passes * top_k * weights * float(measured["positions"]), waits)
    return asdict(found)
