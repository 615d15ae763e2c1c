"""The splice, the loss, and what trains."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from data.images import ImageFormat, normalise
from moe import vlm as module
from moe.stages import STAGES
from moe.vlm import IGNORE, IMAGE, VLMError, normalised, parts, projector, train_only
from tests.moe.tiny import WORDS, batch, model


def test_bytes_are_normalised_as_the_data_side_does() -> None:
    vlm = model()
    size, mean, std = vlm.vision.size, vlm.vision.mean, vlm.vision.std
    raw = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    floats = torch.empty(2, 3, size, size)
    for each, out in zip(raw, floats, strict=True):
        normalise(each.numpy(), ImageFormat(size, mean, std, vlm.vision.resize), out)
    assert torch.equal(normalised(raw, mean, std), floats)
    assert torch.equal(vlm.image_features(raw), vlm.image_features(floats))


def test_features_stand_where_the_text_says() -> None:
    vlm = model()
    given = batch([7, 4, 6], [2, 0, 1])
    given["attention_mask"][2, 3] = False  # a hole: the position is dropped, not attended to
    spliced = vlm.splice(**given)
    features, embed = vlm.image_features(given["pixel_values"]), vlm.language.get_input_embeddings()
    at = 0
    for row, (ids, kept) in enumerate(zip(given["input_ids"], given["attention_mask"], strict=True)):
        want, image = [], []
        for token in ids[kept]:
            if token == IMAGE:
                want += list(features[at])
                image += [True] * features.shape[1]
                at += 1
            else:
                want.append(embed(token))
                image.append(False)
        length = len(want)
        torch.testing.assert_close(spliced.embeds[row, :length], torch.stack(want))
        assert not spliced.embeds[row, length:].any()
        assert spliced.mask[row].tolist() == [True] * length + [False] * (spliced.mask.shape[1] - length)
        assert spliced.image[row, :length].tolist() == image
        text = spliced.labels[row, :length][~torch.tensor(image)]
        assert text.tolist() == given["labels"][row][kept & (ids != IMAGE)].tolist()
        assert (spliced.labels[row, :length][torch.tensor(image)] == IGNORE).all()


def test_padding_changes_nothing() -> None:
    vlm = model().eval()
    together = batch([9, 5], [1, 0])
    alone = {key: value[1:, :5] for key, value in together.items() if key != "pixel_values"}
    whole, part = vlm(**together), vlm(**alone)
    torch.testing.assert_close(whole.logits[1, :5], part.logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", ["phi2", "stablelm", "qwen2", "qwen3", "mistral", "llama", "minicpm"])
def test_packed_samples_do_not_see_each_other(backbone: str, attention: str) -> None:
    vlm = model(backbone, attention=attention).eval()
    apart = batch([9, 5, 7], [1, 0, 2])
    rows = [apart["input_ids"][i][apart["attention_mask"][i]] for i in range(3)]
    labels = [apart["labels"][i][apart["attention_mask"][i]] for i in range(3)]
    order = [[0, 1], [2]]  # two samples in the first row, one and padding in the second

    def packed(values: list[torch.Tensor], fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [torch.cat([values[i] for i in row]) for row in order], batch_first=True, padding_value=fill
        )

    numbers = [torch.full_like(rows[i], {0: 1, 1: 2, 2: 1}[i]) for i in range(3)]
    together = vlm(
        packed(rows, 0),
        packed([torch.ones_like(r) for r in rows], 0).bool(),
        packed(labels, IGNORE),
        apart["pixel_values"],
        segments=packed(numbers, 0),
    )
    alone = vlm(**apart)
    assert int(together.tokens) == int(alone.tokens)
    assert together.ce_sum.item() == pytest.approx(alone.ce_sum.item(), rel=1e-5)
    found = together.hidden[together.mask]
    torch.testing.assert_close(found, alone.hidden[alone.mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ["phi2", "stablelm", "mistral"])
def test_the_fast_kernel_without_a_mask_equals_attention_written_out_with_one(backbone: str) -> None:
    """Right-padded, no mask is needed."""
    given, found = batch([12, 5, 9], [1, 0, 1]), []
    for attention in ("sdpa", "eager"):
        vlm = model(backbone, attention=attention).train()
        output = vlm(**given)
        output.loss.backward()
        found.append(
            (output.loss.item(), {n: p.grad for n, p in vlm.named_parameters() if p.grad is not None})
        )
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_over_supervised_next_tokens() -> None:
    vlm = model()
    given = batch([9, 5, 12], [1, 0, 2])
    output = vlm(**given)
    labels, logits = vlm.splice(**given).labels, output.logits
    want = F.cross_entropy(logits[:, :-1].reshape(-1, WORDS), labels[:, 1:].reshape(-1), ignore_index=IGNORE)
    assert output.loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert int(output.tokens) == int((labels[:, 1:] != IGNORE).sum())
    assert output.ce_sum.item() == pytest.approx(want.item() * int(output.tokens), rel=1e-6)


def test_logits_in_chunks_give_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    given, found = batch([19, 15], [1, 0]), []
    for rows in (4096, 4):
        monkeypatch.setattr(module, "ROWS", rows)
        vlm = model().train()
        output = vlm(**given)
        output.loss.backward()
        found.append(
            (output.loss.item(), {n: p.grad for n, p in vlm.named_parameters() if p.grad is not None})
        )
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, rtol=1e-5, atol=1e-7)


def test_a_batch_without_labels_has_a_loss_of_zero_and_gradients_of_zero() -> None:
    vlm = model().train()
    given = batch([6, 6], [1, 1])
    given["labels"].fill_(IGNORE)
    output = vlm(**given)
    output.loss.backward()
    assert output.loss.item() == 0
    assert int(output.tokens) == 0
    assert not vlm.projector[0].weight.grad.any()


@pytest.mark.parametrize("recompute", [False, True])
def test_text_alone_keeps_the_projector_in_the_graph(recompute: bool) -> None:
    vlm = model().train()
    train_only(vlm, STAGES["align"].trains)
    vlm.recompute(recompute)
    given = batch([6, 4], [0, 0])
    vlm(**given).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in vlm.projector.parameters())
    vlm.zero_grad()
    del given["pixel_values"]
    vlm(**given).loss.backward()
    assert vlm.projector[0].weight.grad is not None


def test_recomputing_changes_no_gradient() -> None:
    given, found = batch([9, 6], [1, 0]), []
    for on in (False, True):
        vlm = model().train()
        vlm.recompute(on)
        vlm(**given).loss.backward()
        found.append({n: p.grad for n, p in vlm.named_parameters() if p.grad is not None})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_the_tower_stays_out_of_training() -> None:
    vlm = model().train()
    assert not vlm.tower.training
    train_only(vlm, ["projector", "embeddings", "attention", "norms", "ffn", "head"])
    assert not any(p.requires_grad for p in vlm.tower.parameters())
    vlm(**batch([6], [1])).loss.backward()
    assert all(p.grad is None for p in vlm.tower.parameters())


def test_the_references_blank_image_of_a_text_is_left_out() -> None:
    vlm = model()
    given = batch([7, 4, 6], [2, 0, 1])
    pixels = given.pop("pixel_values")
    brought = torch.cat([pixels[:2], torch.zeros_like(pixels[:1]), pixels[2:]])
    want = vlm(**given, pixel_values=pixels).loss.item()
    assert vlm(**given, pixel_values=brought).loss.item() == want
    # Any other image too many is one that a text has lost its place for.
    for wrong in (pixels[[0, 1, 2, 2]], brought.to(torch.uint8), brought[[0, 1, 2, 2, 3]]):
        with pytest.raises(VLMError, match=r"brings [45] image\(s\), but its texts have 3"):
            vlm(**given, pixel_values=wrong)


@pytest.mark.parametrize("images", [0, 3])
def test_images_without_a_place_are_refused(images: int) -> None:
    given = batch([6, 4], [1, 1])
    given["pixel_values"] = torch.randn(images, 3, 28, 28)
    with pytest.raises(
        VLMError, match=rf"brings {images} image\(s\), but its texts have 2 place\(s\) for one \(-200\)"
    ):
        model()(**given)


@pytest.mark.parametrize(
    ("kind", "linears"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)]
)
def test_projectors(kind: str, linears: int) -> None:
    made = projector(kind, 6, 10)
    assert made(torch.randn(2, 6)).shape == (2, 10)
    assert sum(isinstance(m, torch.nn.Linear) for m in made.modules()) == linears
    assert sum(isinstance(m, torch.nn.GELU) for m in made.modules()) == linears - 1


@pytest.mark.parametrize("stage", STAGES)
def test_only_what_a_stage_names_trains(stage: str) -> None:
    vlm = model("phi2")
    counts = train_only(vlm, STAGES[stage].trains)
    named = {name for part, names in parts(vlm).items() if part in STAGES[stage].trains for name in names}
    assert {name for name, p in vlm.named_parameters() if p.requires_grad} == named
    assert sum(counts.values()) == sum(p.numel() for p in vlm.parameters() if p.requires_grad)


def test_a_parameter_that_belongs_to_no_part_is_a_fault_said() -> None:
    vlm = model()
    vlm.language.extra = torch.nn.Linear(2, 2)
    with pytest.raises(VLMError, match=r"language.extra.weight belongs to no part of moe.stages"):
        parts(vlm)
