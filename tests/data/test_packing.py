"""Packed sequences are full, lose nothing, resume, and train as their samples do alone."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import packing
from data.packing import pack, positions

from .places import mixed
from .support import tokenizer
from .test_loader import flat, loader, spec


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 50), max_size=60), capacity=st.integers(50, 120))
def test_bins_hold_everything_once_and_never_too_much(lengths: list[int], capacity: int) -> None:
    bins = pack(lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in members) for members in bins]
    assert all(0 < total <= capacity for total in sums)
    # No bin closes while anything left would fit.
    for at in range(len(bins)):
        left = [lengths[index] for later in bins[at + 1 :] for index in later]
        assert not left or sums[at] + min(left) > capacity


def test_a_sample_longer_than_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="a sample of 9 tokens does not fit into 8"):
        pack([3, 9], 8)
    with pytest.raises(ValueError, match="a sample without tokens"):
        pack([3, 0], 8)


def mix_lengths(count: int) -> np.ndarray:
    """Lengths like the 665k mix's: 94 % an image of 576 patches and some text, 6 % long texts."""
    rng = np.random.default_rng(0)
    text = np.exp(rng.normal(5.05, 0.65, count)).astype(int) + 40
    alone = np.minimum(np.exp(rng.normal(6.9, 0.8, count)).astype(int) + 40, 2048)
    return np.where(rng.random(count) < 0.939, np.minimum(text + 576, 2048), alone)


@pytest.mark.parametrize(("capacity", "least"), [(4096, 0.95), (8192, 0.99), (16384, 0.997)])
def test_slots_are_filled(capacity: int, least: float) -> None:
    lengths = mix_lengths(packing.WINDOW).tolist()
    bins = pack(lengths, capacity)
    assert sum(lengths) / (len(bins) * capacity) >= least


def test_positions_begin_anew_with_each_sample() -> None:
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 3, 3, 3, 3]])
    assert positions(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]


def block_mask(segments: torch.Tensor) -> torch.Tensor:
    """Who attends to whom, bool [B, 1, S, S]: earlier tokens of the same sample; padding sees padding."""
    same = segments[:, :, None] == segments[:, None, :]
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return (same & causal)[:, None]


def told(batch: dict[str, torch.Tensor]) -> list[int]:
    """Sample numbers of packed sequences, by their answers."""
    found = []
    for labels, segments in zip(batch["labels"], batch["segments"], strict=True):
        for segment in range(1, int(segments.max()) + 1):
            own = labels[segments == segment]
            text = tokenizer("llama_legacy").decode(own[own >= 0])
            found.append(int(text.split(".")[0].removeprefix("Number ")))
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    mixed(tmp_path, 60)
    return tmp_path


def take(source: Any, steps: int) -> list[list[list[int]]]:
    return [[told(batch) for batch in step] for step in itertools.islice(source, steps)]


def test_a_packed_epoch_takes_each_sample_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW", 25)
    monkeypatch.setattr(packing, "FIRST", 10)
    got = loader(spec(root, packing=True, max_length=600), micro=2, accumulation=1)
    per_epoch = got.samples
    assert per_epoch < 40
    steps = got.steps()
    sequences: list[list[int]] = []
    for step in itertools.islice(steps, per_epoch + 3):
        for batch in step:
            assert batch["input_ids"].shape == batch["segments"].shape
            assert ((batch["segments"] > 0) == batch["attention_mask"]).all()
            lengths = batch["attention_mask"].sum(1) + (batch["input_ids"] == -200).sum(1) * 3
            assert (lengths <= 600).all()
            assert len(batch["pixel_values"]) == (batch["input_ids"] == -200).sum()
            for at in range(len(batch["labels"])):
                sequences.append(told({key: value[at : at + 1] for key, value in batch.items()}))
    stream = [number for sequence in sequences for number in sequence]
    for epoch in range(2):
        assert sorted(stream[epoch * 60 : (epoch + 1) * 60]) == list(range(60))
    assert got.report()["padding"] < 0.2


def test_a_packed_stream_resumes_and_reshards(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW", 25)
    monkeypatch.setattr(packing, "FIRST", 10)
    given = spec(root, packing=True, max_length=500)
    whole = take(loader(given, micro=1, accumulation=6).steps(), 12)
    for point in range(0, 12, 3):
        first = loader(given, micro=1, accumulation=6)
        take(first.steps(), point)
        state = json.loads(json.dumps(first.state_dict()))
        again = loader(given, micro=1, accumulation=6)
        again.load_state_dict(state)
        assert take(again.steps(), 1) == [whole[point]]
        parts = []
        for rank in range(3):
            own = loader(given, micro=1, accumulation=2, rank=rank, world=3)
            own.load_state_dict(state)
            parts.append(take(own.steps(), 2))
        for turn in range(2):
            assert Counter(flat([part[turn] for part in parts])) == Counter(flat([whole[(point + turn)]]))


def test_a_substitute_fits_the_room(root: Path) -> None:
    (root / "pictures" / "00004.png").unlink()
    got = loader(spec(root, packing=True, max_length=500, bad_samples=9), micro=2, accumulation=2)
    for step in itertools.islice(got.steps(), 10):
        for batch in step:
            lengths = batch["attention_mask"].sum(1) + (batch["input_ids"] == -200).sum(1) * 3
            assert (lengths <= 500).all()
    assert got.report()["replaced"]


def test_packed_samples_train_as_they_do_alone() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    samples = [torch.randint(0, 64, (length,)) for length in (5, 9, 3, 7)]

    def losses(ids: torch.Tensor, segments: torch.Tensor) -> list[torch.Tensor]:
        logits = model(ids, attention_mask=block_mask(segments), position_ids=positions(segments)).logits
        found = []
        for row in range(len(ids)):
            for segment in range(1, int(segments[row].max()) + 1):
                own = segments[row] == segment
                found.append(
                    torch.nn.functional.cross_entropy(
                        logits[row, own][:-1], ids[row, own][1:], reduction="sum"
                    )
                )
        return found

    def gradients(total: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        total.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    alone = [losses(ids[None], torch.ones(1, len(ids), dtype=torch.long))[0] for ids in samples]
    ids = torch.cat([*samples, torch.zeros(2, dtype=torch.long)])[None]
    segments = torch.cat(
        [torch.full((len(ids),), number) for number, ids in enumerate(samples, 1)] + [torch.zeros(2)]
    ).long()[None]
    together = losses(ids, segments)
    assert torch.allclose(torch.stack(alone), torch.stack(together), atol=1e-5)
    for one, other in zip(gradients(sum(alone)), gradients(sum(together)), strict=True):  # type: ignore[arg-type]
        assert torch.allclose(one, other, atol=1e-5)
