"""The quick way to scale a picture: libjpeg-turbo straight into a canvas, then torch's antialiased kernel on bytes.

Without the package simplejpeg Pillow decodes, which takes longer and gives the same pixels.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

_bicubic = torch.ops.aten._upsample_bicubic2d_aa.out  # F.interpolate's own, into memory that is there
KINDS = ("YCbCr", "Gray")  # JPEGs that Pillow and libjpeg-turbo turn into RGB alike; CMYK is not one
VECTOR = 32  # bytes, AVX2's
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


def squared(picture: Decoded, background: tuple[int, int, int], out: np.ndarray) -> None:
    """The picture in the middle of a square of the background, scaled into uint8 [size, size, 3]."""
    width, height, size = picture.width, picture.height, len(out)
    side = max(width, height)
    top, left = (side - height) // 2, (side - width) // 2
    # A square of the background needs no scaling beyond the reach of the picture's edges.
    rows, high = _part(side, size, top, top + height)
    columns, wide = _part(side, size, left, left + width)
    canvas = _canvas("canvas", height, columns.stop - columns.start)
    if width < canvas.shape[1]:
        own = _canvas("picture", height, width)
        picture.into(own)
        left -= columns.start
        lines, line = canvas.reshape(height, -1), _line(background, canvas.shape[1])
        lines[:, : 3 * left] = line[: 3 * left]  # whole lines are filled twenty times as fast as pixels
        lines[:, 3 * (left + width) :] = line[3 * (left + width) :]
        canvas[:, left : left + width] = own
    else:
        picture.into(canvas)
    narrow = _canvas("narrow", rows.stop - rows.start, wide.stop - wide.start)
    top -= rows.start
    # Background scaled in a line is background: only the picture's lines go through the kernel.
    lines, line = narrow.reshape(len(narrow), -1), _line(background, narrow.shape[1])
    lines[:top] = lines[top + height :] = line
    _scale(canvas, narrow[top : top + height], across=size / side)
    margins, line = out.reshape(size, -1), _line(background, size)
    margins[: high.start] = margins[high.stop :] = line
    if width == side:
        _scale(narrow, out[high], down=size / side)
        return
    margins[:, : 3 * wide.start] = line[: 3 * wide.start]
    margins[:, 3 * wide.stop :] = line[3 * wide.stop :]
    scaled = _canvas("scaled", size, narrow.shape[1])
    _scale(narrow, scaled)
    out[:, wide] = scaled


def _part(length: int, new: int, first: int, last: int) -> tuple[slice, slice]:
    """The least part of `length` places, with first:last in it, that can be scaled by itself, and where it goes.

    It reaches as far as the kernel does, and begins where a place of `length` and one of `new` both do.
    """
    step = length // math.gcd(length, new)
    reach = 2 * max(1, -(-length // new)) + 2  # bicubic: two places of the coarser grid
    start = max(0, (first - reach) // step * step)
    end = min(new, -(-(last + reach) * new // length))
    return slice(start, min(length, -(-end * length // new) + reach)), slice(start * new // length, end)


def cropped(picture: Decoded, out: np.ndarray) -> None:
    """Short edge to the size of `out`, uint8 [size, size, 3], then its middle; the long edge rounds down."""
    width, height, size = picture.width, picture.height, len(out)
    long = int(size * max(width, height) / min(width, height))
    new = (size, long) if width > height else (long, size)
    scaled = _canvas("scaled", *new)
    _scale(_whole(picture), scaled)
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    out[:] = scaled[top : top + size, left : left + size]


def whole(picture: Decoded, out: np.ndarray) -> None:
    """The picture scaled into uint8 [height, width, 3]."""
    _scale(_whole(picture), out)


def _whole(picture: Decoded) -> np.ndarray:
    canvas = _canvas("canvas", picture.height, picture.width)
    picture.into(canvas)
    return canvas


def _scale(
    picture: np.ndarray, out: np.ndarray, down: float | None = None, across: float | None = None
) -> None:
    """Write uint8 [height, width, 3] scaled; the factors are the shapes' where none are given."""
    # In this order torch sees that a pixel's channels lie together. `out` must lie in one piece: the kernel fills
    # another one as if it did.
    source, target = (torch.from_numpy(array)[None].permute(0, 3, 1, 2) for array in (picture, out))
    _bicubic(source, out.shape[:2], False, down, across, out=target)


@functools.lru_cache(256)
def _line(colour: tuple[int, int, int], width: int) -> np.ndarray:
    return np.tile(np.array(colour, np.uint8), width)


def _canvas(name: str, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3] of what was there before, at an address that no vector store is aligned to."""
    need = height * width * 3
    buffer = getattr(_scratch, name, None)
    if buffer is None or len(buffer) < need:
        fresh = np.empty(need + 2 * VECTOR, np.uint8)
        # Lines that begin at a multiple of a vector libjpeg-turbo writes past the caches (vmovntdq in its
        # simd/x86_64/jdcolext-avx2.asm), although they are read at once: it takes 4 % of a sample's time.
        buffer = fresh[(VECTOR // 2 - fresh.ctypes.data) % VECTOR :]
        setattr(_scratch, name, buffer)
    return buffer[:need].reshape(height, width, 3)
