"""The floating-point operations that training a model asks for, and the share of a device's peak they come to.

Counted is what the mathematics needs (2 a multiply-add): a token's own experts, the causal half of attention,
logits of supervised tokens alone, no recomputed activations. The utilisation is PaLM's "model FLOPs
utilization" (arXiv 2204.02311, appendix B), which counts attention's masked half as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from moe.optim import is_expert
from moe.parts import whole_size
from moe.vlm import VLM

# Dense bfloat16 peak of one device, in TFLOP/s, by whole words of the name that torch.cuda.get_device_name gives; the
# first that fits (a GB200 or an A10G is no B200 or A10). From NVIDIA's data sheets (B200, H200, H100, A100, A40, A30,
# A10, L40S, L40, L4), which print twice as much for weights with 2:4 sparsity.
PEAKS: tuple[tuple[str, float], ...] = (
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("A100", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
)


def peak(device: str) -> float | None:
    """The device's peak in FLOP/s, None where the table does not have it."""
    return next((value * 1e12 for name, value in PEAKS if re.search(rf"\b{name}\b", device)), None)


@dataclass(frozen=True)
class Work:
    """FLOPs of one training step's parts: forward, and backward as far as gradients go."""

    position: float  # a position of the language model, but for attention over others
    pair: float  # a position that attends to one other
    supervised: float  # the logits of a supervised token
    picture: float  # tower and projector

    @staticmethod
    def of(vlm: VLM, patches: int) -> Work:
        """For the parameters that now have gradients. Gradients are taken to flow through the whole language model."""
        config, moe = vlm.language.config, vlm.moe
        flows = any(p.requires_grad for module in (vlm.projector, vlm.language) for p in module.parameters())
        position = 0.0
        for name, parameter in vlm.language.named_parameters():
            if parameter.ndim < 2 or "bias" in name or "embed_tokens" in name or "lm_head" in name:
                continue
            size = whole_size(parameter)
            if is_expert(parameter) and moe is not None:
                total = int(getattr(parameter, "expert_total", parameter.shape[0]))
                size = size // total * moe.top_k
            position += size * _passes(parameter, flows)
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        head = vlm.language.lm_head.weight
        tower = sum(
            2
            * p.numel()
            * (patches + (p.ndim == 2))  # one position more, for the class, once they are embedded
            for name, p in vlm.tower.named_parameters()
            if p.ndim >= 2 and "position" not in name
        )
        maps = [p for p in vlm.projector.parameters() if p.ndim >= 2]
        between = sum(p.numel() * _passes(p, place > 0) for place, p in enumerate(maps))
        return Work(
            position=position,
            pair=4 * width * config.num_hidden_layers * (3 if flows else 1),
            supervised=float(head.numel() * _passes(head, flows)),
            picture=float(tower + between * patches),
        )

    def step(self, *, positions: int, images: int, samples: int, supervised: int) -> float:
        """Of a step over all ranks: positions of the language model, pictures, samples, supervised tokens.

        Samples are taken to be of one length; attention of unequal ones is a little more.
        """
        seen = positions / max(1, samples) / 2  # on average, by a position of a causal sample
        return (
            positions * (self.position + self.pair * seen)
            + supervised * self.supervised
            + images * self.picture
        )


def _passes(parameter: nn.Parameter, flows: bool) -> int:
    """FLOPs a weight and position: forward, gradient of the input where it is wanted, gradient of the weight."""
    return 2 + 2 * flows + 2 * parameter.requires_grad
