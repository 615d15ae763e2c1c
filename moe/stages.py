"""STAGES: what each stage trains and starts from (MoE-LLaVA, docs/TRAIN.md, train.py); standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = Literal["projector", "embeddings", "attention", "norms", "ffn", "experts", "router", "head"]

LANGUAGE_PARTS: tuple[Part, ...] = ("embeddings", "attention", "norms", "ffn", "head")


@dataclass(frozen=True)
class Stage:
    """One way to train: `trains` names the parts whose parameters get gradients, all others are frozen."""

    trains: tuple[Part, ...]
    after: str = ""  # the stage whose handoff it starts from; empty: from the backbone's own weights
    sparse: bool = False  # FFNs are upcycled into experts first
    template: str = ""  # the conversation template it must use; empty: the spec says


STAGES: dict[str, Stage] = {
    "align": Stage(trains=("projector",), template="plain"),
    "instruct": Stage(trains=("projector", *LANGUAGE_PARTS), after="align"),
    # The reference trains the dense layers' FFNs and the projector too, though its paper names the experts alone.
    "moe": Stage(trains=("projector", "ffn", "experts", "router"), after="instruct", sparse=True),
}
