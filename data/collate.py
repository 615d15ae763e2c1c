"""Samples to a micro-batch, and an over-long sample to one that fits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.conversation import IGNORED, IMAGE_ID
from data.index import Row


def spliced(ids: np.ndarray, patches: int) -> int:
    """Tokens of a sequence once each image has become its patches."""
    return len(ids) + int((ids == IMAGE_ID).sum()) * (patches - 1)


def cut(row: Row, patches: int, longest: int) -> Row:
    """A row of at most `longest` tokens, image patches included; the same object when it fits.

    It ends after the last answer that fits whole. When not even the first does, that answer is cut, but never
    inside an image; images after the cut are dropped with their text.
    """
    ends = np.cumsum(np.where(row.input_ids == IMAGE_ID, patches, 1))
    if ends[-1] <= longest:
        return row
    fitting = [end for end in row.ends if ends[end - 1] <= longest]
    stop = fitting[-1] if fitting else int(np.searchsorted(ends, longest, side="right"))
    ids = row.input_ids[:stop]
    return Row(ids, row.labels[:stop], fitting, row.images[: int((ids == IMAGE_ID).sum())])


def joined(rows: Sequence[Row]) -> Row:
    """Several samples as one sequence; each starts with an unlearnt token, so none learns to follow."""
    ids = np.concatenate([row.input_ids for row in rows])
    labels = np.concatenate([row.labels for row in rows])
    return Row(ids, labels, [], [image for row in rows for image in row.images])


def segments(packed: Sequence[Sequence[Row]]) -> Tensor:
    """Which sample each token belongs to, int64 [B, S], counted from 1 in each sequence; 0 is padding."""
    longest = max(sum(len(row.input_ids) for row in rows) for rows in packed)
    numbers = torch.zeros((len(packed), longest), dtype=torch.int64)
    for at, rows in enumerate(packed):
        start = 0
        for number, row in enumerate(rows, 1):
            numbers[at, start : start + len(row.input_ids)] = number
            start += len(row.input_ids)
    return numbers


def collate(rows: Sequence[Row], pixel_values: Tensor, pad: int) -> dict[str, Tensor]:
    """Rows, padded on the right, and their pictures [N, 3, H, W], bytes, in the order of the placeholders.

    Unlike the reference's, the mask does not hide a pad token that is part of a text.
    """
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    input_ids, labels = np.full(shape, pad, np.int64), np.full(shape, IGNORED, np.int64)
    mask = np.zeros(shape, np.bool_)
    for at, row in enumerate(rows):
        count = len(row.input_ids)
        input_ids[at, :count] = row.input_ids
        labels[at, :count] = row.labels
        mask[at, :count] = True
    arrays = {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
    return {**{name: torch.from_numpy(array) for name, array in arrays.items()}, "pixel_values": pixel_values}
