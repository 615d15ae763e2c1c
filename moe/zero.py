"""DeepSpeed's engine for our model and optimizer: how it is told of experts, and what of it is kept quiet.

The only import of deepspeed. What a step is, `moe.engine` says.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moe.fragments import MOMENTS, masters
from moe.objective import Objective
from moe.optim import EXPERT_GROUP, is_expert
from moe.parallel import Groups
from moe.spec import TrainSpec


def start(
    objective: Objective, adam: torch.optim.AdamW, spec: TrainSpec, groups: Groups, device: torch.device
) -> Any:
    """DeepSpeed's engine over `objective`, with Adam's state made and zero; collective."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # without a launcher; DeepSpeed insists
    import deepspeed
    from deepspeed.utils import groups as registry

    # Looking for extensions it could compile runs a compiler, and finds one that only inference uses.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if getattr(registry, "_made_for", None) is not dist.group.WORLD:
        # It keeps a copy of the group of all ranks, also of one that has ended since.
        registry._WORLD_GROUP, registry._made_for = None, dist.group.WORLD
    sharded = [p for p in objective.vlm.parameters() if is_expert(p)] if groups.expert_parallel > 1 else []
    if sharded:
        name = EXPERT_GROUP.format(groups.expert_parallel)
        for parameter in sharded:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = name  # type: ignore[attr-defined]
        _register(registry, name, groups)
        objective.announcement = _announcement()
    config = _config(objective, spec, groups, device)
    # It prints pages of memory statistics.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        engine, *_ = deepspeed.initialize(model=objective, optimizer=adam, config=config)
    if spec.zero == 3:
        # A router returns no bare tensor, by which alone ZeRO 3 would know when to bring its weights back for
        # the backward pass: they are brought back with the layer around it.
        for layer in objective.vlm.modules():
            if isinstance(router := getattr(layer, "router", None), nn.Module):
                for parameter in router.parameters():
                    deepspeed.zero.register_external_parameter(layer, parameter)
    # Its own calls, once a step on every rank.
    warnings.filterwarnings(
        "ignore", message=r"`torch.distributed.\w+_tensor` is deprecated", category=FutureWarning
    )
    _forget_empty_step(engine.optimizer, adam)
    return engine


def _config(objective: Objective, spec: TrainSpec, groups: Groups, device: torch.device) -> dict[str, Any]:
    trainable = sum(p.numel() for p in objective.vlm.parameters() if p.requires_grad)
    bucket = max(1_000, min(200_000_000, trainable))  # elements; a buffer of this size is allocated
    zero: dict[str, Any] = {
        "stage": spec.zero,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": device.type == "cuda",
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": 2 * bucket,
    }
    if spec.offload and spec.zero:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": spec.micro_batch,
        "gradient_accumulation_steps": max(1, spec.global_batch // (spec.micro_batch * groups.world)),
        # Always said: left out, it is 1.0.
        "gradient_clipping": spec.optim.clip if spec.zero else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on CPUs, uncompiled
        "steps_per_print": None,
    }
    if spec.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if spec.zero:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _forget_empty_step(optimizer: Any, adam: torch.optim.AdamW) -> None:
    """Adam's state, made and zeroed here: DeepSpeed makes it late, or by a step that would count."""
    for master in masters(optimizer, adam):
        state = adam.state[master]
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        for key in MOMENTS:
            state[key] = torch.zeros_like(master).detach()
    optimizer.zero_grad()


def _register(registry: Any, name: str, groups: Groups) -> None:
    """Give DeepSpeed our expert groups under the name it looks them up by, in place of its own."""
    for table, group in (
        ("_EXPERT_PARALLEL_GROUP", groups.expert_group),
        ("_EXPERT_DATA_PARALLEL_GROUP", groups.expert_data_group),
    ):
        for known, value in ((table, group), (f"{table}_RANKS", dist.get_process_group_ranks(group))):
            getattr(registry, known).clear()
            getattr(registry, known)[name] = value


def _announcement() -> nn.Module:
    """An empty layer of DeepSpeed's own MoE class, by which alone DeepSpeed knows that a model has experts.

    So that neither our layers nor a model without DeepSpeed need its class.
    """
    from deepspeed.moe.layer import MoE

    class Announcement(MoE):  # type: ignore[misc]
        num_experts = 1

        def __init__(self) -> None:
            nn.Module.__init__(self)

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            pass

    return Announcement()
