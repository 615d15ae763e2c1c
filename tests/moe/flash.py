"""flash-attn's two functions written out, so that all that leads up to them runs where flash-attn cannot.

flash-attn needs a GPU. `taken` puts these in its place under transformers' own code for it: what prepares the calls
(moe.vlm, and transformers' unpadding, position ids, windows and scale) is the real one. Unlike flash-attn's they
take fp32 too, so that equality can be shown without rounding.

Shapes: B sequences, S positions, N positions of all sequences laid end to end, H heads, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as utils

from moe.vlm import VLM

Window = tuple[int, int]  # positions seen to the left and to the right; -1: all


@dataclass
class Calls:
    """What the kernels were asked for."""

    scales: set[float] = field(default_factory=set)
    lengths: list[list[int]] = field(default_factory=list)  # of each call's sequences
    padded: int = 0  # calls without sequences' ends


def attend(q_SHD: Tensor, k_SHD: Tensor, v_SHD: Tensor, scale: float, causal: bool, window: Window) -> Tensor:
    """One sequence; scores and softmax in fp32, the shares rounded like the values, as the kernel does."""
    heads = q_SHD.shape[1] // k_SHD.shape[1]
    k_SHD, v_SHD = (t.repeat_interleave(heads, 1) for t in (k_SHD, v_SHD))
    scores = torch.einsum("qhd,khd->hqk", q_SHD.float(), k_SHD.float()) * scale
    ahead = torch.arange(len(k_SHD)) - (torch.arange(len(q_SHD)) + len(k_SHD) - len(q_SHD))[:, None]
    hidden = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
    left, right = window
    if left >= 0:
        hidden = hidden | (ahead < -left)
    if right >= 0:
        hidden = hidden | (ahead > right)
    share = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(v_SHD.dtype)
    return torch.einsum("hqk,khd->qhd", share, v_SHD)


def taken(monkeypatch: pytest.MonkeyPatch, vlm: VLM, scale: float | None = None) -> Calls:
    """Let the model's attention be flash-attn, as written here; `scale` replaces the one that is asked for."""
    calls = Calls()

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Window = (-1, -1),
    ) -> Tensor:
        used = softmax_scale or q.shape[-1] ** -0.5
        calls.scales.add(used)
        calls.padded += 1
        rows = [attend(*each, scale or used, causal, window_size) for each in zip(q, k, v, strict=True)]
        return torch.stack(rows)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Window = (-1, -1),
    ) -> Tensor:
        used = softmax_scale or q.shape[-1] ** -0.5
        calls.scales.add(used)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        sizes_q, sizes_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert (max(sizes_q), max(sizes_k)) == (max_seqlen_q, max_seqlen_k)
        calls.lengths.append(sizes_q)
        parts = [torch.split(t, sizes) for t, sizes in ((q, sizes_q), (k, sizes_k), (v, sizes_k))]
        return torch.cat(
            [attend(*each, scale or used, causal, window_size) for each in zip(*parts, strict=True)]
        )

    process: Any = utils._lazy_define_process_function(flash_attn_varlen_func)
    for name, value in (
        ("_loaded_implementation", "flash_attention_2"),
        ("_flash_fn", flash_attn_func),
        ("_flash_varlen_fn", flash_attn_varlen_func),
        ("_pad_fn", utils._pad_input),
        ("_unpad_fn", utils._unpad_input),
        ("_process_flash_kwargs_fn", process),
    ):
        monkeypatch.setattr(utils, name, value)
    vlm.language.config._attn_implementation = "flash_attention_2"  # its setter looks for the real package
    return calls
