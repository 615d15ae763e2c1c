"""What the optimizer is given: groups of parameters, and the learning rate of a step.

The rate is a function of the step alone, so that a resumed run needs no scheduler state beside its step.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from torch import nn

from moe.spec import OptimSpec

EXPERT_GROUP = "ep_size_{}"  # the name DeepSpeed derives from the number of ranks that share the experts


def rate(spec: OptimSpec, step: int, total_steps: int) -> float:
    """The share of the peak learning rate used by update `step` (0 is the first): in [0, 1].

    Linear warm-up from 0 over ceil(warmup * total) steps, then half a cosine or a line to 0: what
    transformers' get_cosine_schedule_with_warmup and get_linear_schedule_with_warmup compute, which the
    reference trains with.
    """
    warmup = math.ceil(spec.warmup * total_steps)
    if step < warmup:
        return step / max(1, warmup)
    if spec.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if spec.schedule == "linear":
        return 1.0 - done
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether a parameter is one rank's slice of a tensor of all experts (moe/experts.py marks it)."""
    return getattr(parameter, "expert_dim", None) is not None


def undecayed(model: nn.Module) -> set[str]:
    """Parameters that weight decay leaves alone: biases, and all that a normalisation layer owns."""
    names = set()
    for prefix, module in model.named_modules():
        norm = type(module).__name__.lower().endswith("norm")
        for name, parameter in module.named_parameters(recurse=False):
            if norm or parameter.ndim <= 1 or "bias" in name:
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def parameter_groups(
    model: nn.Module, spec: OptimSpec, *, expert_parallel: int, projector: Collection[str]
) -> list[dict[str, Any]]:
    """The trainable parameters by peak rate, decay, and whether their gradients belong to an expert group.

    `peak` is the group's own learning rate. Expert groups carry the two keys by which DeepSpeed knows them:
    `moe`, and the name of the process group that holds the same experts.
    """
    plain = undecayed(model)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        peak = spec.projector_lr if spec.projector_lr and name in projector else spec.lr
        decay = 0.0 if name in plain else spec.weight_decay
        sharded = expert_parallel > 1 and is_expert(parameter)
        key = (sharded, peak, decay, parameter.dtype)
        if key not in groups:
            groups[key] = {"params": [], "lr": 0.0, "peak": peak, "weight_decay": decay}
            label = f"lr={peak:g},decay={decay:g}"
            groups[key] |= (
                {"name": EXPERT_GROUP.format(expert_parallel), "moe": True} if sharded else {"name": label}
            )
        groups[key]["params"].append(parameter)
    return list(groups.values())
