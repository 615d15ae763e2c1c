"""A batch as the model takes it, or what is wrong with its shapes, in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.parts import VLMError


def checked(
    input_ids: Tensor,
    beside: dict[str, Tensor | None],
    pixel_values: Tensor | Sequence[Tensor] | None,
    side: int,
) -> Tensor | None:
    """The images as [N, 3, side, side], which may be given one by one; VLMError for what fits nothing.

    No value is looked at.

    `beside`: what must have the ids' shape [B, S], by name.
    """
    if input_ids.dim() != 2:
        raise VLMError(
            f"input_ids is {_shape(input_ids)}: give a batch [B, S], of one sample input_ids[None]"
        )
    for name, tensor in beside.items():
        if tensor is not None and tensor.shape != input_ids.shape:
            raise VLMError(
                f"{name} is {_shape(tensor)}, but input_ids {_shape(input_ids)}: they say something of each token "
                "and have one shape; images have one -200 in both"
            )
    if pixel_values is None:
        return None
    if not isinstance(pixel_values, Tensor):
        images = [image if image.dim() == 4 else image[None] for image in pixel_values]
        if not images:
            return None
        if len({image.shape[1:] for image in images}) > 1:
            raise VLMError(f"pixel_values has images of unequal sizes: {[_shape(image) for image in images]}")
        pixel_values = torch.cat(images)
    if pixel_values.shape[1:] != (3, side, side):
        raise VLMError(
            f"pixel_values is {_shape(pixel_values)}, but this tower takes [N, 3, {side}, {side}]: load pictures "
            "with data.images.load in the tower's format"
        )
    return pixel_values


def without_blanks(pixel_values: Tensor, places_B: Tensor) -> Tensor:
    """The images without the blank ones that the reference's loader brings for samples that have none.

    `places_B`: how many each sample has a place for. Given back whole where that is not what there is too many of.
    """
    brings_B = places_B.clamp(min=1)
    blank_B = (brings_B.cumsum(0) - brings_B)[places_B == 0]
    # Zeros as bytes are a black picture, as normalised floats the reference's blank.
    if len(pixel_values) != int(brings_B.sum()) or not pixel_values.is_floating_point():
        return pixel_values
    if bool(pixel_values[blank_B].any()):
        return pixel_values
    kept = torch.ones(len(pixel_values), dtype=torch.bool, device=pixel_values.device)
    kept[blank_B] = False
    return pixel_values[kept]


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
