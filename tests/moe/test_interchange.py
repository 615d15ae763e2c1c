"""The reference's folders in, Hugging Face folders out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.backbones import train_tokenizer
from moe.generate import greedy
from moe.interchange import InterchangeError, export_hf, load_moe_llava
from moe.parallel import Groups
from moe.spec import MoESpec
from moe.upcycle import upcycle
from moe.vlm import VLM
from tests.moe.test_goldens import GOLDENS, batch, golden
from tests.moe.tiny import batch as tiny_batch
from tests.moe.tiny import model
from tests.moe.tiny import spec as tiny_spec
from tests.ranks import ranks

MODELS = GOLDENS / "models"
STABLELM, TOWER = MODELS / "stablelm", str(MODELS / "tiny_clip")
EXPERT = ".deepspeed_moe.experts.deepspeed_experts."


def dense(folder: Path, shards: int = 1, suffix: str = "safetensors", prefix: str = "") -> Path:
    """The stage-2 model the golden one was made from: its first experts are the dense FFNs."""
    folder.mkdir(exist_ok=True)
    config = json.loads((STABLELM / "config.json").read_text())
    del config["moe"]
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llava_stablelm"}))
    state = {}
    for key, tensor in load_file(STABLELM / "model.safetensors").items():
        if EXPERT in key:
            key = key.replace(f"{EXPERT}0.", ".")
        if "deepspeed" not in key:
            state[prefix + key] = tensor
    names = sorted(state)
    for shard in range(shards):
        part = {name: state[name] for name in names[shard::shards]}
        if suffix == "bin":
            torch.save(part, folder / f"pytorch_model-{shard}-of-{shards}.bin")
        else:
            save_file(part, folder / f"model-{shard}-of-{shards}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("shards", "suffix", "prefix"), [(1, "safetensors", ""), (3, "bin", "base_model.model.")]
)
def test_stage_2_gives_the_references_hidden_states(
    tmp_path: Path, shards: int, suffix: str, prefix: str
) -> None:
    numbers, tensors, _, _ = golden("stablelm")
    vlm = load_moe_llava(dense(tmp_path, shards, suffix, prefix), tower=TOWER).eval()
    assert vlm.moe is None
    given = batch("stablelm", "b2")
    output = vlm(**given)
    torch.testing.assert_close(output.hidden, tensors["dense_eval_b2.hidden"], atol=1e-4, rtol=0)
    assert output.loss.item() == pytest.approx(numbers["dense_eval_b2"]["loss"], abs=1e-5)


def test_stage_1_is_a_projector_before_a_language_model_of_its_own(tmp_path: Path) -> None:
    stage2 = load_moe_llava(dense(tmp_path / "two"), tower=TOWER)
    stage2.language.save_pretrained(tmp_path / "language")
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(tmp_path / "two" / "config.json", one)
    prefix = "model.mm_projector.image_spatial_proj."
    weights = {f"{prefix}{name}": p.detach() + 1 for name, p in stage2.projector.named_parameters()}
    torch.save(weights, one / "mm_projector.bin")
    vlm = load_moe_llava(one, tower=TOWER, language=str(tmp_path / "language"))
    for (name, a), (_, b) in zip(vlm.named_parameters(), stage2.named_parameters(), strict=True):
        torch.testing.assert_close(a, b + 1 if name.startswith("projector.") else b)


def test_a_tower_is_found_beside_the_checkpoint_or_asked_for(tmp_path: Path) -> None:
    folder = dense(tmp_path / "stage2")
    with pytest.raises(
        InterchangeError, match=r"names the image tower 'openai/tiny-clip', which is neither a folder"
    ):
        load_moe_llava(folder)
    for place in ("openai/tiny-clip", "tiny-clip", "tiny_clip"):  # the last as the goldens themselves have it
        shutil.copytree(TOWER, tmp_path / place)
        assert load_moe_llava(folder).vision.size == 28
        shutil.rmtree(tmp_path / place)


def test_dropout_of_the_checkpoint_is_that_of_the_model(tmp_path: Path) -> None:
    folder = dense(tmp_path)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"hidden_dropout": 0.1}))
    vlm = load_moe_llava(folder, tower=TOWER)
    assert vlm.language.config.hidden_dropout == 0.1


def rename(key: str) -> str:
    """As the reference names Qwen-1's."""
    for new, old in {
        ".self_attn.o_proj.": ".attn.c_proj.",
        ".up_proj.": ".w1.",
        ".gate_proj.": ".w2.",
        ".down_proj.": ".c_proj.",
        ".input_layernorm.": ".ln_1.",
        ".post_attention_layernorm.": ".ln_2.",
        "model.layers.": "transformer.h.",
        "model.embed_tokens.": "transformer.wte.",
        "model.norm.": "transformer.ln_f.",
        "model.mm_projector.": "transformer.mm_projector.",
    }.items():
        key = key.replace(new, old)
    return key


def reference_state(vlm: VLM) -> dict[str, Tensor]:
    """A sparse model under MoE-LLaVA's names."""
    theirs = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    if vlm.spec.backbone == "phi2":
        theirs = {"up": "fc1", "down": "fc2"}
    state = {}
    for name, value in vlm.state_dict().items():
        if name.startswith("tower."):
            continue
        name = name.removeprefix("language.").replace("projector.", "model.mm_projector.image_spatial_proj.")
        name = name.replace(".router.weight", ".deepspeed_moe.gate.wg.weight")
        name = name.replace(".mlp.residual.", ".mlp.mlp.")
        if ".experts." in name:
            layer, ours = name.split(".experts.")
            kind = "bias" if ours.endswith("_bias") else "weight"
            for e, part in enumerate(value):
                state[f"{layer}{EXPERT}{e}.{theirs[ours.removesuffix('_bias')]}.{kind}"] = part.clone()
        else:
            state[name] = value.clone()
    if vlm.spec.backbone == "qwen":
        for layer in range(4):
            for kind in ("weight", "bias"):
                qkv = [state.pop(f"model.layers.{layer}.self_attn.{x}_proj.{kind}") for x in "qkv"]
                state[f"model.layers.{layer}.attn.c_attn.{kind}"] = torch.cat(qkv)
        state = {rename(key): value for key, value in state.items()}
    return state


def reference_config(vlm: VLM, kind: str) -> dict[str, Any]:
    config = vlm.language.config.to_dict()
    moe = vlm.moe
    assert moe is not None
    rope = config.pop("rope_parameters")
    config |= {
        "model_type": f"moe_llava_{kind}",
        "rope_theta": rope["rope_theta"],
        "image_projector_type": "mlp2x_gelu",
        "mm_image_tower": "tower",
        "moe": {
            "moe_enable": True,
            "moe_layers_idx": [0, 2],
            "top_k_experts": 2,
            "num_experts": [4, 4],
            "capacity_factor": 1.5,
            "eval_capacity_factor": 2.0,
            "min_capacity": 0,
            "use_residual": moe.residual,
            "router_aux_loss_coef": 0.01,
        },
    }
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if kind == "qwen":
        config["intermediate_size"] *= 2
        config["layer_norm_epsilon"] = config.pop("rms_norm_eps")
        config["rotary_emb_base"] = config.pop("rope_theta")
        config["seq_length"] = config.pop("max_position_embeddings")
    if kind == "minicpm":
        config |= {"scale_emb": 12, "scale_depth": 1.4 * (4 / 40) ** 0.5, "dim_model_base": 32 / 9.0}
    return config


@pytest.mark.parametrize(
    ("backbone", "kind"),
    [
        ("phi2", "phi"),
        ("qwen", "qwen"),
        ("qwen1_5", "qwen1_5"),
        ("mistral", "mistral"),
        ("llama", "llama"),
        ("minicpm", "minicpm"),
    ],
)
@pytest.mark.parametrize("residual", [False, True])
def test_every_backbones_stage_3_comes_back_as_it_was(
    tmp_path: Path, backbone: str, kind: str, residual: bool
) -> None:
    config = dict(tiny_spec(backbone).config)
    if backbone == "minicpm":
        config["attention_multiplier"] = 8**-0.5  # of its heads' width, which the row's is too
        config["embedding_multiplier"] = 1.0  # the reference gives embeddings, and these it does not scale
    source = model(backbone, config=config)
    spec = MoESpec(rules="moe_llava", eval_capacity_factor=2.0, residual=residual)
    upcycle(source, spec, Groups.single(), seed=0)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        if backbone == "phi2":
            source.language.lm_head.bias = None
    found = source.tower.config.to_dict()
    whole = transformers.CLIPVisionConfig(**{**found, "num_hidden_layers": 3})
    tower = transformers.CLIPVisionModel(whole)
    tower.load_state_dict(source.tower.state_dict(), strict=False)
    folder = tmp_path / "stage3"
    tower.save_pretrained(folder / "tower")
    save_file(reference_state(source), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(reference_config(source, kind)))
    read = load_moe_llava(folder).eval()
    given = tiny_batch([9, 6], [1, 0])
    torch.testing.assert_close(read(**given).logits, source.eval()(**given).logits, rtol=1e-5, atol=1e-5)
    assert [n for n, _ in read.named_parameters()] == [n for n, _ in source.named_parameters()]


def own_experts(folder: Path) -> dict[str, Tensor]:
    vlm = load_moe_llava(folder, tower=TOWER, groups=Groups.create(2), dispatcher="torch")
    return {n: p.detach() for n, p in vlm.named_parameters() if ".experts." in n}


def test_each_rank_of_an_expert_group_keeps_its_own_experts() -> None:
    whole = load_moe_llava(STABLELM, tower=TOWER)
    halves = ranks(2)(own_experts, STABLELM)
    for name, parameter in whole.named_parameters():
        if ".experts." in name:
            assert torch.equal(parameter, torch.cat([half[name] for half in halves]))


def changed(folder: Path, **changes: Any) -> Path:
    shutil.copytree(STABLELM, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_what_cannot_be_read_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(InterchangeError, match=r"has no config.json: it is no MoE-LLaVA checkpoint folder"):
        load_moe_llava(tmp_path)
    with pytest.raises(InterchangeError, match="says model_type 'moe_llava_mpt'; known are"):
        load_moe_llava(changed(tmp_path / "a", model_type="moe_llava_mpt"), tower=TOWER)
    with pytest.raises(
        InterchangeError, match=r"lm_head.weight is \(656, 64\), but this model's is \(700, 64\)"
    ):
        load_moe_llava(changed(tmp_path / "b", vocab_size=700), tower=TOWER)
    with pytest.raises(InterchangeError, match=r"14 tensors missing .*layers.4"):
        load_moe_llava(changed(tmp_path / "c", num_hidden_layers=5), tower=TOWER)
    folder = changed(tmp_path / "f")
    (folder / "model.safetensors").unlink()
    (folder / "golden.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(InterchangeError, match="tensors missing"):
        load_moe_llava(folder, tower=TOWER)


@pytest.mark.parametrize("backbone", ["stablelm", "phi2", "qwen2"])
@pytest.mark.parametrize("sparse", [False, True])
def test_an_exported_folder_loads_and_generates(tmp_path: Path, backbone: str, sparse: bool) -> None:
    vlm = model(backbone)
    if sparse:
        upcycle(vlm, MoESpec(experts=(2, 4), residual=True), Groups.single(), seed=0)
    vlm.eval()
    before = {name: parameter.clone() for name, parameter in vlm.named_parameters()}
    export_hf(vlm, tmp_path, train_tokenizer(iter(["a cat"]), 260))
    for name, parameter in vlm.named_parameters():
        assert torch.equal(parameter, before[name]), name  # exporting changes nothing
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == 260
    given = tiny_batch([9, 6], [1, 0])
    mine, theirs = vlm(**given), read(**given)
    torch.testing.assert_close(theirs.logits, mine.logits)
    torch.testing.assert_close(theirs.loss, mine.loss)
    assert [c.tolist() for c in theirs.expert_counts] == [c.tolist() for c in mine.expert_counts]
    assert len(theirs.aux_losses) == (2 if sparse else 0)
    prompt = given["input_ids"][:1]
    want = greedy(
        vlm,
        [prompt[0].tolist()],
        [given["pixel_values"]],
        max_new_tokens=5,
        end=None,
        groups=Groups.single(),
    )
    said = read.generate(
        prompt, pixel_values=given["pixel_values"], max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    assert said.tolist() == want


def test_a_part_of_the_experts_is_not_exported(tmp_path: Path) -> None:
    vlm = model()
    vlm.groups = replace(Groups.single(), expert_parallel=2)
    with pytest.raises(InterchangeError, match=r"holds a part of the experts \(expert_parallel 2\)"):
        export_hf(vlm, tmp_path)
