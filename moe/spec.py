"""What a model, its experts and their training are set to.

Standard library only, so that a login node can read it. Each section checks what it can check alone:
`check()` yields `(field, what is wrong, hint)`. What only several can know is checked in `launch/spec.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

Complaint = tuple[str, str, str]


@dataclass(frozen=True)
class ModelSpec:
    backbone: str = "stablelm"  # a row of moe.backbones.LANGUAGE
    weights: str = ""  # hub name or folder; empty: the row's own
    random: bool = False  # build from the config below and load nothing
    config: Mapping[str, object] = field(default_factory=dict)  # changes to the row's config
    tokenizer: str = ""  # hub name, folder, or "train:512" (512 tokens, from the run's texts)
    tower: str = "clip-l-336"  # a row of moe.backbones.VISION
    tower_weights: str = ""
    tower_config: Mapping[str, object] = field(default_factory=dict)
    projector: str = "mlp2x_gelu"  # or linear, mlpNx_gelu
    attention: Literal["auto", "sdpa", "flash", "eager"] = "auto"

    def check(self) -> Iterator[Complaint]:
        from moe.backbones import LANGUAGE, VISION  # which reads this file

        for key, table in (("backbone", list(LANGUAGE)), ("tower", list(VISION))):
            if (name := getattr(self, key)) not in table:
                meant = get_close_matches(name, table, n=1)
                hint = f"did you mean {meant[0]!r}?" if meant else "a new one is a row of moe/backbones.py"
                yield key, f"{name!r} is none of {', '.join(table)}", hint
        if self.config and "vocab_size" in self.config and self.tokenizer.startswith("train:"):
            yield "config", "vocab_size is the trained tokenizer's", "leave it out"
        if self.tokenizer.startswith("train:") and not self.tokenizer[6:].isdigit():
            yield (
                "tokenizer",
                f"{self.tokenizer!r}: expected a number of tokens after 'train:'",
                "say train:512",
            )
        depth = self.projector.removeprefix("mlp").removesuffix("x_gelu")
        if self.projector != "linear" and not (
            depth.isdigit() and int(depth) > 0 and self.projector == f"mlp{depth}x_gelu"
        ):
            yield "projector", f"{self.projector!r} is neither linear nor mlpNx_gelu", "say mlp2x_gelu"


@dataclass(frozen=True)
class MoESpec:
    """Sparse layers; the defaults are MoE-LLaVA's (scripts/v1/*/finetune_moe.sh)."""

    experts: int | tuple[int, ...] = 4  # copies of the dense FFN; a list gives a number a sparse layer
    top_k: int = 2
    layers: str | tuple[int, ...] = "sparse"  # first_half, second_half, sparse, dense, or indices
    capacity_factor: float = 1.5  # in training; 0: dropless
    eval_capacity_factor: float = 0.0
    min_capacity: int = 0
    aux_loss: float = 0.01  # coefficient of the load-balancing loss, summed over layers
    z_loss: float = 0.0
    noise: Literal["none", "gumbel"] = "none"  # in training, for the second choice
    residual: bool = False  # PR-MoE: the dense FFN stays beside the experts
    rules: Literal["default", "moe_llava"] = "default"
    expert_parallel: int = 1  # ranks that share one set of experts
    dispatcher: Literal["auto", "tutel", "torch"] = "auto"
    overlap: int = 1  # pieces in which tokens travel, each while the experts compute another; 1: all at once

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """The numbers of experts named, one where all layers share it."""
        return (self.experts,) if isinstance(self.experts, int) else self.experts

    def expert_parallel_choices(self, ranks: int = 0) -> list[int]:
        """What expert_parallel may be, on a number of ranks (0: on any), up to 64."""
        numbers = (*self.experts_per_layer, ranks)
        return [n for n in range(1, 65) if not any(number % n for number in numbers)]

    def check(self) -> Iterator[Complaint]:
        if not self.experts_per_layer or min(self.experts_per_layer) < 1:
            yield "experts", f"{self.experts}: a layer needs at least one expert", ""
            return
        if self.top_k < 1:
            yield "top_k", f"{self.top_k}: a token needs at least one expert", ""
        if self.top_k > (fewest := min(self.experts_per_layer)):
            yield "top_k", f"top_k ({self.top_k}) is more than experts ({fewest})", f"at most {fewest}"
        if self.overlap < 1:
            yield "overlap", f"{self.overlap}: tokens travel in at least one piece", "say 1 for no overlap"
        if self.overlap > 1 and self.dispatcher == "tutel":
            yield (
                "overlap",
                "Tutel overlaps inside its own layer alone, which is not used here; what is overlapped is PyTorch's",
                "say dispatcher: torch, or overlap: 1",
            )
        if self.expert_parallel < 1:
            yield "expert_parallel", f"{self.expert_parallel}: at least one rank holds the experts", ""
        elif any(n % self.expert_parallel for n in self.experts_per_layer):
            yield (
                "experts",
                f"experts ({self.experts}) must be a multiple of expert_parallel ({self.expert_parallel})",
                f"expert_parallel may be {', '.join(map(str, self.expert_parallel_choices()))}",
            )
        names = ("first_half", "second_half", "sparse", "dense")
        if isinstance(self.layers, str) and self.layers not in names:
            meant = get_close_matches(self.layers, names, n=1)
            hint = f"did you mean {meant[0]!r}?" if meant else ""
            yield (
                "layers",
                f"{self.layers!r} is none of {', '.join(names)} and no list of layer numbers",
                hint,
            )
        for key in ("capacity_factor", "eval_capacity_factor", "min_capacity", "aux_loss", "z_loss"):
            if getattr(self, key) < 0:
                yield key, f"{getattr(self, key)} is below 0", ""
        if self.noise == "gumbel" and self.top_k != 2:
            yield (
                "noise",
                "gumbel noise is defined for the second of two choices; top_k is not 2",
                "say noise: none",
            )


@dataclass(frozen=True)
class OptimSpec:
    """AdamW; the defaults are MoE-LLaVA's: no weight decay, cosine to 0, no clipping."""

    lr: float = 2e-5
    projector_lr: float = 0.0  # 0: as lr
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0  # global gradient norm; 0: none
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03  # fraction of all steps

    def check(self) -> Iterator[Complaint]:
        if not self.lr > 0:
            yield "lr", f"{self.lr} is not above 0", ""
        if not 0 <= self.warmup < 1:
            yield "warmup", f"{self.warmup} is no fraction of the steps", "say 0.03 for 3 %"
        if self.clip < 0:
            yield "clip", f"{self.clip} is below 0", "say 0 for no clipping"
        for key in ("projector_lr", "weight_decay"):
            if getattr(self, key) < 0:
                yield key, f"{getattr(self, key)} is below 0", ""
        if not self.eps > 0:
            yield "eps", f"{self.eps} is not above 0", "say 1e-8"
        if not all(0 <= b < 1 for b in self.betas):
            yield "betas", f"{self.betas}: each must be in [0, 1)", ""


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank additions to frozen linear maps of the language model; the dropout is MoE-LLaVA's (train.py)."""

    rank: int = 0  # 0: none, weights themselves train; the reference's is 128
    alpha: float = 0.0  # the addition is scaled by alpha / rank; 0: twice the rank, as the reference
    dropout: float = 0.05
    targets: str | tuple[str, ...] = (
        "auto"  # ffn, all, or names of linear maps; auto: ffn in stage moe, else all
    )

    @property
    def scale(self) -> float:
        """What the product of the two factors is multiplied with."""
        return self.alpha / self.rank if self.alpha else 2.0

    def check(self) -> Iterator[Complaint]:
        if self.rank < 0:
            yield "rank", f"{self.rank} is below 0", "say 0 for no LoRA"
        if self.alpha < 0:
            yield "alpha", f"{self.alpha} is below 0", "say 0 for twice the rank"
        if not 0 <= self.dropout < 1:
            yield "dropout", f"{self.dropout} is no share of the inputs", "say 0.05"
        if isinstance(self.targets, str) and self.targets not in ("auto", "ffn", "all"):
            yield "targets", f"{self.targets!r} is none of auto, ffn, all and no list of linear maps", ""
        if not self.targets:
            yield "targets", "names no linear map", "say auto, or leave train.lora out"


@dataclass(frozen=True)
class TrainSpec:
    steps: int = 0  # optimizer steps; 0: as many as `epochs` need
    epochs: float = 1.0
    global_batch: int = 128  # samples per optimizer step, over all ranks; with data.packing, sequences
    micro_batch: int = 8  # samples per forward pass on one rank, at most
    precision: Literal["bf16", "fp32"] = "bf16"
    zero: int = 2  # DeepSpeed ZeRO stage
    offload: bool = False  # optimizer on the CPU
    recompute: bool = True  # activation checkpointing
    save_every: int = 500  # steps
    save_async: bool = False
    keep: int = 2  # complete checkpoints kept
    log_every: int = 1  # steps
    diverged_after: int = (
        10  # steps in a row with a loss or gradients of inf or nan; 0: train on whatever comes
    )
    optim: OptimSpec = field(default_factory=OptimSpec)
    lora: LoraSpec = field(default_factory=LoraSpec)

    def check(self) -> Iterator[Complaint]:
        for key in ("global_batch", "micro_batch", "save_every", "keep", "log_every"):
            if getattr(self, key) < 1:
                yield key, f"{getattr(self, key)}: at least 1", ""
        if self.diverged_after < 0:
            yield "diverged_after", f"{self.diverged_after} is below 0", "say 0 to train on whatever comes"
        if self.steps < 0:
            yield "steps", f"{self.steps} is below 0", "say 0 to train for `epochs`"
        if self.steps == 0 and not self.epochs > 0:
            yield "epochs", f"{self.epochs}: neither steps nor epochs say how long to train", ""
        if self.zero not in (0, 1, 2, 3):
            yield "zero", f"{self.zero} is none of 0, 1, 2, 3", ""
