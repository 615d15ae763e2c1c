"""Samples laid end to end, each attending to itself alone: SDPA without a mask and without what lies between them.

A mask of S x S would have the kernels compute all of it: at 16k positions more than the rest of the model does. The
sizes of the samples are told instead: on a GPU to torch's flash-attn for sequences of unequal lengths, elsewhere the
samples are attended to one after the other. It is registered with transformers in the place of its own SDPA, which
takes every call that names no sizes.

Shapes: N positions, H heads, W width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


def there(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; the host does not wait for the copy, nor the copy for the device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def told(language: Any, segments: Tensor) -> dict[str, Any]:
    """What keeps samples packed into rows [B, S] apart in a model of transformers, as arguments of its call.

    Each sees itself alone and counts from 0. A mask for eager attention; for the others, which take none, where samples
    end in all rows laid end to end: position_ids are then [1, B * S].
    """
    embeddings = language.get_input_embeddings().weight
    device, implementation = embeddings.device, language.config._attn_implementation
    if implementation == "sdpa" or implementation.startswith("flash"):
        starts, sizes = cut(segments)
        repeats = torch.tensor(sizes, device=starts.device)
        first = starts.repeat_interleave(repeats, output_size=segments.numel())
        position = torch.arange(segments.numel(), device=starts.device) - first
        found: dict[str, Any] = {"position_ids": there(position[None], device)}
        if implementation == "sdpa":
            register()
            return found | {"attention_mask": sizes_as_mask(tuple(sizes), device)}
        ends = torch.cat([starts, starts.new_tensor([segments.numel()])])
        both, longest = there(ends.to(torch.int32), device), max(sizes)
        return found | {
            **{"cu_seq_lens_q": both, "cu_seq_lens_k": both},
            **{"max_length_q": longest, "max_length_k": longest},
        }
    segments = there(segments, device)
    step = torch.arange(segments.shape[1], device=device)
    same = segments[:, :, None] == segments[:, None, :]
    seen, back = same & (step[:, None] >= step), window(language)
    if back is not None:
        seen &= step[:, None] - step < back
    first = torch.where(same, step, segments.shape[1]).amin(-1)
    # Eager attention adds its mask instead of choosing by it.
    mask = torch.zeros_like(seen, dtype=embeddings.dtype).masked_fill(
        ~seen, torch.finfo(embeddings.dtype).min
    )
    return {"attention_mask": mask[:, None], "position_ids": step - first}


def window(language: Any) -> int | None:
    """How far back a position sees, where it is not to the beginning."""
    return getattr(language.config, "sliding_window", None)


def cut(segments: Tensor) -> tuple[Tensor, list[int]]:
    """(first positions of the samples in rows [B, S] laid end to end, int64; their sizes). Padding is samples too."""
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    return starts, starts.diff(append=starts.new_tensor([segments.numel()])).tolist()


def sizes_as_mask(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """What to give a model as its attention mask: some of transformers' hand their attention nothing else.

    Without sizes each row is one sample, whose positions see all before them. It has four dimensions, by which
    transformers takes it for made; of another, or of none, it would make one of S x S where it sees packed samples.
    """
    mask = torch.full((1, 1, 1, 1), torch.nan, device=device)  # taken for a mask, it would not go unnoticed
    mask.sample_sizes = sizes  # type: ignore[attr-defined]
    return mask


@cache
def register() -> None:
    """Let transformers' models take sizes for a mask under the name of sdpa."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **how: Any,
) -> tuple[Tensor, None]:
    """transformers' attention: [1, H, N, W] -> [1, N, H, W]."""
    sample_sizes: tuple[int, ...] | None = getattr(attention_mask, "sample_sizes", None)
    if not sample_sizes:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        mask = attention_mask if sample_sizes is None else None
        return cast(tuple[Tensor, None], sdpa_attention_forward(module, query, key, value, mask, **how))
    scale, dropout, window = how.get("scaling"), how.get("dropout", 0.0), how.get("sliding_window")
    kernel = _varlen() if query.is_cuda and query.element_size() == 2 and not dropout else None
    if kernel is not None:
        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
        return by_sizes(kernel, q, k, v, sample_sizes, scale, window)[None], None
    done = []
    pieces = (torch.split(part, list(sample_sizes), 2) for part in (query, key, value))
    for q, k, v in zip(*pieces, strict=True):
        mask = None
        if window is not None and q.shape[2] > window:
            behind = torch.arange(q.shape[2], device=q.device)
            behind = behind[:, None] - behind
            mask = (behind >= 0) & (behind < window)
        how = {"scale": scale, "dropout_p": dropout, "enable_gqa": k.shape[1] != q.shape[1]}
        done.append(F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, **how))
    return torch.cat(done, 2).transpose(1, 2), None


def by_sizes(
    kernel: Callable[..., Tensor],
    q_NHW: Tensor,
    k_NHW: Tensor,
    v_NHW: Tensor,
    sizes: tuple[int, ...],
    scale: float | None,
    window: int | None,
) -> Tensor:
    """The call of torch's kernel."""
    ends = there(torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32), q_NHW.device)
    left = -1 if window is None else window - 1
    return kernel(
        *(part.contiguous() for part in (q_NHW, k_NHW, v_NHW)),
        *(ends, ends, max(sizes), max(sizes)),
        scale=scale,
        window_size=(left, 0),
        enable_gqa=k_NHW.shape[1] != q_NHW.shape[1],
    )


@cache
def _varlen() -> Callable[..., Tensor] | None:
    """torch's kernel, where it is there and takes what is asked of it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    asked = {"scale", "window_size", "enable_gqa"}
    takes = asked <= inspect.signature(varlen_attn).parameters.keys()
    return cast(Callable[..., Tensor], varlen_attn) if takes else None
