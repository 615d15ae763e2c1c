"""Which experts a token goes to, in what order they are served, and how evenly they are used.

Scores, weights and losses are fp32 whatever the model's precision. Two sets of rules (`moe.rules`):

    moe_llava   DeepSpeed 0.9.5's top1gating and top2gating (deepspeed/moe/sharded_moe.py): padding is
                routed and counted, only first choices are counted, a single choice weighs its probability
    default     only real tokens are routed and counted, all choices are counted, and a token's kept
                weights sum to one: a layer of equal experts equals one of them, for a single choice too

Under both, weights are renormalised after dropping, first choices of all tokens are served before second
ones, and balance is measured on first choices.

Shapes: T tokens, D width, E experts, K choices a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.dispatch import Routing
from moe.spec import MoESpec


@dataclass
class Report:
    """What one router did in one pass, on this rank."""

    score_E: Tensor  # fp32, probabilities summed over tokens; has a gradient
    first_E: Tensor  # int64, first choices
    counts_E: Tensor  # int64, choices counted by the rules, before any is dropped
    dropped: Tensor  # int64, choices lost to capacity
    tokens: int
    z: Tensor  # fp32, mean squared logsumexp of the logits (ST-MoE, eq. 5); 0 where it is not asked for
    expert_TK: Tensor | None = None  # kept only when the pass asked for it


@dataclass
class Traffic:
    """What one forward pass tells its sparse layers, and hears from them.

    It travels with the pass as an argument, so that activations recomputed in the backward pass are routed by
    the same padding; a recomputed report lands on the forward pass's own, which was read long before.
    """

    real: Tensor | None  # int64, positions of the flattened batch that are routed; None: all
    keep_choices: bool = False
    reports: dict[int, Report] = field(default_factory=dict)  # by decoder layer

    @staticmethod
    def of(mask_BS: Tensor, moe: MoESpec | None, keep_choices: bool = False) -> Traffic | None:
        """For a batch with this mask; None for a dense model."""
        if moe is None:
            return None
        # As the reference, or nothing to leave out.
        whole = moe.rules == "moe_llava" or bool(mask_BS.all())
        return Traffic(None if whole else mask_BS.reshape(-1).nonzero()[:, 0], keep_choices)

    def in_order(self) -> list[Report]:
        """One report a sparse layer, lowest layer first."""
        return [self.reports[layer] for layer in sorted(self.reports)]


def balance(report: Report) -> Tensor:
    """The load-balancing loss: E * sum_e mean(probability of e) * share of first choices on e; 1 when even.

    Of one micro-batch on one rank, as in the reference: its mean over micro-batches then does not depend on
    how many ranks share them.
    """
    experts = len(report.score_E)
    return experts * (report.score_E * report.first_E).sum() / max(report.tokens, 1) ** 2


class Router(nn.Module):
    """`weight` [E, D]; U(-1/sqrt(D), 1/sqrt(D)) like any linear map (DeepSpeed's wg has torch's default)."""

    def __init__(
        self, width: int, experts: int, spec: MoESpec, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.spec, self.experts = spec, experts
        self.weight = nn.Parameter(torch.empty(experts, width))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5, generator=generator)
        # Gumbel(0, 1) of the logits' shape, and U(0, 1) a token: places for recorded draws.
        self.gumbel: Callable[[Tensor], Tensor] = lambda logits: (
            -torch.empty_like(logits).exponential_().log()
        )
        self.uniform: Callable[[Tensor], Tensor] = lambda logits: torch.rand(
            len(logits), device=logits.device
        )

    def forward(self, x_TD: Tensor) -> tuple[Routing, Report]:
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        spec, noise_TE, order_T = self.spec, None, None
        factor = spec.capacity_factor if self.training else spec.eval_capacity_factor
        if self.training and spec.noise == "gumbel":
            noise_TE = self.gumbel(logits_TE.detach())
        if self.training and spec.rules == "moe_llava" and spec.top_k == 1 and factor:
            order_T = self.uniform(logits_TE.detach())
        return route(logits_TE, spec, factor, noise_TE, order_T)


def capacity(tokens: int, experts: int, top_k: int, factor: float, least: int) -> int:
    """Choices an expert takes from a rank: ceil(tokens / experts * factor * top_k) (DeepSpeed, _capacity).

    In fp32 as there: 50 tokens, 8 experts, two choices and factor 1.2 make 16, in fp64 15.
    """
    places = tokens / experts * torch.tensor(factor * top_k, dtype=torch.float32, device="cpu")
    return max(int(places.ceil()), least)


def route(
    logits_TE: Tensor,
    spec: MoESpec,
    factor: float,
    noise_TE: Tensor | None = None,
    order_T: Tensor | None = None,
) -> tuple[Routing, Report]:
    """Choose, serve, drop, weigh.

    `factor` 0 drops nothing. `noise_TE` is added to the logits to choose beyond the first. `order_T` in
    [0, 1), or one a token and expert as DeepSpeed draws them (use_rts): who is served when an expert is full,
    highest first, not the first to come; of a single choice.
    """
    tokens, experts = logits_TE.shape
    chance_TE = logits_TE.softmax(-1)
    expert_TK = _choose(logits_TE, chance_TE, spec.top_k, noise_TE)
    chance_TK = chance_TE.gather(1, expert_TK)
    limit = capacity(tokens, experts, spec.top_k, factor, spec.min_capacity) if factor else None
    slot_TK, load_E = _slots(expert_TK, experts)
    if order_T is not None and limit is not None:
        drawn_T = order_T if order_T.dim() == 1 else order_T.gather(1, expert_TK)[:, 0]
        by_draw_T = torch.argsort(drawn_T, descending=True, stable=True)
        lost_T = _slots(expert_TK, experts, by_draw_T)[0][:, 0] >= limit
        # The survivors' places are in the order of tokens again.
        slot_TK, _ = _slots(expert_TK, experts, torch.argsort(lost_T.long(), stable=True))
    first_E = _counted(expert_TK[:, 0], experts)
    if limit is None:
        kept_TK, dropped = chance_TK, load_E.new_zeros(())
    else:
        kept_TK = chance_TK * (slot_TK < limit)
        dropped = (load_E - limit).clamp(min=0).sum()
    if spec.top_k > 1:
        weight_TK = kept_TK / kept_TK.sum(1, keepdim=True).clamp(min=torch.finfo(kept_TK.dtype).eps)
    elif spec.rules == "moe_llava":
        weight_TK = kept_TK
    else:
        # One, with the gradient of the logarithm: the router still learns which expert helps.
        weight_TK = kept_TK / chance_TK.detach()
    report = Report(
        score_E=chance_TE.sum(0),
        first_E=first_E,
        counts_E=first_E if spec.rules == "moe_llava" else load_E,
        dropped=dropped,
        tokens=tokens,
        z=logits_TE.logsumexp(-1).square().sum() / max(tokens, 1) if spec.z_loss else logits_TE.new_zeros(()),
        expert_TK=expert_TK,
    )
    return Routing(expert_TK, slot_TK, weight_TK, experts, limit, load_E), report


def _choose(logits_TE: Tensor, chance_TE: Tensor, top_k: int, noise_TE: Tensor | None) -> Tensor:
    """[T, K] int64, best first, the lower index among equals; noise does not touch the first choice.

    The first is the likeliest, which logits too close for fp32's softmax can be several of; others go by logits.
    """
    left_TE, chosen = logits_TE.detach(), []
    for k in range(top_k):
        best_T = left_TE.argmax(-1) if k else chance_TE.detach().argmax(-1)
        chosen.append(best_T)
        if k + 1 < top_k:
            if k == 0 and noise_TE is not None:
                left_TE = left_TE + noise_TE
            left_TE = left_TE.scatter(1, best_T[:, None], float("-inf"))
    return torch.stack(chosen, 1)


def _counted(expert_N: Tensor, experts: int) -> Tensor:
    """How often each expert is named: torch.bincount, for which a GPU's host would wait, twice."""
    return torch.zeros(experts, dtype=torch.int64, device=expert_N.device).scatter_add_(
        0, expert_N, torch.ones_like(expert_N)
    )


def _slots(expert_TK: Tensor, experts: int, arrival: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each choice's place in its expert's queue, first choices before second; and the queues' lengths.

    `arrival`: the order in which single choices come, where it is not the tokens'.
    """
    queue_N = expert_TK.t().reshape(-1)  # N = K * T, first choices first
    if arrival is None:
        arrival = torch.arange(len(queue_N), device=queue_N.device)
    else:
        queue_N = queue_N[arrival]
    by_expert_N = torch.argsort(queue_N, stable=True)
    load_E = _counted(queue_N, experts)
    start_E = load_E.cumsum(0) - load_E
    place_N = torch.arange(len(queue_N), device=queue_N.device) - start_E[queue_N[by_expert_N]]
    slot_N = torch.empty_like(place_N)
    slot_N[arrival[by_expert_N]] = place_N
    return slot_N.view(expert_TK.shape[1], -1).t().contiguous(), load_E
