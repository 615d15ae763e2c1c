"""What each way of batching would waste on given lengths: the share of slots that hold a token."""

from __future__ import annotations

import numpy as np

from data.packing import WINDOW, pack
from data.sampler import by_modality

MICRO, CHUNKS = 8, 16  # micro-batch, and micro-batches of a step: the reference's 128 samples


def fill(lengths: np.ndarray, signed: np.ndarray, capacity: int, seed: int = 0) -> dict[str, float]:
    """Real over padded slots, image patches counted, a row a way of batching; `signed` words as the
    sampler's.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    rows = {
        f"random, {MICRO} a batch": _batches(lengths[order]),
        "group_by: modality (the reference's)": _batches(lengths[_grouped(signed)]),
        "group_by: length": _batches(np.sort(lengths)),
        f"padded to {capacity}": float(lengths.mean() / capacity),
    }
    for size in sorted({capacity, 4096, 8192, 16384}):
        if size >= capacity:
            rows[f"packing, {size} slots"] = _packed(lengths[order], size)
    return rows


def _grouped(signed: np.ndarray) -> np.ndarray:
    return np.array(by_modality(signed, MICRO, CHUNKS).flat())


def _batches(lengths: np.ndarray) -> float:
    padded = np.pad(lengths, (0, -len(lengths) % MICRO)).reshape(-1, MICRO)
    return float(lengths.sum() / (padded.max(axis=1) * np.count_nonzero(padded, axis=1)).sum())


def _packed(lengths: np.ndarray, capacity: int) -> float:
    bins = [len(pack(lengths[at : at + WINDOW].tolist(), capacity)) for at in range(0, len(lengths), WINDOW)]
    return float(lengths.sum() / (sum(bins) * capacity))
