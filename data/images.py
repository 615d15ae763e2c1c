"""A picture file to the square float tensor that a vision tower takes, equal to the reference's to 1e-5.

As in the reference, EXIF rotation is not applied and transparency is dropped, not blended. Unlike it, 16-bit
pictures are scaled to 8 bits instead of saturated, and a picture one to three pixels high is a picture.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data import fast

Aspect = Literal["square", "pad"]

MOST_PIXELS = 178_956_970  # where Pillow refuses; a decoded picture of that size takes half a gigabyte
LONGEST = 100  # aspect ratio above which only the part that the crop keeps is resized: the whole takes 34 MB

# Pillow warns from half of MOST_PIXELS on, for each picture anew. The limit is checked here, in words.
Image.MAX_IMAGE_PIXELS = None


class ImageError(ValueError):
    """A picture that cannot be used; the message names the file and says why."""


@dataclass(frozen=True)
class ImageFormat:
    """What a vision tower takes.

    crop scales the short edge and cuts out the middle (CLIP), squash scales both edges (SigLIP). `mean` and
    `std` are of channels scaled to 0..1.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Literal["crop", "squash"]

    @property
    def background(self) -> tuple[int, int, int]:
        """The colour that pads to a square: the mean, rounded down (MoE-LLaVA, moellava/mm_utils.py)."""
        red, green, blue = (int(channel * 255) for channel in self.mean)
        return red, green, blue


def load(path: Path | str | bytes, format: ImageFormat, aspect: Aspect, *, quick: bool = False) -> Tensor:
    """A picture file, or its bytes, as float32 [3, size, size]; ImageError when it cannot be read."""
    out = torch.empty((3, format.size, format.size), dtype=torch.float32)
    return normalise(pixels(path, format, aspect, quick=quick).transpose(2, 0, 1), format, out)


def normalise(raw: np.ndarray, format: ImageFormat, out: Tensor) -> Tensor:
    """uint8 [3, H, W] to float32 in `out`: scaled to 0..1, less the mean, over the deviation."""
    target = out.numpy()
    for channel, (mean, std) in enumerate(zip(format.mean, format.std, strict=True)):
        np.multiply(raw[channel], np.float32(1 / (255 * std)), out=target[channel])
        target[channel] -= np.float32(mean / std)
    return out


def pixels(
    path: Path | str | bytes,
    format: ImageFormat,
    aspect: Aspect,
    *,
    quick: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The scaled picture before normalisation, uint8 [size, size, 3]; `out` is filled and returned if given.

    `quick` scales with torch's kernel, in a quarter of the time; it differs from Pillow's by one or two grey
    levels in under 1 % of the values (69 dB at worst).
    """
    if out is None:
        out = np.empty((format.size, format.size, 3), np.uint8)
    if quick:
        _fast(path, format, aspect, out)
        return out
    picture = read(path)
    if aspect == "pad":
        picture = _padded(picture, format.background)
    if format.resize == "squash":
        picture = picture.resize((format.size, format.size), Image.Resampling.BICUBIC)
    else:
        picture = _cropped(picture, format.size)
    out[:] = np.asarray(picture)
    return out


def _fast(path: Path | str | bytes, format: ImageFormat, aspect: Aspect, out: np.ndarray) -> None:
    """As `pixels`, with torch's antialiased bicubic kernel on bytes."""
    try:
        _scaled(_decoded(path), format, aspect, out)
    except ValueError:  # libjpeg-turbo does not take it; Pillow may, or says what is wrong with it
        _scaled(_by_pillow(read(path)), format, aspect, out)


def _decoded(path: Path | str | bytes) -> fast.Decoded:
    try:
        data = path if isinstance(path, bytes) else _bytes(path)
    except OSError:
        data = b""  # Pillow says it in words
    picture = fast.jpeg(data)
    if picture is None or picture.width * picture.height > MOST_PIXELS:
        return _by_pillow(read(path))
    return picture


def _bytes(path: Path | str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # half the time of Path.read_bytes
        return file.read()


def _by_pillow(picture: Image.Image) -> fast.Decoded:
    def into(target: np.ndarray) -> None:
        target[:] = np.asarray(picture)

    return fast.Decoded(*picture.size, into)


def _scaled(picture: fast.Decoded, format: ImageFormat, aspect: Aspect, out: np.ndarray) -> None:
    long, short = max(picture[:2]), min(picture[:2])
    if aspect == "pad" and long != short:
        fast.squared(picture, format.background, out)
    elif format.resize == "squash" or long == short:
        fast.whole(picture, out)
    elif long > LONGEST * short:
        line = np.empty((picture.height, picture.width, 3), np.uint8)
        picture.into(line)
        out[:] = np.asarray(_cropped(Image.fromarray(line), format.size))
    else:
        fast.cropped(picture, out)


def read(path: Path | str | bytes) -> Image.Image:
    """The picture in RGB, the first frame of an animated one; ImageError says what is wrong with the file."""
    name = "picture" if isinstance(path, bytes) else str(path)
    try:
        with Image.open(io.BytesIO(path) if isinstance(path, bytes) else path) as picture:
            width, height = picture.size
            if width * height > MOST_PIXELS:
                raise ImageError(
                    f"{name}: {width} x {height} pixels are more than {MOST_PIXELS:,}; scale it down first"
                )
            return _rgb(picture)
    except FileNotFoundError:
        raise ImageError(f"{name}: there is no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: this is a folder, not a picture") from None
    except UnidentifiedImageError:
        empty = not path if isinstance(path, bytes) else Path(path).stat().st_size == 0
        raise ImageError(
            f"{name}: {'the file is empty' if empty else 'not a picture that Pillow can read'}"
        ) from None
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise
        raise ImageError(f"{name}: the picture is damaged: {error}") from None


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.array(picture, dtype=np.float32)
        if picture.mode != "F" and (picture.mode != "I" or values.max() > 255):
            values /= 257  # 65535 becomes 255
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # the same colours; Pillow warns of the direct way
    if picture.mode == "RGB":
        picture.load()  # convert would copy it
        return picture
    return picture.convert("RGB")


def _padded(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    square = Image.new("RGB", (side, side), background)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


def _cropped(picture: Image.Image, size: int) -> Image.Image:
    """Short edge to `size`, then its middle; the long edge rounds down (transformers image_transforms.py)."""
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    new = int(size * long / short)
    offset = (new - size) // 2
    if long > LONGEST * short:
        # A picture of one line becomes `size` times as long as it was: only the middle is made. Pillow may
        # then run its two passes in the other order, which moves hard edges by a few grey levels.
        left, right = offset * long / new, (offset + size) * long / new
        box = (left, 0, right, height) if width > height else (0, left, width, right)
        return picture.resize((size, size), Image.Resampling.BICUBIC, box)
    scaled = picture.resize((new, size) if width > height else (size, new), Image.Resampling.BICUBIC)
    x, y = (offset, 0) if width > height else (0, offset)
    return scaled.crop((x, y, x + size, y + size))


class Facts(NamedTuple):
    """What `facts` says of a file: the names of its defects are those of data.findings."""

    width: int
    height: int
    format: str
    defects: list[str]


def facts(path: Path) -> Facts:
    """Decode a picture, a JPEG at an eighth of its size, and say what is unusual about it."""
    if path.stat().st_size == 0:
        return Facts(0, 0, "", ["image-empty"])
    found: list[str] = []
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if width * height > MOST_PIXELS:
                return Facts(width, height, (picture.format or "").lower(), ["image-giant"])
            if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
                found.append("image-animated")
            if picture.mode == "CMYK":
                found.append("image-cmyk")
            if picture.mode.startswith("I") or picture.mode == "F":
                found.append("image-sixteen-bit")
            if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA"):
                found.append("image-transparent")
            if picture.getexif().get(0x0112, 1) not in (0, 1):
                found.append("image-rotated")
            if min(width, height) < 4 or max(width, height) > 50 * min(width, height):
                found.append("image-thin")
            name = (picture.format or "").lower()
            picture.seek(0)
            picture.draft("RGB", (max(1, width // 8), max(1, height // 8)))
            picture.load()
    except UnidentifiedImageError:
        return Facts(0, 0, "", ["image-unreadable"])
    except PermissionError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError):
        return Facts(0, 0, "", ["image-damaged"])
    return Facts(width, height, name, found)


def thumbnail(path: Path, side: int) -> bytes:
    """A small JPEG of a picture; ImageError when it cannot be read."""
    picture = read(path)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return file.getvalue()
