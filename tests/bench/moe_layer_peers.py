"""MoE layers to compare ours with: one set of weights, built into each library's own layer.

Every contender is top-2 of E gated experts with weights that sum to one, without dropping; those that know
only capacity get one that drops nothing where equality is shown, and MoE-LLaVA's 1.5 where time is taken.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.dispatch import choose
from moe.experts import Experts, mark
from moe.layer import MoELayer
from moe.parallel import Groups
from moe.router import Router
from moe.spec import MoESpec

TOP_K = 2
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Weights:
    """`router` [E, D]; `gate`, `up` [E, H, D]; `down` [E, D, H]."""

    router: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    @staticmethod
    def draw(width: int, inner: int, experts: int, skew: float, device: str, dtype: torch.dtype) -> Weights:
        """`skew`: Zipf exponent of the experts' popularity; it comes in by the input's first column, ones."""
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw) * shape[-1] ** -0.5

        router = normal(experts, width)
        router[:, 0] = -skew * torch.arange(1, experts + 1).log()
        parts = (
            router,
            normal(experts, inner, width),
            normal(experts, inner, width),
            normal(experts, width, inner),
        )
        return Weights(*(part.to(device, dtype) for part in parts))


class FFN(nn.Module):
    """One gated expert, or the dense floor."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Parameter(w.clone()) for w in (gate, up, down))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


def ours(weights: Weights, dispatcher: str = "torch", **changes: Any) -> MoELayer:
    spec = MoESpec(experts=len(weights.router), top_k=TOP_K, **{"capacity_factor": 0.0, **changes})
    router = Router(weights.router.shape[1], len(weights.router), spec)
    router.weight = nn.Parameter(weights.router.clone())
    stacked = {"gate": weights.gate.clone(), "up": weights.up.clone(), "down": weights.down.clone()}
    experts = Experts(stacked, F.silu)
    for parameter in experts.parameters():
        mark(parameter, len(weights.router), 0)
    return MoELayer(0, router, experts, choose(dispatcher, Groups.single()))


class Einsum(nn.Module):
    """DeepSpeed 0.9.5's dispatch: a one-hot [S, E, C] multiplied with the tokens, there and back."""

    def __init__(self, weights: Weights, factor: float) -> None:
        super().__init__()
        self.router = nn.Parameter(weights.router.clone())
        self.factor = factor
        self.experts = nn.ModuleList(
            FFN(*each) for each in zip(weights.gate, weights.up, weights.down, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        def compute(queues: Tensor) -> Tensor:
            return torch.stack([expert(queue) for expert, queue in zip(self.experts, queues, strict=True)])

        return einsum(x, self.router, self.factor, compute)[0]


def einsum(
    x: Tensor, router: Tensor, factor: float, compute: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """(what the experts made of the tokens, each token's chances, its first choice as a one-hot)."""
    tokens, experts = len(x), len(router)
    places = math.ceil(tokens / experts * factor * TOP_K)
    chance = F.linear(x.float(), router.float()).softmax(-1)
    first = F.one_hot(chance.argmax(-1), experts)
    second = F.one_hot(chance.masked_fill(first.bool(), -1).argmax(-1), experts)
    place1 = (first.cumsum(0) - 1) * first
    place2 = (second.cumsum(0) - 1 + first.sum(0)) * second
    kept1, kept2 = first * (place1 < places), second * (place2 < places)
    weight1, weight2 = (chance * kept1).sum(1), (chance * kept2).sum(1)
    total = (weight1 + weight2).clamp(min=torch.finfo(torch.float32).eps)

    def spread(weight: Tensor, kept: Tensor, place: Tensor) -> Tensor:
        slot = F.one_hot((place * kept).sum(1), places).float()
        return torch.einsum("se,sc->sec", (weight / total)[:, None] * kept, slot)

    combine = spread(weight1, kept1, place1) + spread(weight2, kept2, place2)
    queues = torch.einsum("sec,sm->ecm", combine.bool().to(x.dtype), x)
    return torch.einsum("sec,ecm->sm", combine.to(x.dtype), compute(queues)), chance, first


class Loop(nn.Module):
    """What one writes first: for each expert, pick its tokens, add what it makes of them."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.router = nn.Parameter(weights.router.clone())
        self.experts = nn.ModuleList(
            FFN(*each) for each in zip(weights.gate, weights.up, weights.down, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        chance = F.linear(x.float(), self.router.float()).softmax(-1)
        weight, chosen = chance.topk(TOP_K, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, k = torch.where(chosen == number)
            out = out.index_add(0, token, expert(x[token]) * weight[token, k, None].to(x.dtype))
        return out


class Masked(nn.Module):
    """DeepSpeed's layer wants a mask of used tokens."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, None)  # type: ignore[no-any-return]


def deepspeed_layer(weights: Weights, factor: float) -> nn.Module:
    """DeepSpeed's own, without its random choices."""
    from deepspeed.moe.experts import Experts as TheirExperts
    from deepspeed.moe.sharded_moe import MOELayer, TopKGate

    count, width = weights.router.shape
    gate = TopKGate(
        width, count, k=TOP_K, capacity_factor=factor, min_capacity=0, top2_2nd_expert_sampling=False
    )
    experts = TheirExperts(FFN(weights.gate[0], weights.up[0], weights.down[0]), count, "bench")
    layer = MOELayer(gate, experts, "bench", 1, count)
    with torch.no_grad():
        gate.wg.weight.copy_(weights.router)
        for number, expert in enumerate(experts.deepspeed_experts):
            for name in ("gate", "up", "down"):
                getattr(expert, name).copy_(getattr(weights, name)[number])
    return Masked(layer.to(weights.router.device))


def tutel_layer(weights: Weights, factor: float) -> nn.Module:
    """tutel.moe.moe_layer with its experts as batched products."""
    from tutel import moe

    class Stack(nn.Module):
        def __init__(self, **_: Any) -> None:
            super().__init__()
            self.gate, self.up, self.down = (
                nn.Parameter(w.clone()) for w in (weights.gate, weights.up, weights.down)
            )

        def forward(self, x: Tensor, ctx: Any) -> Tensor:
            inner = F.silu(torch.bmm(x, self.gate.mT)) * torch.bmm(x, self.up.mT)
            return torch.bmm(inner, self.down.mT)

    layer = moe.moe_layer(
        gate_type={"type": "top", "k": TOP_K, "fp32_gate": True, "capacity_factor": factor},
        model_dim=weights.router.shape[1],
        experts={"type": "custom", "module": Stack, "num_experts_per_device": len(weights.router)},
    )
    layer.gates[0].wg.weight = nn.Parameter(weights.router.clone().float())
    return layer.to(weights.router.device)


class Grouped(nn.Module):
    """transformers 5: a Mixtral block over torch's grouped_mm."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        count, inner, width = weights.gate.shape
        config = MixtralConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_local_experts=count,
            num_experts_per_tok=TOP_K,
            experts_implementation="grouped_mm",
        )
        with torch.device(weights.router.device):
            self.block = MixtralSparseMoeBlock(config).to(weights.router.dtype)
        with torch.no_grad():
            self.block.gate.weight.copy_(weights.router)
            self.block.experts.gate_up_proj.copy_(torch.cat([weights.gate, weights.up], 1))
            self.block.experts.down_proj.copy_(weights.down)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x[None])[0]  # type: ignore[no-any-return]


class Floor(nn.Module):
    """A dense FFN over TOP_K times as many tokens: the same active FLOPs, and nothing moved."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.ffn = FFN(weights.gate[0], weights.up[0], weights.down[0])
        self.rows: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is None or len(self.rows) != TOP_K * len(x):  # once, in the round that warms up
            self.rows = x.detach().repeat(TOP_K, 1).requires_grad_()
        self.rows.grad = None
        # The sum is its only extra, a pass over the output.
        return self.ffn(self.rows).view(TOP_K, len(x), -1).sum(0)


def contenders(weights: Weights, factor: float) -> Iterator[tuple[str, nn.Module]]:
    """All that can run here; `factor` for those that know only capacity."""
    yield "dense floor", Floor(weights)
    yield "ours, torch", ours(weights)
    if importlib.util.find_spec("tutel"):
        yield "ours, tutel", ours(weights, "tutel")
    yield "einsum (0.9.5)", Einsum(weights, factor)
    if importlib.util.find_spec("deepspeed"):
        with quiet():
            yield "deepspeed", deepspeed_layer(weights, factor)
    if importlib.util.find_spec("tutel"):
        yield "tutel moe_layer", tutel_layer(weights, 0.0)
    yield "transformers", Grouped(weights)
    yield "loop", Loop(weights)


@contextmanager
def quiet() -> Iterator[None]:
    """Without DeepSpeed's word about accelerators."""
    import logging

    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
