"""LANGUAGE and VISION: the models a run can start from, as rows of facts, and how transformers loads each.

Nothing here is chosen by the look of a path: a row names the transformers model type, so a checkpoint
may lie in a folder of any name. Only the standard library is imported at the top, because a login node
reads these tables too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
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
        "Qwen/Qwen3-1.7B",
        "qwen3",
        _QWEN2
        | {
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
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
    patches = (size // patch) ** 2 - (1 if drop and row.family == "siglip" else 0)
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


# ------------------------------------------------------------------ weights


def attention(spec: ModelSpec, dtype: Any) -> str:
    """transformers' name of the attention to use: flash-attn where it is installed and can run, else SDPA."""
    import torch
    from transformers.utils import is_flash_attn_2_available

    useful = torch.cuda.is_available() and dtype in (torch.bfloat16, torch.float16)
    if spec.attention == "auto":
        return "flash_attention_2" if useful and is_flash_attn_2_available() else "sdpa"
    if spec.attention == "flash":
        if not is_flash_attn_2_available():
            raise BackboneError(
                "model.attention is flash, but flash-attn is not installed here; install it "
                "(pip install flash-attn) or set model.attention=auto, which does without it"
            )
        if not useful:
            raise BackboneError(
                "model.attention is flash, which needs a CUDA device and train.precision=bf16; "
                "set model.attention=auto"
            )
        return "flash_attention_2"
    return spec.attention


def load_language(spec: ModelSpec, *, vocab_size: int, seed: int, dtype: Any, filled: bool = True) -> Any:
    """The causal language model, on the CPU, in `dtype`: random from `seed`, or from its weights.

    Weights are read tensor by tensor straight into `dtype`; no fp32 copy of the whole is ever held. Without
    `filled` only the structure is made, from the config alone: a checkpoint is about to fill it.
    """
    import transformers

    row = language(spec)
    name, implementation = spec.weights or row.hub, attention(spec, dtype)
    if spec.random:
        config = language_config(row.model_type, {**row.config, "vocab_size": vocab_size})
    elif row.own_config:
        config = language_config(row.model_type, row.config)
    else:
        config = _found("model.weights", name, partial(transformers.AutoConfig.from_pretrained, name))
        if config.model_type != row.model_type:
            raise BackboneError(
                f"model.weights: {name} holds a model of type {config.model_type!r}, but model.backbone "
                f"{spec.backbone!r} is of type {row.model_type!r}; change one of the two"
            )
        for key, value in spec.config.items():
            setattr(config, key, value)
    if spec.random or not filled:
        try:
            with nullcontext() if filled else unfilled():
                model = _random(lambda: _causal(config, implementation, dtype), seed)
        except (ArithmeticError, TypeError, ValueError) as wrong:
            raise BackboneError(
                f"model.config: no {row.model_type} can be built from it: {wrong}; see that hidden_size is a "
                "multiple of num_attention_heads, and that of num_key_value_heads"
            ) from wrong
        if not filled:
            model.tie_weights()
    elif row.own_config:
        model = _from_tensors(spec, row, config, name, dtype)
    else:
        read = partial(
            transformers.AutoModelForCausalLM.from_pretrained,
            name,
            config=config,
            dtype=dtype,
            attn_implementation=implementation,
        )
        model = _found("model.weights", name, read)
    if model.get_input_embeddings().weight.shape[0] < vocab_size:
        _random(lambda: model.resize_token_embeddings(vocab_size, mean_resizing=False), seed)
    model.config.use_cache = False
    return model


def language_config(model_type: str, values: Mapping[str, object]) -> Any:
    """transformers' config of that type; `rope_theta` and `partial_rotary_factor` may be given flat."""
    from transformers import AutoConfig

    known = dict(values)
    rope: dict[str, object] = {k: known.pop(k) for k in ("rope_theta", "partial_rotary_factor") if k in known}
    if rope:
        known.setdefault("rope_parameters", {"rope_type": "default", **rope})
    try:
        return AutoConfig.for_model(model_type, **known)
    except (TypeError, ValueError) as wrong:
        raise BackboneError(f"model.config: transformers refuses it for a {model_type}: {wrong}") from wrong


def load_tower(spec: ModelSpec, *, seed: int, dtype: Any, filled: bool = True) -> Any:
    """The image tower, cut behind the layer it is read at: what lies above is never computed."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    row = vision(spec)
    kind, model_class = (
        (CLIPVisionConfig, CLIPVisionModel)
        if row.family == "clip"
        else (SiglipVisionConfig, SiglipVisionModel)
    )
    name = spec.tower_weights or row.hub
    if spec.random:
        config = kind(**row.config)
    else:
        config = _found("model.tower_weights", name, partial(kind.from_pretrained, name))
        for key, value in vision(spec).config.items():
            if key in spec.tower_config:
                setattr(config, key, value)
    layers = config.num_hidden_layers
    config.num_hidden_layers = layers + 1 + row.select_layer if row.select_layer < 0 else row.select_layer
    if not 0 < config.num_hidden_layers <= layers:
        raise BackboneError(
            f"model.tower_config.select_layer ({row.select_layer}): the tower has {layers} layers"
        )
    if row.family == "siglip":
        config.vision_use_head = False
    how = {"config": config, "dtype": dtype, "attn_implementation": "sdpa"}
    if spec.random or not filled:
        with nullcontext() if filled else unfilled():
            model = _random(lambda: model_class._from_config(**how), seed)
    else:
        model = _found("model.tower_weights", name, partial(model_class.from_pretrained, name, **how))
    # It belongs to what was cut; SigLIP would apply it to every patch.
    model.post_layernorm = torch.nn.Identity()
    return model.requires_grad_(False).eval()


def _random(build: Callable[[], Any], seed: int) -> Any:
    """Build with the global generator seeded and put back after: equal on all ranks."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


@contextmanager
def unfilled() -> Iterator[None]:
    """Models built inside are not initialised: their weights are about to be read."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


def _causal(config: Any, implementation: str, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation)


def _found(key: str, name: str, load: Callable[..., Any]) -> Any:
    """Load from a folder or the hub's cache, else from the hub; or say in words why not."""
    from transformers.utils import logging

    if os.sep in name and Path(name).is_absolute() and not Path(name).exists():
        raise BackboneError(f"{key}: there is no folder {name}")
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # the report of unused keys: we cut towers on purpose
    logging.disable_progress_bar()
    try:
        try:
            return load(local_files_only=True)
        except OSError:
            if Path(name).exists() or os.environ.get("HF_HUB_OFFLINE", "0") == "1":
                raise
            return load()
    except (OSError, ValueError) as wrong:
        reason = str(wrong).strip().splitlines()[0] if str(wrong).strip() else type(wrong).__name__
        if Path(name).exists():
            raise BackboneError(f"{key}: {name} cannot be read as a model: {reason}") from wrong
        raise BackboneError(
            f"{key}: {name} is neither a folder nor in this machine's Hugging Face cache, and the hub "
            f"did not give it ({reason}). Fetch it once where there is a network (hf download {name}), "
            "or name a folder"
        ) from wrong
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(_found("model.weights", name, lambda **kw: snapshot_download(name, **kw)))


def _from_tensors(spec: ModelSpec, row: Language, config: Any, name: str, dtype: Any) -> Any:
    """A native model filled with weights that were published for remote code."""
    import torch

    with torch.device("meta"):
        model = _causal(config, attention(spec, dtype), dtype)
    rename = qwen1_names if row.layout == "qwen1" else native_names
    state = {
        new: part.to(dtype) for old, tensor in tensors(_folder(name)) for new, part in rename(old, tensor)
    }
    if config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state.get("model.embed_tokens.weight"))
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise BackboneError(
            f"model.weights: {name} does not hold a {spec.backbone}: "
            f"missing {missing[:3]}, unknown {unexpected[:3]}"
        )
    model.tie_weights()
    # Buffers are no weights: rotary frequencies are computed, and were left on the meta device.
    fresh = type(model.model.rotary_emb)(config)
    model.model.rotary_emb = fresh
    return model


def tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Every tensor of a folder of safetensors or .bin shards, one shard mapped at a time."""
    import torch
    from safetensors import safe_open

    # Other files may lie beside them: transformers' own names come first.
    shards = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not shards:
        shards = sorted(folder.glob("pytorch_model*.bin")) or sorted(folder.glob("mm_projector.bin"))
    if not shards:
        raise BackboneError(f"{folder} holds no *.safetensors and no pytorch_model*.bin")
    for shard in shards:
        if shard.suffix == ".safetensors":
            with safe_open(shard, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a dict
                    yield key, opened.get_tensor(key)
        else:
            yield from torch.load(shard, map_location="cpu", weights_only=True, mmap=True).items()


def native_names(key: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    """Names as transformers' own class has them."""
    if not key.endswith("rotary_emb.inv_freq"):
        yield key, tensor


_QWEN1 = {
    "transformer.wte.": "model.embed_tokens.",
    "transformer.ln_f.": "model.norm.",
    "transformer.h.": "model.layers.",
    ".ln_1.": ".input_layernorm.",
    ".ln_2.": ".post_attention_layernorm.",
    ".attn.c_proj.": ".self_attn.o_proj.",
    ".mlp.w1.": ".mlp.up_proj.",
    ".mlp.w2.": ".mlp.gate_proj.",  # the activation is applied to w2's output
    ".mlp.c_proj.": ".mlp.down_proj.",
}


def qwen1_names(key: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    """Qwen-1's names and its fused attention, as Qwen2 has them (modeling_qwen.py of Qwen/Qwen-1_8B)."""
    if ".attn.c_attn." in key:
        layer, kind = key.split(".attn.c_attn.")
        for name, part in zip("qkv", tensor.chunk(3, dim=0), strict=True):
            yield f"{layer.replace('transformer.h.', 'model.layers.')}.self_attn.{name}_proj.{kind}", part
    elif not key.endswith("rotary_emb.inv_freq"):
        for old, new in _QWEN1.items():
            key = key.replace(old, new)
        yield key, tensor


def hub_bases() -> Any:
    """transformers' classes that `moe.hub` builds on, and `register(config, model)`."""
    from types import SimpleNamespace

    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
    from transformers.utils import ModelOutput

    def register(config: Any, model: Any) -> None:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)

    return SimpleNamespace(
        Config=PreTrainedConfig, Model=PreTrainedModel, Output=ModelOutput, register=register
    )


# ------------------------------------------------------------------ tokenizers


def load_tokenizer(spec: ModelSpec, folder: Path | None = None) -> Tokenizer:
    """The tokenizer with unk, pad and eos as the reference sets them (moellava/train/train.py, ~1325).

    A `tokenizer.json` is taken word for word: transformers 5 would rebuild Llama's and GPT-2's from their
    class and give other ids to text that begins with a space, as every text after an image does.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    row = language(spec)
    if folder is None and spec.tokenizer.startswith("train:"):
        raise BackboneError(
            f"model.tokenizer is {spec.tokenizer!r}: it has to be trained on the run's texts first, "
            "and the run's folder holds none yet"
        )
    name = str(folder) if folder is not None else spec.tokenizer or spec.weights or row.hub

    def load(**kw: Any) -> Tokenizer:
        if not Path(name).is_dir() or (Path(name) / "tokenizer.json").is_file():
            try:
                return PreTrainedTokenizerFast.from_pretrained(name, **kw)
            except (OSError, ValueError):
                if Path(name).is_dir():
                    raise
        return AutoTokenizer.from_pretrained(name, **kw)

    tokenizer = _found("model.tokenizer", name, load)
    tokenizer.padding_side = "right"
    if row.eos and row.eos in tokenizer.get_vocab():
        tokenizer.eos_token = row.eos
    if tokenizer.unk_token is None or tokenizer.unk_token == tokenizer.eos_token:
        wanted = row.unk or "<|extra_0|>"
        if wanted in tokenizer.get_vocab():
            tokenizer.unk_token = wanted
        else:
            tokenizer.add_special_tokens({"unk_token": wanted})
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of `size` tokens that never adds a first token; unk and pad are `<unk>`.

    `</s>` and `<|endoftext|>`, the ends of the v1 and phi templates, are one token each; eos is `</s>`.
    """
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "</s>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + len(specials):
        raise BackboneError(
            f"model.tokenizer: train:{size} has no room for the 256 bytes and {len(specials)} specials; "
            f"say train:{len(alphabet) + len(specials)} or more"
        )
    trained = Trained(models.BPE(unk_token=None))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=size, special_tokens=specials, initial_alphabet=sorted(alphabet), show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, unk_token="<unk>", pad_token="<unk>", eos_token="</s>", padding_side="right"
    )
