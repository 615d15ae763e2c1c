"""The reference system's checkpoints as our model: MoE-LLaVA's stages 1 to 3, LLaVA's, LoRA's merged or not.

A checkpoint is known by what its config.json says, never by its folder's name. What it does not say is how its
image tower is built: it is found by name in `moe.backbones.VISION`, or has to be pointed at.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe import adapters, weights
from moe.adapters import InterchangeError
from moe.backbones import VISION
from moe.parallel import Groups
from moe.spec import ModelSpec, MoESpec
from moe.upcycle import upcycle
from moe.vlm import VLM, build
from moe.weights import tensors

# model_type in config.json, without its moe_llava_ or llava_ -> our row (moellava/model/language_model/*.py)
_ROWS = {
    "phi": "phi2",
    "stablelm": "stablelm",
    "qwen": "qwen",
    "qwen1_5": "qwen1_5",
    "mistral": "mistral",
    "minicpm": "minicpm",
    "llama": "llama",
    "llava": "llama",
}
_KEYS = (  # transformers' keys that may be carried over as they are
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "hidden_act", "initializer_range"),
    *("rms_norm_eps", "layer_norm_eps", "rope_theta", "rope_scaling", "partial_rotary_factor"),
    *("use_qkv_bias", "qk_layernorm", "tie_word_embeddings", "sliding_window"),
    # Phi-2's own config drops a tenth of what goes into its residuals.
    *("resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout"),
)
_RENAMED = {
    "rope_pct": "partial_rotary_factor",  # StableLM's vendored config
    "norm_eps": "layer_norm_eps",
    "layer_norm_epsilon": "rms_norm_eps",  # Qwen-1's
    "rotary_emb_base": "rope_theta",
    "seq_length": "max_position_embeddings",
}
_EXPERT = ".deepspeed_moe.experts.deepspeed_experts."
_TOWERS = (  # LLaVA's own last
    "model.image_tower.image_tower.",
    "transformer.image_tower.image_tower.",
    "model.vision_tower.vision_tower.",
)
_WEIGHT = {
    "fc1": "up",
    "fc2": "down",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


def load_moe_llava(
    folder: Path | str,
    *,
    tower: str = "",
    language: str = "",
    dtype: torch.dtype = torch.float32,
    groups: Groups | None = None,
    dispatcher: str = "auto",
) -> VLM:
    """A MoE-LLaVA checkpoint folder as our model, on the CPU.

    Stage 1 (`mm_projector.bin` alone; the language model comes from `language` or the name the config
    gives), stage 2 (dense) or stage 3 (experts; each rank keeps its own). `tower`: a folder
    or hub name, where the config's own name for it is not one. LoRA is merged: experts' factors lie among the
    weights, a dense model's in files of their own, and what they are added to comes from `language` or the name
    adapter_config.json gives. Raises InterchangeError or BackboneError, in words.
    """
    folder = Path(folder)
    said = _config(folder)
    row = _row(folder, said)
    adapted = adapters.beside(folder)
    stage1 = not (adapted or any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")))
    if stage1 and not (folder / "mm_projector.bin").is_file():
        raise InterchangeError(
            f"{folder} holds no weights: no *.safetensors, no pytorch_model*.bin, and no mm_projector.bin of a stage 1"
        )
    tower_row, tower_weights = _tower(folder, said, tower)
    common: dict[str, Any] = {
        "backbone": row,
        "tower": tower_row,
        "tower_config": _tower_config(tower_row, tower_weights, said),
        "projector": str(said.get("image_projector_type") or said.get("mm_projector_type") or "linear"),
    }
    for key, wrong, _ in ModelSpec(**common).check():
        raise InterchangeError(f"{folder}/config.json: {key}: {wrong}")
    if stage1:
        base = language or str(said.get("_name_or_path", ""))
        spec = ModelSpec(weights=base, tower_weights=tower_weights, **common)
        vlm = build(spec, vocab_size=0, seed=0, dtype=dtype)
    else:
        spec = ModelSpec(random=True, config=_language_config(row, said), **common)
        vlm = build(spec, vocab_size=int(str(said["vocab_size"])), seed=0, dtype=dtype, filled=False)
    moe = _moe(folder, said, dispatcher)
    if moe is not None and not stage1:
        upcycle(vlm, moe, groups or Groups.single(), seed=0)
    if adapted:
        pairs = adapters.dense(folder, language)
    else:
        pairs = adapters.merged(lambda: tensors(folder), adapters.scale(folder, said))
    _fill(vlm, folder, pairs, row, projector_only=stage1, tower_weights=tower_weights)
    return vlm


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InterchangeError(f"{folder} has no config.json: it is no MoE-LLaVA checkpoint folder")
    try:
        said = json.loads(path.read_text())
    except ValueError as wrong:
        raise InterchangeError(f"{path} is no JSON: {wrong}; copy it from where it was saved again") from None
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    said = said if isinstance(said, dict) else {}
    if missing := [key for key in wanted if key not in said]:
        raise InterchangeError(f"{path} does not say what the model is: it has no {', '.join(missing)}")
    return said


def _row(folder: Path, said: Mapping[str, Any]) -> str:
    kind = str(said.get("model_type", ""))
    name = kind.removeprefix("moe_").removeprefix("llava_")
    if name not in _ROWS:
        raise InterchangeError(
            f"{folder}/config.json says model_type {kind!r}; known are moe_llava_ or llava_ with one of "
            f"{', '.join(_ROWS)}"
        )
    return _ROWS[name]


def _language_config(row: str, said: Mapping[str, Any]) -> dict[str, object]:
    config: dict[str, object] = {key: said[key] for key in _KEYS if said.get(key) is not None}
    config |= {new: said[old] for old, new in _RENAMED.items() if said.get(old) is not None}
    # What the row would say of these is not what their absence means.
    config.setdefault("num_key_value_heads", said["num_attention_heads"])
    if "sliding_window" in said:
        config["sliding_window"] = said["sliding_window"]
    if row == "qwen":
        config["intermediate_size"] = said["intermediate_size"] // 2  # its two halves together
    if row == "minicpm":
        width = said["hidden_size"]
        config |= {
            # scale_emb is for ids; the reference always gives embeddings, which it does not scale.
            "embedding_multiplier": 1.0,
            "residual_multiplier": said.get("scale_depth", 1) / said["num_hidden_layers"] ** 0.5,
            "logits_scaling": width / said.get("dim_model_base", width),
            "attention_multiplier": (width // said["num_attention_heads"]) ** -0.5,
        }
    return config


def _tower(folder: Path, said: Mapping[str, Any], named: str) -> tuple[str, str]:
    """(row of VISION, folder or hub name with its config)."""
    name = named or str(said.get("mm_image_tower") or said.get("mm_vision_tower") or "")
    for row, vision in VISION.items():
        if vision.hub == name:
            return row, ""
    near = folder.resolve().parent
    # The name must begin with openai/ or google/ there, so a folder beside may be called a little otherwise.
    alike = [place for place in sorted(near.iterdir()) if _letters(place.name) == _letters(Path(name).name)]
    for place in (Path(name), folder / name, near / name, near / Path(name).name, *alike):
        if name and (place / "config.json").is_file():
            kind = json.loads((place / "config.json").read_text()).get("model_type", "")
            if kind.startswith(("clip", "siglip")):
                return ("clip-l-336" if kind.startswith("clip") else "siglip-384"), str(place)
            raise InterchangeError(f"{place} holds a {kind or 'model of no type'}, neither CLIP nor SigLIP")
    raise InterchangeError(
        f"{folder}/config.json names the image tower {name!r}, which is neither a folder nor one of "
        f"{', '.join(vision.hub for vision in VISION.values())}; give its folder as `tower`"
    )


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _tower_config(row: str, weights: str, said: Mapping[str, Any]) -> dict[str, object]:
    config: dict[str, object] = {
        "select_layer": said.get("mm_vision_select_layer", -2),
        # "patch" drops the first position, SigLIP's first patch included.
        "drop_first": said.get("mm_vision_select_feature", "patch") == "patch",
    }
    if weights:
        found = json.loads((Path(weights) / "config.json").read_text())
        found = found.get("vision_config", found)
        keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size"
        config |= {key: found[key] for key in (*keys.split(), "hidden_act", "projection_dim") if key in found}
    return config


def _moe(folder: Path, said: Mapping[str, Any], dispatcher: str) -> MoESpec | None:
    moe = said.get("moe") or {}
    if not moe.get("moe_enable"):
        return None
    try:
        told, layers = moe["num_experts"], moe.get("moe_layers_idx")
        numbers = (int(told),) if isinstance(told, int) else tuple(int(n) for n in told)
        spec = MoESpec(
            experts=numbers[0] if len(set(numbers)) == 1 else numbers,
            top_k=int(moe["top_k_experts"]),
            # The list is authoritative, where there is one: moe_mode may be stale.
            layers=str(moe["moe_mode"]) if layers is None else tuple(layers),
            capacity_factor=float(moe["capacity_factor"]),
            eval_capacity_factor=float(moe["eval_capacity_factor"]),
            min_capacity=int(moe["min_capacity"]),
            aux_loss=float(moe["router_aux_loss_coef"]),
            residual=bool(moe["use_residual"]),
            rules="moe_llava",
            dispatcher=dispatcher,  # type: ignore[arg-type]
        )
        for key, wrong, _ in spec.check():
            raise InterchangeError(f"{folder}/config.json: its `moe`: {key}: {wrong}")
        return spec
    except KeyError as missing:
        raise InterchangeError(
            f"{folder}/config.json: its `moe` has no {missing}, without which its sparse layers are not known"
        ) from None


def _names(key: str, tensor: Tensor, row: str) -> Iterator[tuple[str, int | None, Tensor]]:
    """(our parameter, the expert of it, tensor) for one tensor of the reference's."""
    key = key.removeprefix("base_model.model.").replace("transformer.mm_projector.", "model.mm_projector.")
    if key.startswith("model.mm_projector."):
        name = key.removeprefix("model.mm_projector.")
        if name.startswith("image_spatial_proj."):
            yield f"projector.{name.removeprefix('image_spatial_proj.')}", None, tensor
        elif name[:1].isdigit() or name in ("weight", "bias"):
            yield f"projector.{name}", None, tensor  # LLaVA's own
        return
    for prefix in _TOWERS:
        if key.startswith(prefix):
            yield f"tower.{key.removeprefix(prefix).removeprefix('vision_model.')}", None, tensor
            return
    if _EXPERT in key:
        place, rest = key.split(_EXPERT)
        expert, linear, kind = rest.split(".")
        layer = place.replace("transformer.h.", "model.layers.")
        weight = {"w1": "up", "w2": "gate", "c_proj": "down"}[linear] if row == "qwen" else _WEIGHT[linear]
        yield f"language.{layer}.experts.{weight}{'_bias' if kind == 'bias' else ''}", int(expert), tensor
        return
    for dense in (".deepspeed_moe.gate.wg.", ".coefficient."):
        if dense in key:
            ours = ".router." if "gate.wg" in dense else dense
            yield (
                f"language.{key.replace('transformer.h.', 'model.layers.').replace(dense, ours)}",
                None,
                tensor,
            )
            return
    rename = weights.qwen1_names if row == "qwen" else weights.native_names
    for name, part in rename(key, tensor):
        # PR-MoE calls the dense FFN beside its experts mlp, inside the mlp it replaces.
        yield f"language.{name.replace('.mlp.mlp.', '.mlp.residual.')}", None, part


def _fill(
    vlm: VLM,
    folder: Path,
    pairs: Iterable[tuple[str, Tensor]],
    row: str,
    *,
    projector_only: bool,
    tower_weights: str,
) -> None:
    wanted = dict(vlm.named_parameters())
    filled: dict[str, set[int | None]] = {}
    unknown = []
    bias = "language.lm_head.bias"
    with torch.no_grad():
        for key, tensor in pairs:
            for name, expert, part in _names(key, tensor, row):
                if name not in wanted:
                    # Layers above the one that is read, and the second name of tied embeddings.
                    if not name.startswith("tower.") and name != "language.lm_head.weight":
                        unknown.append(key)
                    continue
                target = wanted[name]
                place: int | None = expert
                if expert is not None:
                    place = expert - int(target.expert_offset)  # type: ignore[attr-defined]
                    if not 0 <= place < len(target):
                        continue
                aim = target if place is None else target[place]
                if aim.shape != part.shape:
                    raise InterchangeError(
                        f"{folder}: {key} is {tuple(part.shape)}, but this model's is {tuple(aim.shape)}"
                    )
                aim.copy_(part)
                filled.setdefault(name, set()).add(place)
        if bias in wanted and bias not in filled and not projector_only:
            # The reference leaves phi-2's out; said in the config, an export is built without it too.
            vlm.language.lm_head.bias, vlm.language.config.lm_head_bias = None, False
            del wanted[bias]
        if not any(name.startswith("tower.") for name in filled) and not projector_only:
            spec = ModelSpec(
                tower=vlm.spec.tower, tower_weights=tower_weights, tower_config=vlm.spec.tower_config
            )
            dtype = next(vlm.tower.parameters()).dtype
            vlm.tower = weights.load_tower(spec, seed=0, dtype=dtype)
    missing = [
        name
        for name, target in wanted.items()
        if len(filled.get(name, ())) < (len(target) if hasattr(target, "expert_dim") else 1)
        and not name.startswith("tower.")
        and (name.startswith("projector.") or not projector_only)
    ]
    if missing or unknown:
        raise InterchangeError(
            f"{folder} does not fit the model its config.json describes: "
            f"{len(missing)} tensors missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
        )
