"""Which part of the model a parameter is of, and which parts train: moe.stages' words, applied to a model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from moe.stages import Part


class VLMError(ValueError):
    """A batch the model cannot take, or a parameter that is of no part, in words."""


_PARTS: tuple[tuple[str, Part], ...] = (  # the first that is found in a parameter's name names its part
    ("projector.", "projector"),
    ("lora_", "adapters"),
    (".embed_tokens.", "embeddings"),
    (".lm_head.", "head"),
    (".self_attn.", "attention"),
    (".mlp.router.", "router"),
    (".mlp.coefficient.", "router"),
    (".mlp.experts.", "experts"),
    (".mlp.", "ffn"),
    ("norm.", "norms"),
)


def _part(name: str) -> Part | None:
    if name.startswith("tower."):
        return None  # never trained
    for piece, part in _PARTS:
        if piece in name:
            return part
    raise VLMError(f"parameter {name} belongs to no part of moe.stages; name its part in moe/parts.py")


def parts(vlm: nn.Module) -> dict[Part, list[str]]:
    """The parameters' names by part; the tower is in none, tied embeddings are `embeddings`."""
    found: dict[Part, list[str]] = {}
    for name, _ in vlm.named_parameters():
        part = _part(name)
        if part is not None:
            found.setdefault(part, []).append(name)
    return found


def train_only(vlm: nn.Module, wanted: Iterable[Part]) -> dict[Part, int]:
    """Let only these parts have gradients; gives their parameter counts, experts over all ranks."""
    chosen, counts = set(wanted), dict[Part, int]()
    for name, parameter in vlm.named_parameters():
        part = _part(name)
        parameter.requires_grad_(part in chosen)
        if part is not None and part in chosen:
            counts[part] = counts.get(part, 0) + whole_size(parameter)
    return counts


def whole_size(parameter: Tensor) -> int:
    """Elements over all ranks: an expert parameter says how many experts there are in all."""
    total = getattr(parameter, "expert_total", None)
    return parameter.numel() if total is None else parameter.numel() // parameter.shape[0] * int(total)
