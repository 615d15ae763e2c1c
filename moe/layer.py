"""A sparse layer in the place of a dense FFN: the router decides, the dispatcher moves, the experts compute.

    1. leave out padding, unless the rules route it
    2. router: each token's experts, their order and weights
    3. dispatcher: tokens to their experts; experts; back, weighed and added
    4. padding gets zeros

What a pass tells the layer comes with the pass (`Traffic`), by a hook on the decoder layer around it:
transformers hands an FFN nothing but its input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe.dispatch import Dispatcher, gather
from moe.experts import Experts
from moe.overlap import overlapped
from moe.parallel import Groups
from moe.router import Router, Traffic


class MoELayer(nn.Module):
    """`residual`, `coefficient`: PR-MoE's dense FFN beside the experts, and their mixing.

    `pieces` above 1: tokens travel between the ranks of `groups` in as many, each while another is computed.
    """

    def __init__(
        self,
        index: int,
        router: Router,
        experts: Experts,
        dispatcher: Dispatcher,
        residual: nn.Module | None = None,
        coefficient: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.groups, self.pieces = Groups.single(), 1
        self.index, self.dispatcher = index, dispatcher
        self.router, self.experts = router, experts
        self.residual, self.coefficient = residual, coefficient
        self.traffic: Traffic | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        flat = x.reshape(-1, x.shape[-1])
        traffic = self.traffic
        real_T = traffic.real if traffic is not None else None
        if real_T is None:
            return self._sparse(flat, traffic).view_as(x)
        # -1 where a position is padding
        back = torch.full((len(flat),), -1, device=x.device)
        back[real_T] = torch.arange(len(real_T), device=x.device)
        y_TD = self._sparse(gather(flat, real_T[:, None], back[:, None], True), traffic)
        return gather(y_TD, back[:, None], real_T[:, None], True).view_as(x)

    def _sparse(self, x_TD: Tensor, traffic: Traffic | None) -> Tensor:
        routing, report = self.router(x_TD)
        if traffic is not None:
            if not traffic.keep_choices:
                report.expert_TK = None
            traffic.reports[self.index] = report
        if self.pieces > 1:
            y_TD = overlapped(x_TD, routing, self.experts, self.groups, self.pieces)
        else:
            sent = self.dispatcher.dispatch(x_TD, routing)
            y_TD = self.dispatcher.combine(self.experts(sent.rows, sent.load_e), sent)
        if self.residual is None or self.coefficient is None:
            return y_TD
        share_T2 = self.coefficient(x_TD).softmax(-1)
        beside_TD: Tensor = self.residual(x_TD)
        mixed: Tensor = y_TD * share_T2[:, :1] + beside_TD * share_T2[:, 1:]
        return mixed


def forget(model: nn.Module) -> None:
    """Let go of what the last pass told the layers: its tensors cannot be copied."""
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.traffic = None


def announce(decoder_layer: nn.Module) -> None:
    """Let a decoder layer take `traffic=` and hand it to its sparse FFN, recomputed or not."""

    def hand_over(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rest = {key: value for key, value in kwargs.items() if key != "traffic"}
        if isinstance(layer.mlp, MoELayer):
            layer.mlp.traffic = kwargs.get("traffic")
        return args, rest

    decoder_layer.register_forward_pre_hook(hand_over, with_kwargs=True)
