"""LANGUAGE and VISION: the models a run can start from, as rows of facts, and how transformers loads each.

Nothing here is chosen by the look of a path: a row names the transformers model type, so a checkpoint
may lie in a folder of any name. Only the standard library is imported at the top, because a login node
reads these tables too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moe.spec import ModelSpec

Tokenizer = Any  # transformers.PreTrainedTokenizerBase; transformers ships no types


class BackboneError(RuntimeError):
    """A model or tokenizer that cannot be had, in words."""


@dataclass(frozen=True)
class Language:
    """One language model; `config` is its whole architecture, so that it can be built without a download."""

    hub: str
    model_type: str  # transformers' own name of the class that carries it
    config: Mapping[str, object]
    template: str  # the conversation template the reference trains it with
    unk: str = ""  # the token that serves as unk and pad where the tokenizer has no unk of its own
    eos: str = ""  # where the tokenizer's own end is not the one training ends answers with
    layout: Literal["native", "qwen1"] = "native"  # how the published weights name their tensors
    own_config: bool = False  # the published config.json is for remote code: build from this row's


@dataclass(frozen=True)
class Vision:
    """One image tower; the patches are what it gives the projector for one image."""

    hub: str
    family: Literal["clip", "siglip"]
    size: int  # pixels a side
    patch: int  # pixels a side
    patches: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Literal["crop", "squash"]  # shortest edge and centre crop, or both edges whatever the aspect
    config: Mapping[str, object]
    select_layer: int = -2  # which hidden state; negative counts from the last
    drop_first: bool = (
        True  # CLIP's first position is no patch; with SigLIP only the reference's weights want it
    )


_LLAMA: dict[str, object] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
_MISTRAL: dict[str, object] = _LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
_QWEN2: dict[str, object] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}

LANGUAGE: dict[str, Language] = {
    "phi2": Language(
        "microsoft/phi-2",
        "phi",
        {
            "vocab_size": 51200,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "hidden_act": "gelu_new",
            "partial_rotary_factor": 0.4,
            "rope_theta": 10000.0,
            "layer_norm_eps": 1e-5,
        },
        template="phi",
        unk="<|extra_0|>",
    ),
    "stablelm": Language(
        "stabilityai/stablelm-2-1_6b",
        "stablelm",
        {
            "vocab_size": 100352,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000.0,
            "layer_norm_eps": 1e-5,
            "use_qkv_bias": True,
        },
        template="stablelm",
        unk="<|reg0|>",
    ),
    "qwen": Language(
        "Qwen/Qwen-1_8B",
        "qwen2",
        # Its config.json says 11008 for the two halves together.
        _QWEN2 | {"max_position_embeddings": 8192, "rope_theta": 10000.0},
        template="qwen",
        unk="<|extra_0|>",
        eos="<|endoftext|>",
        layout="qwen1",
        own_config=True,
    ),
    "qwen1_5": Language("Qwen/Qwen1.5-1.8B", "qwen2", _QWEN2, template="qwen", unk="<|extra_0|>"),
    "qwen2": Language(
        "Qwen/Qwen2-1.5B",
        "qwen2",
        _QWEN2
        | {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
        template="qwen",
        unk="<|extra_0|>",
    ),
    "qwen2_5": Language(
        "Qwen/Qwen2.5-3B",
        "qwen2",
        _QWEN2
        | {
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        template="qwen",
        unk="<|extra_0|>",
    ),
    "qwen3": Language(
        "Qwen/Qwen3-1.7B-Base",  # the other one's eos is <|im_end|>: that is for `data.template: chat`
        "qwen3",
        _QWEN2
        | {
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
        template="qwen",
        unk="<|extra_0|>",
    ),
    "openchat": Language(
        "openchat/openchat-3.5-1210",
        "mistral",
        _MISTRAL | {"vocab_size": 32002, "max_position_embeddings": 8192},
        template="openchat",
        eos="<|end_of_turn|>",
    ),
    "mistral": Language("mistralai/Mistral-7B-v0.1", "mistral", _MISTRAL, template="mistral"),
    "llama": Language("meta-llama/Llama-2-7b-hf", "llama", _LLAMA, template="v1"),
    "vicuna": Language("lmsys/vicuna-7b-v1.5", "llama", _LLAMA, template="v1"),
    # Granite is MiniCPM's arithmetic: embeddings x scale_emb, residuals x scale_depth / sqrt(layers),
    # logits / (hidden / dim_model_base) (openbmb/MiniCPM-2B-sft-bf16, modeling_minicpm.py).
    "minicpm": Language(
        "openbmb/MiniCPM-2B-sft-bf16",
        "granite",
        _LLAMA
        | {
            "vocab_size": 122753,
            "hidden_size": 2304,
            "intermediate_size": 5760,
            "num_hidden_layers": 40,
            "num_attention_heads": 36,
            "num_key_value_heads": 36,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 1.4 / 40**0.5,
            "attention_multiplier": 0.125,
            "logits_scaling": 9.0,
        },
        template="minicpm",
        own_config=True,
    ),
}

_CLIP: dict[str, object] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

VISION: dict[str, Vision] = {
    "clip-l-336": Vision(
        "openai/clip-vit-large-patch14-336", "clip", 336, 14, 576, _CLIP_MEAN, _CLIP_STD, "crop", _CLIP
    ),
    "clip-l-224": Vision(
        "openai/clip-vit-large-patch14", "clip", 224, 14, 256, _CLIP_MEAN, _CLIP_STD, "crop", _CLIP
    ),
    "siglip-384": Vision(
        "google/siglip-so400m-patch14-384",
        "siglip",
        384,
        14,
        729,
        (0.5, 0.5, 0.5),
        (0.5, 0.5, 0.5),
        "squash",
        {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
        drop_first=False,
    ),
}


def _row(table: Mapping[str, Any], name: str, key: str) -> Any:
    if name not in table:
        raise BackboneError(f"model.{key}: {name!r} is none of {', '.join(table)}")
    return table[name]


def language(spec: ModelSpec) -> Language:
    """The row with spec.config applied."""
    row: Language = _row(LANGUAGE, spec.backbone, "backbone")
    return replace(row, config={**row.config, **spec.config})


def vision(spec: ModelSpec) -> Vision:
    """The row with spec.tower_config applied; `select_layer` and `drop_first` may stand there too.

    `drop_first: true` gives SigLIP the 728 patches of the reference's released weights
    (moellava/model/multimodal_encoder/siglip_encoder.py drops index 0 though there is no class position).
    """
    row: Vision = _row(VISION, spec.tower, "tower")
    changes = dict(spec.tower_config)
    size, patch = (
        int(str(changes.get("image_size", row.size))),
        int(str(changes.get("patch_size", row.patch))),
    )
    select, drop = (
        int(str(changes.pop("select_layer", row.select_layer))),
        changes.pop("drop_first", row.drop_first),
    )
    # CLIP's class position is one more that may be kept, SigLIP's first patch one that may be dropped.
    patches = (size // patch) ** 2 + (row.family == "clip") - bool(drop)
    config = {**row.config, **changes, "image_size": size, "patch_size": patch}
    return replace(
        row,
        size=size,
        patch=patch,
        patches=patches,
        config=config,
        select_layer=select,
        drop_first=bool(drop),
    )


def load_tokenizer(spec: ModelSpec, folder: Path | None = None) -> Tokenizer:
    """As `moe.tokens.load_tokenizer`."""
    from moe import tokens

    return tokens.load_tokenizer(spec, folder)


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """As `moe.tokens.train_tokenizer`."""
    from moe import tokens

    return tokens.train_tokenizer(texts, size)
