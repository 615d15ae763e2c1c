"""One optimizer step over DeepSpeed: forward, backward, gradients averaged over the right ranks, clip,
update.

The loss of a step is the cross entropy summed over all its supervised tokens, on all ranks and
micro-batches, over their number: what one process with one big batch would compute, however the tokens
fall. DeepSpeed averages gradients over all ranks, experts' too (each rank's experts have seen the tokens of
their whole expert group), so each rank scales its own sum by ranks / tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe import parallel, zero
from moe.apart import there
from moe.fragments import Fragment, held, refresh
from moe.objective import Objective, counted
from moe.optim import is_expert, parameter_groups, rate
from moe.parallel import Groups
from moe.spec import MoESpec, TrainSpec

if TYPE_CHECKING:
    from moe.vlm import VLM


class EngineError(RuntimeError):
    """Training cannot be set up, or cannot go on; the message says why and what to do."""


class DivergedError(EngineError):
    """The loss or the gradients stayed inf or nan; another attempt would meet the same."""

    verdict = "divergence"


@runtime_checkable
class Recomputing(Protocol):
    """A model that can drop its activations and compute them again in the backward pass."""

    def recompute(self, on: bool = True) -> None:
        """Drop them, or keep them."""


@runtime_checkable
class HostTexts(Protocol):
    """A model that takes texts on the host."""

    def splice(self, *args: Any) -> Any:
        """Look at them there."""


class Engine:
    """A model in training. `step` counts the steps taken; the next one uses the learning rate of `step`.

    Needs no launcher for one process. Raises EngineError for a configuration DeepSpeed cannot train.
    """

    def __init__(
        self, vlm: nn.Module, spec: TrainSpec, groups: Groups, *, total_steps: int, moe: MoESpec | None = None
    ) -> None:
        parallel.start()
        self.vlm, self.spec, self.groups, self.total_steps, self.moe = vlm, spec, groups, total_steps, moe
        self.step = 0
        self.bad = 0  # steps in a row whose loss or gradients were inf or nan, up to now
        self.device = parallel.device()
        self.patches = getattr(getattr(vlm, "vision", None), "patches", 1)  # token slots of an image
        if not any(parameter.requires_grad for parameter in vlm.parameters()):
            raise EngineError(
                "The model has no trainable parameter. Name the parts to train (moe.vlm.train_only) first."
            )
        if spec.zero == 3 and groups.expert_parallel > 1:
            raise EngineError(
                f"train.zero is 3, but moe.expert_parallel is {groups.expert_parallel}: ZeRO 3 would cut "
                "up experts that are already spread over ranks. Set train.zero to 2, or moe.expert_parallel to 1."
            )
        if isinstance(vlm, Recomputing):
            vlm.recompute(spec.recompute)
        vlm.train()
        projector: list[str] = []
        if spec.optim.projector_lr:
            from moe.vlm import parts

            projector = parts(cast("VLM", vlm))["projector"]
        self.adam = torch.optim.AdamW(
            parameter_groups(vlm, spec.optim, expert_parallel=groups.expert_parallel, projector=projector),
            lr=0.0,  # until the first step: DeepSpeed may take an empty one to allocate its state
            betas=spec.optim.betas,
            eps=spec.optim.eps,
            fused=True,
        )
        self._objective = Objective(vlm)
        self.deepspeed = zero.start(self._objective, self.adam, spec, groups, self.device)

    # --- a step ---

    def train_step(self, micro_batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """Train on one step's micro-batches; every rank calls it with as many of them.

        Returns what all ranks saw together: loss, ce (mean over supervised tokens), aux (mean over
        micro-batches of the sum over layers), lr, grad_norm (before clipping), tokens (supervised), samples,
        positions (of the language model: an image's patches counted), images, padding (share of slots), and of
        each sparse layer moe/layer{i}/counts and moe/layer{i}/dropped (share of choices lost to capacity). A step
        in which no rank has a supervised token, or whose gradients are not finite, changes no weight.
        """
        tokens, samples, filled, slots, images = self.groups.total(
            *(sum(column) for column in counted(micro_batches, self.patches))
        )
        lr = self._set_rate()
        seen = {"lr": lr, "tokens": int(tokens), "samples": int(samples), "padding": 1 - filled / slots}
        seen |= {"positions": int(filled), "images": int(images)}
        if tokens == 0:
            self.step += 1
            return {"loss": 0.0, "ce": 0.0, "aux": 0.0, "grad_norm": 0.0, **seen}
        self._objective.begin(ce_scale=self.groups.world / tokens, router_scale=1 / len(micro_batches))
        for place, batch in enumerate(micro_batches):
            self.deepspeed.set_gradient_accumulation_boundary(place == len(micro_batches) - 1)
            loss = self.deepspeed(**self._placed(batch))
            # A tensor of its own: DeepSpeed's hook on the one it returned would divide by the accumulation
            # steps.
            self.deepspeed.backward(loss.clone(), scale_wrt_gas=False)
        norm = self._update()
        self.step += 1
        (ce, aux, router), totals = self._together(self._objective.losses, self._objective.counts)
        forwards = len(micro_batches) * self.groups.world
        ce, aux, router = ce / tokens, aux / forwards, router / forwards
        self._watch(ce, norm)
        layers_seen: dict[str, Any] = {}
        each = (
            self.moe.top_k if self.moe and self.moe.rules == "moe_llava" else 1
        )  # it counts first choices alone
        for i, (*by_expert, lost) in enumerate(totals):
            layers_seen[f"moe/layer{i}/counts"] = by_expert
            layers_seen[f"moe/layer{i}/dropped"] = lost / max(1, each * sum(by_expert))
        return {"loss": ce + router, "ce": ce, "aux": aux, "grad_norm": norm, **seen, **layers_seen}

    def _placed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pictures on the device. Where what a text says goes is found on the host, before any of it is computed."""
        stays = isinstance(self.vlm, HostTexts)
        return {
            name: tensor if stays and name != "pixel_values" else there(tensor, self.device)
            for name, tensor in batch.items()
        }

    def _set_rate(self) -> float:
        share = rate(self.spec.optim, self.step, self.total_steps)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * share
        return self.spec.optim.lr * share

    def _update(self) -> float:
        """Clip and update; the norm of the whole gradient, dense and experts, before clipping."""
        if self.spec.zero:
            self.deepspeed.step()
            return float(self.deepspeed.get_global_grad_norm())
        # Without ZeRO, DeepSpeed clips by the norm of the dense gradients alone, and only when asked has a
        # norm.
        norm = self._grad_norm()
        if math.isfinite(norm):
            if 0 < self.spec.optim.clip < norm:
                for parameter in self.vlm.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(self.spec.optim.clip / (norm + 1e-6))
            self.deepspeed.step()
        else:
            self.deepspeed.zero_grad()
        return norm

    def _grad_norm(self) -> float:
        dense, experts = torch.zeros(2, device=self.device, dtype=torch.float64).unbind()
        for parameter in self.vlm.parameters():
            if parameter.grad is None:
                continue
            square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).double() ** 2
            if self.groups.expert_parallel > 1 and is_expert(parameter):
                experts = experts + square
            else:
                dense = dense + square
        if self.groups.expert_parallel > 1:
            dist.all_reduce(experts, group=self.groups.expert_group)
        return float((dense + experts).sqrt())

    def _together(self, sums: Tensor, counts: list[Tensor]) -> tuple[list[float], list[list[int]]]:
        """Everything a step reports, summed over ranks in one all-reduce and fetched in one
        synchronisation.
        """
        flat = torch.cat([sums.double(), *(layer.to(sums.device) for layer in counts)])
        if self.groups.world > 1:
            dist.all_reduce(flat, group=self.groups.data_group)
        values = flat.tolist()
        totals, place = [], len(sums)
        for layer in counts:
            totals.append([int(value) for value in values[place : place + len(layer)]])
            place += len(layer)
        return values[: len(sums)], totals

    def _watch(self, ce: float, norm: float) -> None:
        # Both are on the host already, and the same on all ranks: it costs nothing, and all raise at the same step.
        self.bad = 0 if math.isfinite(norm) and math.isfinite(ce) else self.bad + 1
        if 0 < self.spec.diverged_after <= self.bad:
            raise DivergedError(
                f"The loss or the gradients were inf or nan in each of the last {self.bad} steps (at step {self.step}: "
                f"loss {ce}, gradient norm {norm}). Lower train.optim.lr, set train.optim.clip (it is "
                f"{self.spec.optim.clip:g}), or look at the data of these steps."
            )

    # --- what a checkpoint keeps ---

    def fragments(self) -> list[Fragment]:
        """Views of all state this rank holds; writing into them changes it (then call `refresh`)."""
        return held(self.vlm, self.deepspeed.optimizer, self.adam, self.groups)

    def refresh(self) -> None:
        """Take the weights over from the optimizer's fp32 copies, after these were written; collective."""
        refresh(self.deepspeed.optimizer, self.adam)

    @property
    def updates(self) -> int:
        """How many updates the optimizer has made; Adam corrects its averages by it."""
        return max(int(state["step"]) for state in self.adam.state.values())

    @updates.setter
    def updates(self, number: int) -> None:
        for state in self.adam.state.values():
            state["step"].fill_(number)
