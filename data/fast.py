"""The quick way to scale a picture: libjpeg-turbo straight into a canvas, then torch's antialiased kernel on bytes.

Without the package simplejpeg Pillow decodes, which takes longer and gives the same pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

KINDS = ("YCbCr", "Gray")  # JPEGs that Pillow and libjpeg-turbo turn into RGB alike; CMYK is not one
_scratch = threading.local()  # each thread's canvases: fresh megabytes cost as much as scaling them


class Decoded(NamedTuple):
    """A picture to be: `into` writes it into uint8 [height, width, 3], which lies in one piece."""

    width: int
    height: int
    into: Callable[[np.ndarray], None]


def jpeg(data: bytes) -> Decoded | None:
    """A JPEG file; None for another one, or where it is for Pillow to say what is wrong."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, kind, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if kind not in KINDS:
        return None

    def into(target: np.ndarray) -> None:
        simplejpeg.decode_jpeg(data, "RGB", buffer=target)

    return Decoded(width, height, into)


def squared(picture: Decoded, size: int, background: tuple[int, int, int]) -> np.ndarray:
    """The picture in the middle of a square of the background, uint8 [size, size, 3]."""
    width, height = picture.width, picture.height
    side = max(width, height)
    canvas = _canvas("canvas", side, side)
    top, left = (side - height) // 2, (side - width) // 2
    lines = canvas.reshape(side, side * 3)  # whole lines are filled twenty times as fast as pixels
    line = np.tile(np.array(background, np.uint8), side)
    if left or width < side:
        own = _canvas("picture", height, width)
        picture.into(own)
        lines[:, : 3 * left] = line[: 3 * left]
        lines[:, 3 * (left + width) :] = line[3 * (left + width) :]
        canvas[:, left : left + width] = own
    else:
        picture.into(canvas[top : top + height])
        lines[:top] = lines[top + height :] = line
    return _scaled(canvas, size, size)


def cropped(picture: Decoded, size: int) -> np.ndarray:
    """Short edge to `size`, then its middle; the long edge rounds down."""
    width, height = picture.width, picture.height
    long = int(size * max(width, height) / min(width, height))
    new = (size, long) if width > height else (long, size)
    scaled = whole(picture, *new)
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    return scaled[top : top + size, left : left + size]


def whole(picture: Decoded, height: int, width: int) -> np.ndarray:
    """The picture scaled to uint8 [height, width, 3]."""
    canvas = _canvas("canvas", picture.height, picture.width)
    picture.into(canvas)
    return _scaled(canvas, height, width)


def _scaled(canvas: np.ndarray, height: int, width: int) -> np.ndarray:
    planes = torch.from_numpy(canvas).permute(2, 0, 1)[None]
    scaled = F.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


def _canvas(name: str, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3] of what was there before."""
    need = height * width * 3
    buffer = getattr(_scratch, name, None)
    if buffer is None or len(buffer) < need:
        buffer = np.empty(need, np.uint8)
        setattr(_scratch, name, buffer)
    return buffer[:need].reshape(height, width, 3)
