"""Dense FFNs into sparse layers whose experts are copies: the sparse model starts as its dense parent."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from moe.dispatch import choose
from moe.experts import Experts
from moe.layer import MoELayer, announce
from moe.parallel import Groups
from moe.router import Router
from moe.spec import MoESpec
from moe.vlm import VLM


class UpcycleError(ValueError):
    """A model that cannot be made sparse as asked, in words."""


def sparse_layers(layers: str | tuple[int, ...], count: int) -> tuple[int, ...]:
    """The decoder layers that become sparse (moellava, initialize_moe_modules).

    Raises UpcycleError for a layer that is not there.
    """
    named = {
        "first_half": range(count // 2),
        "second_half": range(count // 2, count),
        "sparse": range(0, count, 2),
        "dense": range(count),
    }
    chosen = tuple(named[layers]) if isinstance(layers, str) else tuple(sorted(set(layers)))
    wrong = [index for index in chosen if not 0 <= index < count]
    if wrong or not chosen:
        raise UpcycleError(
            f"moe.layers names layer {wrong or 'none'}, but the model has layers 0 to {count - 1}"
        )
    return chosen


def upcycle(vlm: VLM, spec: MoESpec, groups: Groups, seed: int) -> None:
    """Replace FFNs in place, in the dtype they have; every rank calls it with equal arguments.

    Under the rules `moe_llava` a model of attention `auto` goes on with SDPA.

    Gates are drawn from (seed, layer), equal on all ranks; each rank keeps its own experts only. Raises
    UpcycleError when layers, experts and ranks do not fit, DispatchError for a dispatcher not installed.
    """
    if vlm.moe is not None:
        raise UpcycleError("the model is sparse already; start the moe stage from a dense one")
    if spec.rules == "moe_llava" and vlm.language.config._attn_implementation.startswith("flash"):
        # See moe.vlm: to flash-attn padding is zeros, and under these rules padding is routed.
        if vlm.spec.attention == "flash":
            raise UpcycleError(
                "moe.rules is moe_llava, under which padding is routed, and model.attention is flash, which "
                "makes zeros of padding: experts would fill up with other tokens than the reference's; "
                "set model.attention=auto or moe.rules=default"
            )
        vlm.language.set_attn_implementation("sdpa")
    layers = vlm.layers()
    chosen = sparse_layers(spec.layers, len(layers))
    numbers = (
        spec.experts_per_layer * len(chosen) if len(spec.experts_per_layer) == 1 else spec.experts_per_layer
    )
    if len(numbers) != len(chosen):
        raise UpcycleError(
            f"moe.experts names {len(numbers)} numbers of experts, but moe.layers={spec.layers} makes "
            f"{len(chosen)} layers sparse; give one number for all of them, or one each"
        )
    for number in numbers:
        if number % groups.expert_parallel:
            raise UpcycleError(
                f"moe.experts ({number}) must be a multiple of moe.expert_parallel ({groups.expert_parallel})"
            )
    spread = spec.overlap > 1 and groups.expert_parallel > 1
    dispatcher = choose("torch" if spread else spec.dispatcher, groups)
    for index, number in zip(chosen, numbers, strict=True):
        held = number // groups.expert_parallel
        sparse = _layer(vlm, index, number, groups.expert_rank * held, held, spec, seed, dispatcher)
        if spread:
            sparse.groups, sparse.pieces = groups, spec.overlap
        layers[index].mlp = sparse
    for layer in layers:
        announce(layer)
    vlm.moe, vlm.groups = spec, groups


def _layer(
    vlm: VLM, index: int, total: int, offset: int, held: int, spec: MoESpec, seed: int, dispatcher: object
) -> MoELayer:
    dense = cast(nn.Module, vlm.layers()[index].mlp)
    first = next(dense.parameters())
    width = vlm.language.config.hidden_size
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    router = Router(width, total, spec, generator).to(first.device, first.dtype)
    coefficient = None
    if spec.residual:
        coefficient = nn.Linear(width, 2)
        for parameter in coefficient.parameters():
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator=generator)
        coefficient.to(first.device, first.dtype)
    return MoELayer(
        index,
        router,
        Experts.of(dense, total, offset, held, vlm.lora),
        dispatcher,  # type: ignore[arg-type]
        dense if spec.residual else None,
        coefficient,
    )
