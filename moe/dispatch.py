"""Tokens to the ranks that hold their experts and back."""

from __future__ import annotations
from dataclasses import dataclass
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    expert_TK: Tensor  # where each of a token's K choices goes
    slot_TK: Tensor  # its place in that expert's queue on this rank; >= capacity: dropped
    weight_TK: Tensor  # fp32, how much it counts; has a gradient
    experts: int  # E, over all ranks
    capacity: int | None  # choices an expert takes from this rank; None: all
    load_E: Tensor  # int64, choices of each expert on this rank, before any is dropped
