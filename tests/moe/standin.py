"""A model of a few thousand parameters with experts on several ranks, and data for it: for tests of the
training alone.

Every token goes to every expert, weighted by a softmax, so that no dropped token hides a wrong gradient;
tokens travel by an all-gather, experts' answers by an all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import deepspeed  # noqa: F401  this and the next before ranks are forked: each would import 1,400 modules, 2 s
import torch
import torch._inductor.compile_fx
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from moe.parallel import Groups
from moe.spec import OptimSpec, TrainSpec

WORDS, WIDTH, EXPERTS, LENGTH = 37, 16, 4, 12


@dataclass
class Output:
    ce_sum: torch.Tensor
    tokens: torch.Tensor
    aux_losses: list = field(default_factory=list)
    router_loss: torch.Tensor | None = None
    expert_counts: list = field(default_factory=list)
    dropped: list = field(default_factory=list)


class Gather(torch.autograd.Function):
    """[T, D] -> [ranks * T, D]; a token's gradient is the sum over the ranks that used it."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.rows = group, len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.split(ctx.rows)[dist.get_rank(ctx.group)], None


class Sum(torch.autograd.Function):
    """The sum over ranks; so is its gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class Experts(nn.Module):
    def __init__(self, groups: Groups, experts: int = EXPERTS):
        super().__init__()
        self.groups, self.experts = groups, experts
        here = groups.local_experts(experts)
        whole = torch.randn(experts, WIDTH, WIDTH) * 0.2
        self.up = nn.Parameter(whole[here].clone())
        self.bias = nn.Parameter(torch.zeros(experts, WIDTH)[here].clone())
        for parameter in (self.up, self.bias):
            parameter.expert_dim, parameter.expert_offset, parameter.expert_total = 0, here.start, experts

    def forward(self, x, weight):
        here = self.groups.local_experts(self.experts)
        shared = self.groups.expert_parallel > 1
        rows = len(x)
        if shared:
            x, weight = (
                Gather.apply(x, self.groups.expert_group),
                Gather.apply(weight, self.groups.expert_group),
            )
        each = torch.einsum("td,ehd->teh", x, self.up) + self.bias
        y = (torch.tanh(each) * weight[:, here, None]).sum(1)
        if shared:
            y = Sum.apply(y, self.groups.expert_group).split(rows)[self.groups.expert_rank]
        return y


class Layer(nn.Module):
    def __init__(self, groups: Groups):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = Experts(groups)

    def forward(self, x):
        scores = F.softmax(self.router(self.norm(x)).float(), -1)
        counts = torch.bincount(scores.argmax(-1).flatten(), minlength=EXPERTS)
        aux = EXPERTS * (scores.mean(0) ** 2).sum()
        return x + self.experts(x, scores.to(x.dtype)), aux, counts


class Model(nn.Module):
    """Named as the real one's parts are: a frozen tower, a projector, the language model."""

    def __init__(self, groups: Groups, *, layers: int = 2, seed: int = 0, aux_loss: float = 0.1):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tower = nn.Linear(WIDTH, WIDTH)
            self.projector = nn.Linear(WIDTH, WIDTH)
            self.embed = nn.Embedding(WORDS, WIDTH)
            self.layers = nn.ModuleList(Layer(groups) for _ in range(layers))
            self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.tower.requires_grad_(False)
        self.register_buffer("scale", torch.full((3,), 1.5))
        self.aux_loss = aux_loss

    def forward(self, input_ids, attention_mask, labels, pixel_values=None):
        shape = input_ids.shape
        x = self.embed(input_ids.flatten())
        x = x + self.projector(torch.tanh(self.tower(x.detach())))
        # Each word sees its neighbour to the left, so that there is something to learn.
        x = x + 0.3 * x.view(*shape, WIDTH).roll(1, 1).flatten(0, 1)
        aux, counts = [], []
        for layer in self.layers:
            x, loss, count = layer(x)
            aux.append(loss)
            counts.append(count)
        logits = self.head(x).view(*shape, WORDS).float()[:, :-1]
        target = labels[:, 1:]
        ce = F.cross_entropy(
            logits.reshape(-1, WORDS), target.reshape(-1), ignore_index=-100, reduction="sum"
        )
        ce = ce + 0 * logits.sum()
        lost = [count.new_tensor(layer + 1) for layer, count in enumerate(counts)]
        router = self.aux_loss * torch.stack(aux).sum()
        return Output(ce, (target != -100).sum(), aux, router, counts, lost)


def batch(samples: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Some sentences; each has its own number of supervised tokens."""
    ids = torch.randint(0, WORDS, (len(samples), LENGTH), generator=generator)
    ids[:, 1::2] = (ids[:, 0::2] * 3 + 1) % WORDS
    labels = ids.clone()
    for row, sample in enumerate(samples.tolist()):
        labels[row, : 1 + sample % 7] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids, dtype=torch.bool)}


class Loader:
    """An endless global stream: step s holds the same sentences whatever the world, cut as micro-batches."""

    def __init__(
        self, groups: Groups, *, global_batch: int = 8, micro: int = 1, silent: tuple[int, ...] = ()
    ):
        self.groups, self.global_batch, self.micro, self.silent = groups, global_batch, micro, silent
        self.step = 0

    def steps(self):
        while True:
            generator = torch.Generator().manual_seed(1000 + self.step)
            whole = batch(torch.arange(self.global_batch) + self.step, generator)
            if self.step in self.silent:
                whole["labels"][:] = -100
            each = self.global_batch // self.groups.world
            mine = slice(self.groups.rank * each, (self.groups.rank + 1) * each)
            self.step += 1
            here = {name: tensor[mine] for name, tensor in whole.items()}
            chunks = {name: tensor.split(self.micro) for name, tensor in here.items()}
            yield [{n: c[i] for n, c in chunks.items()} for i in range(each // self.micro)]

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def spec(**changes) -> TrainSpec:
    """Eight sentences a step; the learning rate is high enough for a wrong gradient to show."""
    optim = OptimSpec(**{"lr": 1e-2, "warmup": 0.2, **changes.pop("optim", {})})
    return TrainSpec(
        **{"precision": "fp32", "zero": 2, "global_batch": 8, "micro_batch": 1, "optim": optim, **changes}
    )
