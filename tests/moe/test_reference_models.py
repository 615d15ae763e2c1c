"""Checkpoint folders of MoE-LLaVA's form are read and computed as transformers and a plain loop compute them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.backbones import BackboneError
from moe.hub import MoEVLM
from moe.interchange import InterchangeError, blueprint, export_hf, load_moe_llava
from moe.origin import fill
from moe.vlm import VLMError, build
from tests.moe.reference_model import LAYERS, SAVED, WORDS, Reference, batch, moe

BATCHES = {
    "two": [[3, 9], [7]],
    "three": [[2, 4], [9], [5]],
    "four": [[3, 9], [4, 2, 6], [7], [6, 5]],
    "text": [[8], [5]],
}


def agree(reference: Reference, folder: Path, runs: list[str]) -> None:
    ours = load_moe_llava(folder)
    for run in runs:
        mode, name = run.split()
        ours.train(mode == "train")
        reference.train(mode == "train")
        reference.tower.eval()
        given = batch(BATCHES[name])
        with torch.no_grad():
            want, got = reference(**given), ours(**given)
        # A dense model computes nothing of use where padding is; a sparse one routes it.
        where = got.mask if reference.moe is None else torch.ones_like(got.mask)
        torch.testing.assert_close(got.logits[where], want.logits[where], rtol=0, atol=1e-4)
        assert got.loss.item() == pytest.approx(want.loss.item(), abs=1e-5)
        assert [c.tolist() for c in got.expert_counts] == want.expert_counts
        for a, b in zip(got.aux_losses, want.aux_losses, strict=True):
            assert a.item() == pytest.approx(b.item(), abs=1e-5)


@pytest.mark.parametrize("kind", SAVED)
def test_every_backbones_sparse_folder(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    reference = Reference(kind, "clip", "mlp2x_gelu", moe())
    agree(reference, reference.save(tmp_path / "stage3"), ["eval three", "train four", "train text"])


@pytest.mark.parametrize("kind", ["phi", "qwen"])
def test_dense_folders(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(2)
    reference = Reference(kind, "clip", "mlp2x_gelu", None)
    agree(reference, reference.save(tmp_path / "stage2"), ["eval four"])


@pytest.mark.parametrize(
    ("family", "projector", "changes"),
    [
        ("siglip", "mlp2x_gelu", {"layers": [2, 3]}),
        ("clip", "linear", {"layers": [0, 1], "experts": 2}),
        ("clip", "mlp3x_gelu", {"layers": list(range(LAYERS)), "residual": True}),
        ("siglip", "linear", {"layers": [3], "experts": 8, "capacity_factor": 0.5, "min_capacity": 6}),
        ("clip", "mlp2x_gelu", {"top_k": 1, "capacity_factor": 9.0, "eval_capacity_factor": 9.0}),
        (
            "clip",
            "mlp1x_gelu",
            {"top_k": 1, "capacity_factor": 9.0, "eval_capacity_factor": 9.0, "residual": True, "experts": 3},
        ),
    ],
)
def test_towers_projectors_and_ways_to_be_sparse(
    tmp_path: Path, family: str, projector: str, changes: dict[str, Any]
) -> None:
    torch.manual_seed(3)
    reference = Reference("phi", family, projector, moe(**changes))
    agree(reference, reference.save(tmp_path / "stage3"), ["eval two", "train three"])


def rewritten(folder: Path, state: Callable[[str], str], **config: Any) -> None:
    """The folder under other names; what `config` sets to None is taken out."""
    old = load_file(folder / "model.safetensors")
    save_file({state(key): value for key, value in old.items()}, folder / "model.safetensors")
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))


def test_a_folder_of_llavas_own(tmp_path: Path) -> None:
    torch.manual_seed(4)
    reference = Reference("llama", "clip", "mlp2x_gelu", None)
    folder = reference.save(tmp_path / "llava")
    rewritten(
        folder,
        lambda key: key.replace("image_spatial_proj.", "").replace("image_tower", "vision_tower"),
        mm_projector_type="mlp2x_gelu",
        mm_vision_tower="openai/tower",
        num_key_value_heads=None,  # older than grouped queries
        **dict.fromkeys(("image_projector_type", "mm_image_tower", "rope_scaling")),
    )
    agree(reference, folder, ["train four"])


def test_batches_of_other_types_and_shapes(tmp_path: Path) -> None:
    torch.manual_seed(5)
    reference = Reference("stablelm", "clip", "mlp2x_gelu", moe())
    ours, given = load_moe_llava(reference.save(tmp_path / "s")).eval(), batch(BATCHES["four"])
    want = ours(**given).loss.item()
    same = [
        {"attention_mask": given["attention_mask"].bool()},
        {"attention_mask": given["attention_mask"].float()},
        {"input_ids": given["input_ids"].int(), "labels": given["labels"].int()},
        {"pixel_values": given["pixel_values"].double()},
        {"pixel_values": list(given["pixel_values"])},
    ]
    for change in same:
        assert ours(**given | change).loss.item() == pytest.approx(want, abs=1e-6)
    assert ours(**given | {"labels": None}).loss is None
    text = batch(BATCHES["text"])
    for none in (None, [], text["pixel_values"]):
        assert ours(**text | {"pixel_values": none}).loss.item() == ours(**text).loss.item()
    pixels = given["pixel_values"]
    for change, words in [
        ({"input_ids": given["input_ids"][0]}, r"input_ids is \[\d+\]: give a batch"),
        ({"labels": given["labels"][:, 1:]}, r"labels is .* and have one shape"),
        ({"attention_mask": given["attention_mask"][:2]}, r"attention_mask is \[2, "),
        (
            {"pixel_values": pixels[0]},
            r"pixel_values is \[3, 28, 28\], but this tower takes \[N, 3, 28, 28\]",
        ),
        ({"pixel_values": pixels.repeat(1, 1, 2, 2)}, r"load pictures with data.images.load"),
        ({"pixel_values": [pixels[0], pixels[0, :, 1:]]}, r"images of unequal sizes"),
        ({"pixel_values": None}, r"brings 0 image\(s\), but its texts have 4 place"),
    ]:
        with pytest.raises(VLMError, match=words):
            ours(**given | change)


def test_a_folder_that_is_wrong_says_what_is(tmp_path: Path) -> None:
    folder = Reference("phi", "clip", "mlp2x_gelu", moe()).save(tmp_path / "s")
    said, weights = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    sparse = said["moe"]
    for change, words in [
        ({"image_projector_type": "qformer2_64"}, "config.json: projector: 'qformer2_64' is neither linear"),
        ({"vocab_size": None}, "does not say what the model is: it has no vocab_size"),
        ({"moe": {"moe_enable": True}}, "its `moe` has no 'num_experts'"),
        ({"moe": sparse | {"top_k_experts": 7}}, r"its `moe`: top_k: top_k \(7\) is more than experts"),
    ]:
        told = {key: value for key, value in (said | change).items() if value is not None}
        (folder / "config.json").write_text(json.dumps(told))
        with pytest.raises(InterchangeError, match=words):
            load_moe_llava(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InterchangeError, match=r"config.json is no JSON"):
        load_moe_llava(folder)
    # A number for all, and a mode in the list's place, say the same.
    plain = sparse | {"num_experts": 4, "moe_layers_idx": None}
    (folder / "config.json").write_text(json.dumps(said | {"moe": plain}))
    assert load_moe_llava(folder).moe == load_moe_llava(folder, dtype=torch.bfloat16).moe
    for content, words in [
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (b"garbage!", "model.safetensors cannot be read: .*copy it again"),
    ]:
        weights.write_bytes(content)
        with pytest.raises(BackboneError, match=words):
            load_moe_llava(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(
        BackboneError, match=r"pytorch_model.bin cannot be read: it is no file that torch.save"
    ):
        load_moe_llava(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InterchangeError, match=r"holds no weights: .* no mm_projector.bin of a stage 1"):
        load_moe_llava(folder)


def test_a_phi_without_its_heads_bias_is_exported_and_started_from(tmp_path: Path) -> None:
    torch.manual_seed(6)
    folder = Reference("phi", "clip", "mlp2x_gelu", None).save(tmp_path / "stage2")
    read, given = load_moe_llava(folder).eval(), batch(BATCHES["two"])
    export_hf(read, tmp_path / "export")
    again = MoEVLM.from_pretrained(tmp_path / "export").vlm.eval()
    assert again.state_dict().keys() == read.state_dict().keys()  # one more would be memory as it was found
    torch.testing.assert_close(again(**given).logits, read(**given).logits)
    spec = blueprint(read)
    spec = replace(spec, config={k: v for k, v in spec.config.items() if k != "lm_head_bias"})
    started = build(spec, vocab_size=WORDS, seed=0, dtype=torch.float32).eval()
    torch.nn.init.ones_(started.language.lm_head.bias)
    fill(folder, started)
    started.tower.load_state_dict(read.tower.state_dict())  # a run's is its spec's own
    torch.testing.assert_close(started(**given).logits, read(**given).logits)
