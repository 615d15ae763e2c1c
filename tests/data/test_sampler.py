"""Orders equal the reference's for its seeds."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from data.index import words
from data.sampler import by_length, by_modality, even_chunks

from .support import GOLDENS

RECORDED = json.loads((GOLDENS / "sampler.json").read_text())
LENGTHS = np.array([5, 9, 3, 7, -4, -8, 6, 2, -1, 8, 4, -6, 10, 1, -3, 12, 11, -2, 13, 14])


def seeded(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["name"])
def test_orders_equal_the_reference(case: dict[str, Any]) -> None:
    torch.manual_seed(case["global_seed"])
    order = by_modality(
        case["lengths"], case["batch_size"], case["world_size"], seeded(case["generator_seed"])
    )
    assert order.flat() == case["indices"]


def test_two_epochs_equal_the_reference() -> None:
    case = RECORDED["length_grouped_sampler"]
    torch.manual_seed(case["global_seed"])
    for epoch in ("epoch1", "epoch2"):
        assert by_modality(np.array(case["lengths"]), 2, 2).flat() == case[epoch]


@pytest.mark.parametrize("case", RECORDED["split_to_even_chunks"], ids=str)
def test_chunks_equal_the_reference(case: dict[str, Any]) -> None:
    assert even_chunks(case["indices"], case["lengths"], case["num_chunks"]) == case["out"]


def test_words_equal_the_reference() -> None:
    case = RECORDED["modality_lengths"]
    for sample, length in zip(case["samples"], case["modality_lengths"], strict=True):
        assert words(sample["conversations"]) == abs(length)


@pytest.mark.parametrize(
    ("seed", "want"),
    [
        (0, [9, 10, 3, 6, 15, 13, 16, 2, 11, 8, 4, 14, 19, 7, 18, 1, 0, 5, 12, 17]),
        (42, [1, 7, 3, 0, 5, 8, 4, 17, 12, 13, 9, 2, 18, 10, 15, 6, 11, 14, 16, 19]),
    ],
)
def test_the_two_generators_are_the_references(seed: int, want: list[int]) -> None:
    torch.manual_seed(seed)
    assert by_modality(LENGTHS, 2, 2, seeded(seed)).flat() == want
    order = by_modality(LENGTHS, 2, 2, seeded(seed), seeded(seed))  # the global one, seeded alike
    assert order.flat() == want


def test_a_single_modality_is_grouped_by_length() -> None:
    want = [19, 13, 5, 4, 3, 7, 6, 14, 9, 17, 11, 2, 18, 10, 16, 12, 15, 8, 1, 0]
    assert by_length(np.abs(LENGTHS), 2, 2, seeded(0)).flat() == want
    assert by_modality(np.abs(LENGTHS), 2, 2, seeded(0)).flat() == want


def test_a_length_of_zero_has_no_modality() -> None:
    with pytest.raises(ValueError, match="length 0 belongs to no modality"):
        by_modality(np.array([1, 0, -1]), 1, 1)


def test_megabatches_are_of_one_modality_but_the_last() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 1000) * np.random.default_rng(1).choice([1, -1], 1000)
    order = by_modality(lengths, 4, 4, seeded(1), seeded(2))
    assert sorted(order.flat()) == list(range(1000))
    kinds = [{bool(lengths[at] > 0) for at in megabatch} for megabatch in order]
    assert all(len(kind) == 1 for kind in kinds[:-2])
    assert {len(megabatch) for megabatch in list(order)[:-1]} == {16}
