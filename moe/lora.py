"""LoRA: trained low-rank additions to frozen linear maps of the language model, by peft.

Experts get theirs as the reference's do (moellava/train/train.py): adapters come before the FFNs are made
sparse, so that each expert is a copy of an FFN and of its adapters, and goes its own way from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from moe.spec import LoraSpec
from moe.vlm import VLM

FFN = ("gate_proj", "up_proj", "down_proj", "fc1", "fc2")


class LoraError(ValueError):
    """Adapters that cannot be had, in words."""


def told(spec: Mapping[str, Any]) -> LoraSpec:
    """The train.lora of a run's spec.json; one written before there was LoRA has none."""
    said = (spec.get("train") or {}).get("lora") or {}
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in said.items()
    }
    return LoraSpec(**values)


def add(vlm: VLM, spec: LoraSpec, *, sparse: bool, seed: int) -> None:
    """Put adapters beside the linear maps of a dense model that spec.targets names; rank 0: nothing.

    The first factor is drawn from `seed`, equal on all ranks, the second is zero: the model computes what it did.
    `sparse`: whether the FFNs are about to become experts. Raises LoraError for maps that are not there.
    """
    if not spec.rank:
        return
    if vlm.moe is not None or vlm.lora is not None:
        raise LoraError("adapters are added to a dense model that has none yet")
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.scale * spec.rank,
        lora_dropout=spec.dropout,
        target_modules=targets(vlm, spec, sparse=sparse),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, vlm.language)
    for layer in adapted(vlm):
        base = layer.base_layer.weight
        for factor in (layer.lora_A, layer.lora_B):
            factor.to(device=base.device, dtype=base.dtype)  # peft keeps fp32 beside bf16
    vlm.lora = spec


def targets(vlm: VLM, spec: LoraSpec, *, sparse: bool) -> list[str]:
    """The last names of the linear maps that get adapters; the head never does."""
    there = {
        name.rpartition(".")[2]
        for name, module in vlm.language.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    if not isinstance(spec.targets, str):
        if absent := sorted(set(spec.targets) - there):
            raise LoraError(
                f"train.lora.targets names {', '.join(absent)}, but the linear maps of {vlm.spec.backbone} are "
                f"{', '.join(sorted(there))}; name some of these, or say ffn or all"
            )
        return sorted(set(spec.targets))
    ffn = spec.targets == "ffn" or (spec.targets == "auto" and sparse)
    return sorted(there & set(FFN) if ffn else there)


def adapted(vlm: VLM) -> Iterator[Any]:
    """peft's layers: a `base_layer`, and its factors `lora_A["default"]` and `lora_B["default"]`."""
    from peft.tuners.lora import LoraLayer

    for module in list(vlm.modules()):
        if isinstance(module, LoraLayer):
            yield module


@torch.no_grad()
def merge(vlm: VLM) -> None:
    """Add the adapters' products to the weights they stand beside, and take the adapters out; in place."""
    from moe.experts import Experts

    if vlm.lora is None:
        return
    layers = set(adapted(vlm))
    for module in list(vlm.modules()):
        if isinstance(module, Experts):
            module.merge()
        for name, child in list(module.named_children()):
            if child in layers:
                setattr(module, name, _merged(child, vlm.lora))
    del vlm.language.peft_config
    vlm.lora = None


def _merged(layer: Any, spec: LoraSpec) -> nn.Module:
    base: nn.Module = layer.base_layer
    weight: Any = base.weight
    product = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    weight.copy_(weight.float() + spec.scale * product)
    return base
