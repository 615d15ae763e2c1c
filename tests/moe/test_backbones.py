"""The tables, and what is said when a model or tokenizer cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe import backbones, weights
from moe.backbones import LANGUAGE, VISION, BackboneError, load_tokenizer, train_tokenizer
from moe.spec import ModelSpec
from moe.vlm import build, parts
from tests.moe.tiny import CONFIG, TOWER, WORDS, batch, model, spec

# (parameters of the language model, of one FFN), in millions: moe_llava's four, and what the model cards say
SIZES = {
    "phi2": (2780, 52.4),
    "qwen": (1837, 33.8),
    "stablelm": (1644, 34.6),
    "openchat": (7242, 176.2),
    "qwen1_5": (1837, 33.8),
    "qwen2": (1544, 41.3),
    "qwen2_5": (3086, 67.6),
    "qwen3": (1721, 37.7),
    "mistral": (7242, 176.2),
    "llama": (6738, 135.3),
    "vicuna": (6738, 135.3),
    "minicpm": (2725, 39.8),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_row_has_the_published_models_size(name: str) -> None:
    row = LANGUAGE[name]
    config = weights.language_config(row.model_type, row.config)
    with torch.device("meta"):
        language = weights._causal(config, "sdpa", torch.float32)
    total, ffn = SIZES[name]
    # transformers' phi has a bias on its head and the reference none: within a thousandth
    assert sum(p.numel() for p in language.parameters()) / 1e6 == pytest.approx(total, rel=1e-3)
    assert sum(p.numel() for p in language.model.layers[0].mlp.parameters()) / 1e6 == pytest.approx(
        ffn, rel=2e-3
    )


@pytest.mark.parametrize("name", LANGUAGE)
def test_every_row_trains_and_every_parameter_has_a_part(name: str) -> None:
    vlm = model(name).train()
    found = [parameter for names in parts(vlm).values() for parameter in names]
    assert len(found) == len(set(found)) == sum(not n.startswith("tower.") for n, _ in vlm.named_parameters())
    output = vlm(**batch([9, 6], [1, 0]))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert all(p.grad is not None for n, p in vlm.named_parameters() if not n.startswith("tower."))


@pytest.mark.parametrize("name", VISION)
def test_a_tower_gives_the_patches_its_row_says(name: str) -> None:
    row = VISION[name]
    assert (row.size // row.patch) ** 2 == row.patches
    tiny = spec(tower=name)
    look = backbones.vision(tiny)
    vlm = build(tiny, vocab_size=WORDS, seed=0, dtype=torch.float32)
    features = vlm.image_features(torch.randn(2, 3, look.size, look.size))
    assert features.shape == (2, look.patches, CONFIG["hidden_size"])
    assert look.patches == 4


def test_siglip_loses_its_first_patch_only_when_asked() -> None:
    changed = spec(tower="siglip-384", tower_config={**TOWER, "drop_first": True})
    assert backbones.vision(changed).patches == 3
    one = build(changed, vocab_size=WORDS, seed=0, dtype=torch.float32)
    other = build(spec(tower="siglip-384"), vocab_size=WORDS, seed=0, dtype=torch.float32)
    pixels = torch.randn(1, 3, 28, 28)
    torch.testing.assert_close(one.image_features(pixels), other.image_features(pixels)[:, 1:])


@pytest.mark.parametrize("name", ["clip-l-336", "siglip-384"])
def test_a_tower_cut_behind_the_layer_read_gives_that_layers_output(name: str) -> None:
    tower = build(spec(tower=name), vocab_size=WORDS, seed=0, dtype=torch.float32).tower
    whole = spec(tower=name, tower_config={**TOWER, "select_layer": 3})
    deep = build(whole, vocab_size=WORDS, seed=0, dtype=torch.float32).tower
    deep.load_state_dict(tower.state_dict(), strict=False)
    pixels = torch.randn(2, 3, 28, 28)
    states = deep(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(tower(pixels).last_hidden_state, states[-2])


def test_a_model_is_its_seed_alone() -> None:
    torch.manual_seed(1)
    one = model(seed=7)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    other = model(seed=7)
    assert torch.equal(before, torch.random.get_rng_state())
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(one.projector[0].weight, model(seed=8).projector[0].weight)


def test_weights_are_read_into_the_precision_asked_for(tmp_path: Path) -> None:
    source = model()
    source.language.save_pretrained(tmp_path / "language")
    source.tower.save_pretrained(tmp_path / "tower")
    read = ModelSpec(
        weights=str(tmp_path / "language"),
        tower_weights=str(tmp_path / "tower"),
        tower_config={"image_size": 28, "patch_size": 14, "select_layer": 2},
    )
    vlm = build(read, vocab_size=WORDS + 5, seed=0, dtype=torch.bfloat16)
    assert {p.dtype for p in vlm.parameters()} == {torch.bfloat16}
    rows = vlm.language.get_input_embeddings().weight
    assert rows.shape[0] == WORDS + 5  # room for the tokenizer's own
    torch.testing.assert_close(rows[:WORDS], source.language.get_input_embeddings().weight.bfloat16())
    torch.testing.assert_close(
        vlm.tower.embeddings.patch_embedding.weight, source.tower.embeddings.patch_embedding.weight.bfloat16()
    )


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    model("llama").language.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"holds a model of type 'llama', but model.backbone 'stablelm'"):
        build(ModelSpec(weights=str(tmp_path)), vocab_size=WORDS, seed=0, dtype=torch.float32)


@pytest.mark.parametrize("fused", [".safetensors", ".bin"])
def test_qwen1_weights_fill_the_native_class(tmp_path: Path, fused: str) -> None:
    source = model("qwen")
    new, old = source.language.state_dict(), {}
    for layer in range(4):
        ours, theirs = f"model.layers.{layer}", f"transformer.h.{layer}"
        for kind in ("weight", "bias"):
            qkv = [new[f"{ours}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            old[f"{theirs}.attn.c_attn.{kind}"] = torch.cat(qkv)
        for a, b in (
            ("self_attn.o_proj", "attn.c_proj"),
            ("mlp.up_proj", "mlp.w1"),
            ("mlp.gate_proj", "mlp.w2"),
            ("mlp.down_proj", "mlp.c_proj"),
            ("input_layernorm", "ln_1"),
            ("post_attention_layernorm", "ln_2"),
        ):
            old[f"{theirs}.{b}.weight"] = new[f"{ours}.{a}.weight"]
    old["transformer.wte.weight"] = new["model.embed_tokens.weight"]
    old["transformer.ln_f.weight"] = new["model.norm.weight"]
    old["lm_head.weight"] = new["lm_head.weight"]
    if fused == ".bin":
        torch.save(old, tmp_path / "pytorch_model.bin")
    else:
        save_file(old, tmp_path / "model.safetensors")
    config = {**spec("qwen").config, "vocab_size": WORDS}
    read = weights.load_language(
        ModelSpec(backbone="qwen", weights=str(tmp_path), config=config),
        vocab_size=WORDS,
        seed=0,
        dtype=torch.float32,
    )
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(read(ids).logits, source.language(ids).logits)


def test_minicpms_images_are_not_scaled_like_its_words() -> None:
    vlm = model("minicpm")
    pixels = torch.randn(1, 3, 28, 28)
    raw = vlm.projector(vlm.tower(pixels).last_hidden_state[:, 1:])
    torch.testing.assert_close(vlm.image_features(pixels) * 12.0, raw)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (ModelSpec(backbone="gpt9"), "model.backbone: 'gpt9' is none of phi2, stablelm"),
        (
            ModelSpec(random=True, config={"hidden_size": 30}),
            "model.config: no stablelm can be built from it",
        ),
        (ModelSpec(weights="/no/such/folder"), "model.weights: there is no folder /no/such/folder"),
        (ModelSpec(weights="nobody/nothing"), "neither a folder nor in this machine's Hugging Face cache"),
        (spec(tower="dino"), "model.tower: 'dino' is none of clip-l-336"),
        (spec(tower_config={**TOWER, "select_layer": 9}), r"select_layer \(9\): the tower has 3 layers"),
    ],
)
def test_what_cannot_be_built_is_refused_in_words(
    wrong: ModelSpec, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BackboneError, match=said):
        build(wrong, vocab_size=WORDS, seed=0, dtype=torch.float32)


def test_flash_attention_is_taken_only_where_it_can_run() -> None:
    assert weights.attention(ModelSpec(), torch.float32) == "sdpa"
    assert weights.attention(ModelSpec(attention="eager"), torch.float32) == "eager"
    with pytest.raises(BackboneError, match=r"model.attention is flash"):
        weights.attention(ModelSpec(attention="flash"), torch.float32)


TEXTS = ["A chat about a picture of a cat.", "USER: What is this? ASSISTANT: A cat."] * 20


def test_a_trained_tokenizer_is_deterministic_and_reversible(tmp_path: Path) -> None:
    one, other = (train_tokenizer(iter(TEXTS), 280) for _ in range(2))
    assert len(one) == 280
    text = "USER: Größe? 猫\n  ASSISTANT: no</s>"
    assert one(text).input_ids == other(text).input_ids
    assert one.decode(one(text).input_ids) == text
    assert one(text).input_ids[-1] == one.eos_token_id  # one id, nothing added before or after
    assert len({one.eos_token_id, one.pad_token_id, one.convert_tokens_to_ids("<|endoftext|>")}) == 3
    one.save_pretrained(tmp_path)
    again = load_tokenizer(ModelSpec(tokenizer="train:280"), tmp_path)
    assert again(text).input_ids == one(text).input_ids
    assert (again.eos_token, again.pad_token, again.padding_side) == ("</s>", "<unk>", "right")


def test_a_tokenizer_too_small_or_not_yet_trained_is_refused() -> None:
    with pytest.raises(
        BackboneError, match="train:200 has no room for the 256 bytes and 3 specials; say train:259"
    ):
        train_tokenizer(iter(TEXTS), 200)
    with pytest.raises(BackboneError, match="has to be trained on the run's texts first"):
        load_tokenizer(ModelSpec(tokenizer="train:280"))


def test_unk_pad_and_eos_are_set_as_the_reference_sets_them(tmp_path: Path) -> None:
    trained = train_tokenizer(iter(TEXTS), 280)
    said = json.loads(trained.backend_tokenizer.to_str())
    for token in said["added_tokens"]:
        token["content"] = {"<unk>": "<|other|>"}.get(token["content"], token["content"])
    said["model"]["vocab"]["<|other|>"] = said["model"]["vocab"].pop("<unk>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for backbone, unk in (("phi2", "<|extra_0|>"), ("qwen1_5", "<|extra_0|>"), ("stablelm", "<|reg0|>")):
        found = load_tokenizer(ModelSpec(backbone=backbone), tmp_path)
        assert (found.unk_token, found.pad_token, found.eos_token) == (unk, unk, "<|endoftext|>")
        assert found.pad_token_id == 280  # the next free one
