"""STAGES: what each stage trains and starts from (MoE-LLaVA, docs/TRAIN.md, train.py); standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = Literal[
    "projector", "embeddings", "attention", "norms", "ffn", "experts", "router", "head", "adapters"
]

LANGUAGE_PARTS: tuple[Part, ...] = ("embeddings", "attention", "norms", "ffn", "head")


@dataclass(frozen=True)
class Stage:
    """One way to train: `trains` names the parts whose parameters get gradients, all others are frozen.

    `adapts`: what trains in its place with LoRA (train.lora); empty: the stage has nothing to adapt.
    """

    trains: tuple[Part, ...]
    adapts: tuple[Part, ...] = ()
    after: str = ""  # the stage whose handoff it starts from; empty: from the backbone's own weights
    sparse: bool = False  # FFNs are upcycled into experts first
    template: str = ""  # the conversation template it must use; empty: the spec says

    def parts(self, lora: bool) -> tuple[Part, ...]:
        """What trains, with LoRA or without."""
        return self.adapts if lora else self.trains


STAGES: dict[str, Stage] = {
    "align": Stage(trains=("projector",), template="plain"),
    "instruct": Stage(trains=("projector", *LANGUAGE_PARTS), adapts=("projector", "adapters"), after="align"),
    # The reference trains the dense layers' FFNs and the projector too, though its paper names the experts alone.
    # With LoRA it freezes all FFNs, gives each its adapters and each expert a copy of both (train.py).
    "moe": Stage(
        trains=("projector", "ffn", "experts", "router"),
        adapts=("projector", "router", "adapters"),
        after="instruct",
        sparse=True,
    ),
}
