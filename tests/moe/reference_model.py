"""A folder as MoE-LLaVA saves it, and the same model computed by transformers' own classes and a loop over tokens.

It shares nothing with moe/ but torch and transformers. Facts: MoE-LLaVA at 6cb5f66 with transformers 4.37,
moellava/model/llava_arch.py and language_model/*, DeepSpeed 0.9.5's deepspeed/moe/sharded_moe.py and layer.py.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

WORDS, WIDTH, HEADS, LAYERS = 96, 32, 4, 4
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
# What 4.37 writes of each config beside SIZES, and transformers' class of the same arithmetic today.
GATED: dict[str, Any] = {"hidden_act": "silu", "rope_theta": 10000.0, "rms_norm_eps": 1e-5}
SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "phi": (
        "phi",
        {
            "hidden_act": "gelu_new",
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "partial_rotary_factor": 0.5,
            "qk_layernorm": False,
            "layer_norm_eps": 1e-5,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attention_dropout": 0.0,
            "num_key_value_heads": HEADS,
        },
    ),
    "stablelm": (
        "stablelm",
        {
            "hidden_act": "silu",
            "rope_theta": 10000,
            "rope_pct": 0.25,
            "norm_eps": 1e-5,
            "use_qkv_bias": True,
            "num_key_value_heads": HEADS,
        },
    ),
    "qwen": (
        "qwen2",
        {
            "attn_dropout_prob": 0.0,
            "emb_dropout_prob": 0.0,
            "kv_channels": WIDTH // HEADS,
            "layer_norm_epsilon": 1e-6,
            "no_bias": True,
            "rotary_emb_base": 10000,
            "rotary_pct": 1.0,
            "seq_length": 256,
            "use_dynamic_ntk": True,
            "use_logn_attn": True,
            "use_flash_attn": False,
        },
    ),
    "qwen1_5": (
        "qwen2",
        {
            "hidden_act": "silu",
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
            "num_key_value_heads": 2,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "attention_dropout": 0.0,
            "lora": {},
        },
    ),
    "mistral": (
        "mistral",
        GATED | {"num_key_value_heads": 2, "sliding_window": None, "attention_dropout": 0.0},
    ),
    "minicpm": (
        "llama",
        GATED
        | {
            "num_key_value_heads": HEADS,
            "rope_scaling": None,
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 8,
            "pretraining_tp": 1,
            "attention_bias": False,
        },
    ),
    "llama": ("llama", GATED | {"num_key_value_heads": HEADS, "rope_scaling": None, "pretraining_tp": 1}),
}
TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


class Looped(nn.Module):
    """DeepSpeed's sparse layer, a token at a time; without noise."""

    def __init__(self, dense: nn.Module, said: dict[str, Any]) -> None:
        super().__init__()
        self.said = said
        self.wg = nn.Linear(WIDTH, said["experts"], bias=False)
        nn.init.normal_(self.wg.weight, std=1.0)
        self.experts = nn.ModuleList(copy.deepcopy(dense) for _ in range(said["experts"]))
        self.beside = copy.deepcopy(dense) if said["residual"] else None
        self.coefficient = nn.Linear(WIDTH, 2) if said["residual"] else None
        self.aux, self.counts = torch.zeros(()), [0]

    def forward(self, x: Tensor) -> Tensor:
        rows, said, number = x.reshape(-1, WIDTH), self.said, self.said["experts"]
        chances = self.wg(rows.float()).softmax(-1)
        factor = said["capacity_factor" if self.training else "eval_capacity_factor"]
        room = max(math.ceil(len(rows) / number * factor * said["top_k"]), said["min_capacity"])
        order = [chance.argsort(descending=True).tolist()[: said["top_k"]] for chance in chances]
        taken, kept = [0] * number, [[] for _ in rows]  # type: ignore[var-annotated]
        for choice in range(said["top_k"]):
            for row, experts in enumerate(order):
                if taken[experts[choice]] < room:
                    kept[row].append(experts[choice])
                taken[experts[choice]] += 1
        weight = torch.zeros_like(chances)
        for row, experts in enumerate(kept):
            weight[row, experts] = chances[row, experts]
        if said["top_k"] > 1:
            weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-9)
        y = sum(weight[:, e, None] * expert(rows) for e, expert in enumerate(self.experts))
        if self.coefficient is not None and self.beside is not None:
            share = self.coefficient(rows).softmax(-1)
            y = y * share[:, :1] + self.beside(rows) * share[:, 1:]
        self.counts = [sum(experts[0] == e for experts in order) for e in range(number)]
        first = torch.tensor(self.counts) / len(rows)
        self.aux = number * (chances.mean(0) * first).sum()
        return y.view_as(x)


class Reference(nn.Module):
    """One of SAVED with a tower of `family` and a projector; `moe` None: dense."""

    def __init__(self, kind: str, family: str, projector: str, moe: dict[str, Any] | None) -> None:
        super().__init__()
        self.kind, self.family, self.projector_type, self.moe = kind, family, projector, moe
        name, saved = SAVED[kind]
        self.saved = saved
        values = {key: v for key, v in (SIZES | saved).items() if v is not None}
        rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta", 10000.0)}
        for key in ("partial_rotary_factor", "rope_pct"):
            if key in values:
                rope["partial_rotary_factor"] = values.pop(key)
        for old, new in {"norm_eps": "layer_norm_eps", "layer_norm_epsilon": "rms_norm_eps"}.items():
            if old in values:
                values[new] = values.pop(old)
        if kind == "qwen":
            values["num_key_value_heads"] = HEADS
        if kind == "mistral":
            values["sliding_window"] = None
        config = transformers.AutoConfig.for_model(name, **values, rope_parameters=rope)
        self.lm = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        self.lm.lm_head.bias = None
        vision = {
            "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
            "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
        }[family]
        self.tower = vision[1]._from_config(vision[0](**TOWER), attn_implementation="eager")
        depth = 1 if projector == "linear" else int(projector[3])
        maps: list[nn.Module] = [nn.Linear(TOWER["hidden_size"], WIDTH)]
        for _ in range(depth - 1):
            maps += [nn.GELU(), nn.Linear(WIDTH, WIDTH)]
        self.between: nn.Module = maps[0] if projector == "linear" else nn.Sequential(*maps)
        if moe is not None:
            for layer in moe["layers"]:
                self.lm.model.layers[layer].mlp = Looped(self.lm.model.layers[layer].mlp, moe)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
                parameter.copy_(parameter.bfloat16())
        if kind == "minicpm":
            scale = saved["scale_depth"] / LAYERS**0.5
            for layer in self.lm.model.layers:
                layer.self_attn.register_forward_hook(lambda m, i, out: (out[0] * scale, *out[1:]))
                layer.mlp.register_forward_hook(lambda m, i, out: out * scale)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, pixel_values: Tensor
    ) -> SimpleNamespace:
        """As MoE-LLaVA's, without its dummy images; its embeddings of MiniCPM's text are not scaled beside images."""
        features = []
        if len(pixel_values):
            states = self.tower(pixel_values, output_hidden_states=True).hidden_states[-2]
            features = list(self.between(states[:, 1:]))
        embed, embeds, targets = self.lm.get_input_embeddings(), [], []
        for ids, mask, wanted in zip(input_ids, attention_mask, labels, strict=True):
            parts, learnt = [], []
            for token, target in zip(ids[mask.bool()], wanted[mask.bool()], strict=True):
                part = features.pop(0) if token == -200 else embed(token)[None]
                parts.append(part)
                learnt += [-100] * len(part) if token == -200 else [int(target)]
            embeds.append(torch.cat(parts))
            targets.append(learnt)
        lengths = [len(rows) for rows in embeds]
        padded = nn.utils.rnn.pad_sequence(embeds, batch_first=True)
        seen = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
        hidden = self.lm.model(inputs_embeds=padded, attention_mask=seen, use_cache=False).last_hidden_state
        if self.kind == "minicpm":
            hidden = hidden / (WIDTH / self.saved["dim_model_base"])
        logits = self.lm.lm_head(hidden)
        want = torch.tensor([row + [-100] * (max(lengths) - len(row)) for row in targets])
        ce = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), want[:, 1:].flatten())
        sparse = [layer.mlp for layer in self.lm.model.layers if isinstance(layer.mlp, Looped)]
        aux = [layer.aux for layer in sparse]
        return SimpleNamespace(
            logits=logits,
            ce=ce,
            loss=ce + 0.01 * sum(aux, start=torch.zeros(())),
            aux_losses=aux,
            expert_counts=[layer.counts for layer in sparse],
        )

    def save(self, folder: Path) -> Path:
        """The folder, and beside it the tower's own, `openai/tower`."""
        folder.mkdir(parents=True)
        name = ("openai/" if self.family == "clip" else "google/") + "tower"
        self.tower.save_pretrained(folder.parent / name)
        state = {
            f"model.{key}" if not key.startswith("lm_head") else key: v for key, v in self._language().items()
        }
        prefix = "model.image_tower.image_tower.vision_model."
        state |= {f"{prefix}{k.removeprefix('vision_model.')}": v for k, v in self.tower.state_dict().items()}
        state |= {
            f"model.mm_projector.image_spatial_proj.{k}": v for k, v in self.between.state_dict().items()
        }
        if self.kind == "qwen":
            state = {key.replace("model.", "transformer.", 1): v for key, v in state.items()}
        save_file({key: v.bfloat16().contiguous() for key, v in state.items()}, folder / "model.safetensors")
        config = SIZES | self.saved
        if self.kind == "qwen":
            config = config | {"intermediate_size": 2 * config["intermediate_size"]}
        config |= {
            "model_type": f"{'moe_' if self.moe else ''}llava_{self.kind}",
            "image_aspect_ratio": "pad",
            "image_projector_type": self.projector_type,
            "mm_hidden_size": TOWER["hidden_size"],
            "mm_image_tower": name,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "torch_dtype": "float32",
            "transformers_version": "4.37.0",
            "use_cache": False,
        }
        if self.moe:
            config["moe"] = {
                "moe_enable": True,
                "moe_mode": "sparse",
                "moe_layers_idx": self.moe["layers"],
                "ep_size": 1,
                "top_k_experts": self.moe["top_k"],
                "num_experts": [self.moe["experts"]] * len(self.moe["layers"]),
                "use_residual": self.moe["residual"],
                "router_aux_loss_coef": 0.01,
                "train_modules": ["wg"],
                **{k: self.moe[k] for k in ("capacity_factor", "eval_capacity_factor", "min_capacity")},
            }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def _language(self) -> dict[str, Tensor]:
        state = {}
        for key, value in self.lm.state_dict().items():
            key = key.removeprefix("model.")
            key = key.replace(".mlp.wg.", ".mlp.deepspeed_moe.gate.wg.").replace(".mlp.beside.", ".mlp.mlp.")
            state[key.replace(".mlp.experts.", ".mlp.deepspeed_moe.experts.deepspeed_experts.")] = value
        if self.kind != "qwen":
            return state
        old = {}
        for key, value in state.items():
            layer, kind = key.rsplit(".self_attn.", 1) if ".self_attn." in key else ("", "")
            if kind.startswith("q_proj"):
                parts = [state[key.replace("q_proj", f"{x}_proj")] for x in "qkv"]
                old[f"{layer.replace('layers', 'h')}.attn.c_attn.{kind[7:]}"] = torch.cat(parts)
            elif not kind.startswith(("k_proj", "v_proj")):
                for new, name in _QWEN.items():
                    key = key.replace(new, name)
                old["ln_f.weight" if key == "norm.weight" else key] = value
        return old


_QWEN = {
    "layers.": "h.",
    "embed_tokens.": "wte.",
    "input_layernorm.": "ln_1.",
    "post_attention_layernorm.": "ln_2.",
    "self_attn.o_proj.": "attn.c_proj.",
    "up_proj.": "w1.",
    "gate_proj.": "w2.",
    "down_proj.": "c_proj.",
}


def moe(**changes: Any) -> dict[str, Any]:
    """The scripts' sparse layers."""
    said: dict[str, Any] = {"layers": [0, 2], "experts": 4, "top_k": 2, "residual": False, "min_capacity": 0}
    return said | {"capacity_factor": 1.5, "eval_capacity_factor": 2.0} | changes


def batch(shapes: list[list[int]], seed: int = 0) -> dict[str, Tensor]:
    """One sample a list: runs of text tokens with an image between each two, right-padded."""
    draw = torch.Generator().manual_seed(seed)
    rows, wanted = [], []
    for runs in shapes:
        ids: list[int] = []
        for at, run in enumerate(runs):
            ids += ([-200] if at else []) + torch.randint(2, WORDS, (run,), generator=draw).tolist()
        cut = len(ids) - runs[-1] // 2
        rows.append(torch.tensor(ids))
        wanted.append(torch.tensor([-100] * cut + ids[cut:]))
    images = sum(len(runs) - 1 for runs in shapes)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {
        "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1),
        "labels": nn.utils.rnn.pad_sequence(wanted, batch_first=True, padding_value=-100),
        "attention_mask": mask,
        "pixel_values": torch.randn(images, 3, 28, 28, generator=draw),
    }
