"""Answers to questions about images: greedy, batched, with a key-value cache; and a command to ask them.

    python moe/generate.py RUN/checkpoints/step_00000100 --image a.jpg --image b.jpg "What differs?"
    python moe/generate.py RUN/checkpoints/step_00000100 --image a.jpg        # a conversation

Prompts of one batch end together: they are padded on the left, padding is masked and routed nowhere. Ranks
that share experts answer in step: whoever has finished makes passes without tokens until the last one has.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Run as a file, Python puts moe/ at the head of the path; the repository belongs there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    importlib.import_module("launch.door").enter("launch.ask")  # and so this file is imported, not run

import torch
import torch.distributed as dist
from torch import Tensor

from moe.parallel import Groups
from moe.router import Traffic
from moe.vlm import VLM


@torch.no_grad()
def answer(
    vlm: VLM,
    tokenizer: Any,
    prompts: list[list[int]],
    pixel_values: list[Tensor],
    *,
    end: int | None,
    max_new_tokens: int,
    groups: Groups,
) -> list[str]:
    """One text a prompt; `pixel_values`: a prompt's images, [n, 3, H, W], n may be 0; `end`: the token that ends one.

    All ranks of an expert group must call it with equally many prompts.
    """
    tokens = greedy(vlm, prompts, pixel_values, max_new_tokens=max_new_tokens, end=end, groups=groups)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens]


@torch.no_grad()
def greedy(
    vlm: VLM,
    prompts: list[list[int]],
    pixel_values: list[Tensor],
    *,
    max_new_tokens: int,
    end: int | None,
    groups: Groups,
) -> list[list[int]]:
    """The likeliest next token, up to max_new_tokens times a prompt; without the one that ends it."""
    if not prompts:
        return []
    training, device = vlm.training, vlm.language.get_input_embeddings().weight.device
    vlm.eval()
    try:
        embeds, mask = _padded(vlm, prompts, pixel_values, device)
        said: list[list[int]] = [[] for _ in prompts]
        running = torch.ones(len(prompts), dtype=torch.bool, device=device)
        past = None
        real = mask
        for _ in range(max_new_tokens):
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
            traffic = Traffic.of(real, vlm.moe)
            extra = {} if traffic is None else {"traffic": traffic}
            output = vlm.language.model(
                inputs_embeds=embeds,
                attention_mask=mask.long(),
                position_ids=position,
                past_key_values=past,
                use_cache=True,
                **extra,
            )
            past = output.past_key_values
            token = vlm.head(output.last_hidden_state[:, -1]).argmax(-1)
            if end is not None:
                running = running & (token != end)
            for row, (alive, chosen) in enumerate(zip(running.tolist(), token.tolist(), strict=True)):
                if alive:
                    said[row].append(chosen)
            if not _any(running, groups):
                break
            embeds = vlm.language.get_input_embeddings()(token)[:, None]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            real = running[:, None]
    finally:
        vlm.train(training)
    return said


def _padded(
    vlm: VLM, prompts: list[list[int]], pixel_values: list[Tensor], device: torch.device
) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids in prompts)
    ids = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
    length = torch.tensor([len(p) for p in prompts], device=device)
    given = torch.arange(longest, device=device) < length[:, None]
    return left(vlm, ids, given, torch.cat(pixel_values).to(device) if pixel_values else None)


def left(
    vlm: VLM, input_ids: Tensor, attention_mask: Tensor | None, pixel_values: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Text and images spliced and padded on the left: ([B, S, D], [B, S] bool)."""
    spliced = vlm.splice(input_ids, attention_mask, None, pixel_values)
    device = spliced.mask.device
    size = spliced.mask.sum(1, keepdim=True)
    # Each row turned to the right by its padding.
    places = torch.arange(spliced.mask.shape[1], device=device) - (spliced.mask.shape[1] - size)
    mask = places >= 0
    index = places.clamp(min=0)[..., None].expand_as(spliced.embeds)
    return spliced.embeds.gather(1, index) * mask[..., None], mask


def _any(running: Tensor, groups: Groups) -> bool:
    """Whether any rank that shares these experts still has a sequence to go on with."""
    some = running.any().to(torch.int32)
    if groups.expert_parallel > 1:
        dist.all_reduce(some, op=dist.ReduceOp.MAX, group=groups.expert_group)
    return bool(some)


# ------------------------------------------------------------------ the command's door


def main(arguments: Sequence[str] | None = None) -> int:
    """As `launch.ask.main`: the command puts model and data together, which only launch may."""
    return int(importlib.import_module("launch.ask").main(arguments))
