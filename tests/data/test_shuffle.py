"""A lazy shuffle is a permutation, and an epoch's samples are the same whether asked for one by one or at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.shuffle import Shuffle

from .places import mixed
from .test_loader import loader, spec


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 16, 17, 1000, 65_537])
def test_each_comes_once(count: int) -> None:
    order = Shuffle(count, 3, 7)[np.arange(count)]
    assert np.array_equal(np.sort(order), np.arange(count))
    assert np.array_equal(order[::2], Shuffle(count, 3, 7)[np.arange(0, count, 2)])
    if count > 10:
        assert not np.array_equal(order, Shuffle(count, 3, 8)[np.arange(count)])


def test_the_order_is_random() -> None:
    count = 100_000
    order = Shuffle(count, 1)[np.arange(count)]
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.015
    assert abs(np.corrcoef(np.arange(count), order)[0, 1]) < 0.015
    # Of a random permutation's neighbours 2 in `count` are neighbours again.
    assert (np.abs(np.diff(order)) == 1).sum() < 20
    halves = [np.bincount(order[at::10] * 10 // count, minlength=10) for at in range(10)]
    assert np.abs(np.array(halves) - 1000).max() < 150


def test_samples_asked_for_singly_are_those_of_the_epoch(tmp_path: Path) -> None:
    mixed(tmp_path, 20)
    mixed(tmp_path, 30, "more.json", start=20)
    mix = {"mixed.json": 0.3, "more.json": 2.5}
    mixture = loader(spec(tmp_path, mix=mix))._mixture
    for epoch in range(4):
        whole = mixture.members(epoch, 5)
        assert np.bincount(whole, minlength=50)[20:].min() == 2
        places = np.random.default_rng(0).permutation(mixture.samples)
        assert np.array_equal(mixture.members(epoch, 5, places), whole[places])
