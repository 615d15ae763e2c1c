"""What `stage3_step.py` trains and on what: the model, the samples, and the ways to take a step on them.

All ways share one engine, one set of weights and one optimizer, whose rate is too small to change a weight: what
differs is how samples become batches, how a sparse layer moves its tokens, what is computed twice, and which
positions have logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.collate import collate, joined, segments
from data.index import Row
from data.packing import pack
from moe import parallel
from moe.backbones import vision
from moe.engine import Engine
from moe.flops import Work
from moe.layer import MoELayer
from moe.parallel import Groups
from moe.parts import parts
from moe.router import Report, Traffic
from moe.spec import ModelSpec, MoESpec, OptimSpec, TrainSpec
from moe.stages import STAGES
from moe.upcycle import sparse_layers, upcycle
from moe.vlm import IGNORE, IMAGE, VLM, build, train_only
from tests.bench.data_padding import PATCHES, lengths
from tests.bench.moe_layer_peers import TOP_K, einsum

TINY = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
SHAPES: dict[str, tuple[ModelSpec, int]] = {  # and the vocabulary
    "tiny": (
        ModelSpec(
            "stablelm",
            random=True,
            config={**TINY, "num_key_value_heads": 4},
            tower_config={**TOWER, "image_size": 84},
        ),
        1000,
    ),
    "stablelm": (ModelSpec("stablelm", random=True), 100352),
    "phi2": (ModelSpec("phi2", random=True), 51200),
}
MICRO = 8  # samples of a padded micro-batch: the reference's
RATE = 1e-12
MOE = MoESpec(experts=4, top_k=TOP_K, layers="sparse", capacity_factor=0.0, dispatcher="torch")


# ------------------------------------------------------------------ the model


@torch.no_grad()
def engine(shape: str, device: str, micro_batches: int = 1) -> Engine:
    """Stage moe's model with random weights, drawn where it trains, in DeepSpeed's ZeRO 2 as the stage has it."""
    parallel.start()
    spec, words = SHAPES[shape]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        vlm = build(spec, vocab_size=words, seed=0, dtype=dtype, filled=False)
    torch.manual_seed(0)
    spread = vlm.language.config.hidden_size**-0.5
    for name, parameter in vlm.named_parameters():
        if parameter.ndim > 1 or "class_embedding" in name:
            parameter.normal_(std=spread)
        else:
            parameter.fill_(float(name.endswith("weight")))
    upcycle(vlm, MOE, Groups.single(), seed=0)
    for name, parameter in vlm.named_parameters():
        if ".experts." in name:  # no longer copies of each other: a token at another's expert shows
            parameter.add_(torch.randn_like(parameter), alpha=spread)
    train_only(vlm, STAGES["moe"].trains)
    train = TrainSpec(
        global_batch=micro_batches,
        micro_batch=1,
        precision="bf16" if device == "cuda" else "fp32",
        recompute=False,
        optim=OptimSpec(lr=RATE, warmup=0.0, schedule="constant"),
    )
    with torch.enable_grad():
        return Engine(vlm, train, Groups.single(), total_steps=10**6, moe=MOE)


def memory(shape: str) -> tuple[int, int, int]:
    """(parameters, trained ones, bytes for them with gradients and Adam's state in ZeRO 2 on one GPU), on paper."""
    spec, words = SHAPES[shape]
    with torch.device("meta"):
        vlm = build(spec, vocab_size=words, seed=0, dtype=torch.bfloat16, filled=False)
    sparse = {f"layers.{i}." for i in sparse_layers(MOE.layers, len(vlm.layers()))}
    sizes = {name: parameter.numel() for name, parameter in vlm.named_parameters()}
    for name in parts(vlm)["ffn"]:
        if any(layer in name for layer in sparse):
            sizes[name] *= MOE.experts_per_layer[0]
    trained = sum(sizes[name] for part in ("projector", "ffn") for name in parts(vlm)[part])
    # bf16 weights of all; of the trained their fp32 copies, two averages, and fp32 gradients twice: added up over the
    # micro-batches, and once more laid end to end for the update.
    return sum(sizes.values()), trained, 2 * sum(sizes.values()) + (4 + 8 + 8) * trained


# ------------------------------------------------------------------ the samples


@dataclass(frozen=True)
class Samples:
    """The same samples as packed sequences and as padded batches; micro-batches of a step."""

    packed: list[dict[str, Tensor]]
    padded: list[dict[str, Tensor]]
    lengths: list[int]  # positions of each sample, patches counted
    images: int
    supervised: int

    def useful(self, work: Work) -> float:
        """FLOPs the mathematics needs: each sample attends to itself, its causal half."""
        pairs = sum(length * (length + 1) / 2 for length in self.lengths)
        return (
            sum(self.lengths) * work.position
            + pairs * work.pair
            + self.supervised * work.supervised
            + self.images * work.picture
        )


def samples(shape: str, tokens: int, sequences: int, seed: int = 0) -> Samples:
    """Enough samples, long as the 665k mix's, to fill `sequences` of `tokens`; smaller models have shorter ones."""
    spec, words = SHAPES[shape]
    sight = vision(spec)
    scale = PATCHES / sight.patches
    draw = np.random.default_rng(seed)
    found, signed = lengths(sequences * tokens // 100 + 200, seed)
    rows: list[Row] = []
    for length, word in zip(found.tolist(), signed.tolist(), strict=True):
        image = int(word > 0)
        text = max(6, int((length - image * (PATCHES - 1)) / scale)) + image
        ids = draw.integers(3, words, text)
        labels = np.where(np.arange(text) < text // 2, IGNORE, ids)
        if image:
            ids[1] = IMAGE
        rows.append(Row(ids, labels, [], [f"{len(rows)}"] * image))
    sizes = [len(row.input_ids) + len(row.images) * (sight.patches - 1) for row in rows]
    bins = pack(sizes, tokens)[:sequences]
    taken = sorted(at for members in bins for at in members)

    def batch(groups: list[list[int]], together: bool) -> dict[str, Tensor]:
        held = [[rows[at] for at in members] for members in groups]
        images = [int(name) for members in held for row in members for name in row.images]
        shape = (3, sight.size, sight.size)
        raw = [np.random.default_rng((seed, at)).integers(0, 256, shape, np.uint8) for at in images]
        pixels = torch.from_numpy(np.stack(raw)) if raw else torch.zeros(0, *shape, dtype=torch.uint8)
        made = collate([joined(members) for members in held], pixels, 0)
        return made | {"segments": segments(held)} if together else made

    starts = range(0, len(taken), MICRO)
    return Samples(
        packed=[batch([members], True) for members in bins],
        padded=[batch([[at] for at in taken[start : start + MICRO]], False) for start in starts],
        lengths=[sizes[at] for at in taken],
        images=sum(len(rows[at].images) for at in taken),
        supervised=sum(int((rows[at].labels[1:] != IGNORE).sum()) for at in taken),
    )


# ------------------------------------------------------------------ the ways


@dataclass(frozen=True)
class Way:
    """How a step is taken. `moves`: the sparse layer's way with tokens; empty: ours."""

    name: str
    packed: bool = False
    recompute: bool = False
    moves: str = ""  # einsum, index
    factor: float = 0.0  # capacity, of the einsum
    pads: bool = False  # padding is routed
    everything: bool = False  # logits of all positions, in fp32
    attention: str = ""

    def batches(self, given: Samples) -> list[dict[str, Tensor]]:
        return given.packed if self.packed else given.padded


PACKED, PADDED, THEIRS, FIVE = "ours, packed", "ours, padded", "the reference", "transformers 5's"
_OLD: Mapping[str, Any] = {"recompute": True, "pads": True, "everything": True}
WAYS = (
    Way(PACKED, packed=True),
    Way(PADDED),
    Way(THEIRS, moves="einsum", factor=1.5, attention="eager", **_OLD),
    Way(FIVE, moves="index", **_OLD),
)


@contextmanager
def taking(way: Way, held: Engine) -> Iterator[None]:
    """The engine takes steps that way."""
    vlm: VLM = held.vlm  # type: ignore[assignment]
    sparse = [module for module in vlm.modules() if isinstance(module, MoELayer)]
    before = vlm.moe, vlm.language.config._attn_implementation
    vlm.recompute(way.recompute)
    assert vlm.moe is not None
    vlm.moe = replace(vlm.moe, rules="moe_llava" if way.pads else "default")
    if way.attention:
        vlm.language.set_attn_implementation(way.attention)
    if way.everything:
        vlm.cross_entropy = partial(all_logits, vlm)  # type: ignore[method-assign]
    for layer in sparse if way.moves else ():
        layer._sparse = partial(moved, layer, way)  # type: ignore[method-assign]
    try:
        yield
    finally:
        vlm.moe = before[0]
        vlm.recompute(False)
        if way.attention:
            vlm.language.set_attn_implementation(before[1])
        for owner, name in ((vlm, "cross_entropy"), *((layer, "_sparse") for layer in sparse)):
            owner.__dict__.pop(name, None)


def moved(layer: MoELayer, way: Way, x: Tensor, traffic: Traffic | None) -> Tensor:
    """A sparse layer over our router's and experts' weights, as the others have it."""
    router, experts = layer.router.weight, layer.experts
    if way.moves == "einsum":
        # One product for all experts where the reference has a loop: no slower.
        y, chance, first = einsum(x, router, way.factor, lambda queues: experts(queues, None))
        chosen = first.sum(0)
    else:
        chance = F.linear(x.float(), router.float()).softmax(-1)
        weight, chosen_TK = chance.topk(TOP_K, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        order = chosen_TK.flatten().argsort(stable=True)
        load = F.one_hot(chosen_TK, len(router)).sum((0, 1))
        made = experts(x[order // TOP_K], load if x.is_cuda else load.tolist())
        made = made * weight.flatten()[order, None].to(made.dtype)
        y = torch.zeros_like(x).index_add(0, order // TOP_K, made)
        chosen = F.one_hot(chosen_TK[:, 0], len(router)).sum(0)
    if traffic is not None:
        none = chosen.new_zeros(())
        traffic.reports[layer.index] = Report(
            chance.sum(0), chosen, chosen, none, len(x), chance.new_zeros(())
        )
    return y


def all_logits(vlm: VLM, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy over the logits of every position, as transformers' models compute it."""
    wanted = labels[:, 1:].to(hidden.device).long()
    logits = vlm.head(hidden).float()[:, :-1]
    total = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE, reduction="sum")
    return total, (wanted != IGNORE).sum()
