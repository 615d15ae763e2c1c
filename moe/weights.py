"""Published weights into transformers' own classes, on the CPU, in the precision asked for.

A model is sought in a folder, then in the Hugging Face cache, then on the hub; transformers is imported only when
something is loaded.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from moe.backbones import BackboneError, Language, language, vision
from moe.spec import ModelSpec


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
        config = found("model.weights", name, partial(transformers.AutoConfig.from_pretrained, name))
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
        if not getattr(config, "lm_head_bias", True):  # see moe.reference
            model.lm_head.bias = None
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
        model = found("model.weights", name, read)
    if model.get_input_embeddings().weight.shape[0] < vocab_size:
        _random(lambda: model.resize_token_embeddings(vocab_size, mean_resizing=False), seed)
    model.config.use_cache = False
    _fuse(model)
    return model


def _fuse(model: Any) -> None:
    """Phi's tanh-approximated GELU in one kernel: written out, it is eight, which keep four tensors and not one."""
    from transformers.activations import GELUTanh, NewGELUActivation

    for module in model.modules():
        if isinstance(getattr(module, "activation_fn", None), NewGELUActivation):
            module.activation_fn = GELUTanh()


def language_config(model_type: str, values: Mapping[str, object]) -> Any:
    """transformers' config of that type; `rope_theta` and `partial_rotary_factor` may be given flat."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    known = dict(values)
    rope: dict[str, object] = {k: known.pop(k) for k in ("rope_theta", "partial_rotary_factor") if k in known}
    if rope:
        known.setdefault("rope_parameters", {"rope_type": "default", **rope})
    try:
        return AutoConfig.for_model(model_type, **known)
    except (TypeError, ValueError, StrictDataclassError) as wrong:
        said = " ".join(str(wrong).split())
        raise BackboneError(f"model.config: transformers refuses it for a {model_type}: {said}") from wrong


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
        config = found("model.tower_weights", name, partial(kind.from_pretrained, name))
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
        model = found("model.tower_weights", name, partial(model_class.from_pretrained, name, **how))
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


def found(key: str, name: str, load: Callable[..., Any]) -> Any:
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


def folder_of(name: str) -> Path:
    """Where the files of a folder or of a model on the hub are."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(found("model.weights", name, lambda **kw: snapshot_download(name, **kw)))


def _from_tensors(spec: ModelSpec, row: Language, config: Any, name: str, dtype: Any) -> Any:
    """A native model filled with weights that were published for remote code."""
    import torch

    with torch.device("meta"):
        model = _causal(config, attention(spec, dtype), dtype)
    rename = qwen1_names if row.layout == "qwen1" else native_names
    state = {
        new: part.to(dtype) for old, tensor in tensors(folder_of(name)) for new, part in rename(old, tensor)
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
    from safetensors import SafetensorError, safe_open

    # Other files may lie beside them: transformers' own names come first.
    shards = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not shards:
        shards = sorted(folder.glob("pytorch_model*.bin")) or sorted(folder.glob("mm_projector.bin"))
    if not shards:
        raise BackboneError(f"{folder} holds no *.safetensors and no pytorch_model*.bin")
    for shard in shards:
        try:
            if shard.suffix == ".safetensors":
                with safe_open(shard, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118 - not a dict
                        yield key, opened.get_tensor(key)
            else:
                yield from _pickled(shard).items()
        except (SafetensorError, OSError, EOFError, pickle.UnpicklingError, RuntimeError) as wrong:
            with shard.open("rb") as file:
                pointer = file.read(20).startswith(b"version https://git")
            raise BackboneError(
                f"{shard} cannot be read: "
                + (
                    "it is a git-lfs pointer, not the file; git lfs pull brings it"
                    if pointer
                    else _brief(wrong)
                )
            ) from wrong


def _pickled(shard: Path) -> Any:
    import torch

    zipped = zipfile.is_zipfile(shard)  # torch before 1.6 wrote another format, which cannot be mapped
    return torch.load(shard, map_location="cpu", weights_only=True, mmap=zipped)


def _brief(wrong: Exception) -> str:
    told = "it is no file that torch.save wrote" if isinstance(wrong, pickle.UnpicklingError) else str(wrong)
    return f"{(told.strip() or 'it ends too soon').splitlines()[0]}; it may be cut short: copy it again"


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
