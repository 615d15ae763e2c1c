"""What a micro-batch adds to a step's loss, and what a step's micro-batches hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

IMAGE, IGNORED = -200, -100  # where an image goes; a label that is not learnt


class Objective(nn.Module):
    """The model with its loss as the one thing it returns, which DeepSpeed hooks into; what else it says is
    summed here.

    `losses` (float32 [3]): cross entropy, balancing losses, what routers add to the loss; `counts` [E + 1], one
    a sparse layer: choices by expert, and last those that capacity dropped.
    """

    def __init__(self, vlm: nn.Module) -> None:
        super().__init__()
        self.vlm = vlm
        self.begin()

    def begin(self, ce_scale: float = 1.0, router_scale: float = 1.0) -> None:
        """Start a step."""
        self.ce_scale, self.router_scale = ce_scale, router_scale
        here = next(self.vlm.parameters(), torch.empty(0)).device
        self.losses = torch.zeros(3, device=here)  # made there: a copy would wait for what is computed
        self.counts: list[Tensor] = []

    def forward(self, **batch: Tensor) -> Tensor:
        """The micro-batch's part of the step's loss."""
        output = self.vlm(**batch)
        ce: Tensor = output.ce_sum
        aux = sum((loss.detach().float() for loss in output.aux_losses), start=torch.zeros_like(ce))
        router = torch.zeros_like(ce) if output.router_loss is None else output.router_loss
        losses = torch.stack([ce.detach().float(), aux, router.detach().float()])
        pairs = zip(output.expert_counts, output.dropped, strict=True)
        layers = [torch.cat([by_E.detach(), lost.detach().view(1)]).to(torch.float64) for by_E, lost in pairs]
        self.losses = self.losses + losses
        self.counts = [a + b for a, b in zip(self.counts, layers, strict=True)] if self.counts else layers
        return ce * self.ce_scale + router * self.router_scale


def counted(micro_batches: Sequence[Mapping[str, Tensor]], patches: int = 1) -> list[list[int]]:
    """This rank's supervised tokens, samples, filled and all token slots, images, one number a micro-batch.

    An image takes `patches` slots; of packed sequences the samples in them are counted.
    """
    tokens = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in micro_batches]
    samples = [
        int(batch["segments"].amax(1).sum()) if "segments" in batch else len(batch["input_ids"])
        for batch in micro_batches
    ]
    images = [(batch["input_ids"] == IMAGE).sum(1) for batch in micro_batches]
    lengths = [
        batch["attention_mask"].sum(1) + number * (patches - 1)
        for batch, number in zip(micro_batches, images, strict=True)
    ]
    slots = [int(length.max()) * len(length) for length in lengths]
    filled = [int(length.sum()) for length in lengths]
    return [tokens, samples, filled, slots, [int(number.sum()) for number in images]]
