"""The quick path takes libjpeg-turbo where that gives Pillow's pixels, and Pillow everywhere else."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data import fast, images
from data.images import ImageError, ImageFormat
from data.loader import Loader

from .places import FORMAT, PATCHES, record, write
from .support import tokenizer
from .test_loader import spec

CLIP = ImageFormat(64, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), "crop")
SQUASH = ImageFormat(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash")
turbo = pytest.mark.skipif(fast.simplejpeg is None, reason="needs simplejpeg")


def jpeg(width: int, height: int, mode: str = "RGB", **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


@turbo
@pytest.mark.parametrize("format", [CLIP, SQUASH], ids=["crop", "squash"])
@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((200, 120), {}),
        ((121, 201), {"subsampling": 0, "quality": 97}),
        ((90, 90), {"progressive": True}),
        ((150, 70), {"mode": "L"}),
        ((70, 151), {"mode": "CMYK"}),
    ],
    ids=["landscape", "portrait", "progressive", "grey", "cmyk"],
)
def test_both_decoders_give_the_same_pixels(
    size: tuple[int, int], options: dict[str, Any], aspect: Any, format: ImageFormat, monkeypatch: Any
) -> None:
    data = jpeg(*size, **options)
    assert (fast.jpeg(data) is None) is (options.get("mode") == "CMYK")
    quick = images.pixels(data, format, aspect, quick=True).copy()
    monkeypatch.setattr(fast, "simplejpeg", None)
    assert fast.jpeg(data) is None
    assert np.array_equal(quick, images.pixels(data, format, aspect, quick=True))


@pytest.mark.parametrize("size", [(640, 480), (427, 640), (500, 375), (333, 97), (90, 1344), (640, 638)])
def test_a_part_of_the_square_scales_as_the_whole_does(size: tuple[int, int]) -> None:
    width, height = size
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    side, colour = max(size), (122, 116, 104)
    square = np.full((side, side, 3), colour, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = noise
    picture = fast.Decoded(width, height, lambda target: np.copyto(target, noise))
    got = np.empty((336, 336, 3), np.uint8)
    fast.squared(picture, colour, got)
    planes = torch.from_numpy(square)[None].permute(0, 3, 1, 2)
    want = F.interpolate(planes, (336, 336), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    apart = np.abs(got.astype(int) - want)
    assert apart.max() <= 1
    assert (apart > 0).sum() < 50  # a weight may round the other way


def test_a_canvas_keeps_nothing_of_the_picture_before() -> None:
    white = jpeg(200, 200, quality=95)
    images.pixels(white, CLIP, "pad", quick=True)
    for size in ((200, 40), (40, 200)):
        quick = images.pixels(jpeg(*size), CLIP, "pad", quick=True).astype(int)
        assert np.abs(quick - images.pixels(jpeg(*size), CLIP, "pad")).max() <= 2


@turbo
def test_what_libjpeg_refuses_is_told_by_pillow(tmp_path: Path) -> None:
    data = jpeg(120, 80)
    for name, content, words in (
        ("cut.jpg", data[: len(data) // 2], "the picture is damaged"),
        ("head.jpg", data[:20], "not a picture|damaged"),
        ("empty.jpg", b"", "the file is empty"),
        ("none.jpg", None, "there is no such file"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=words):
            images.pixels(tmp_path / name, CLIP, "pad", quick=True)


@turbo
def test_a_giant_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MOST_PIXELS", 120 * 80 - 1)
    with pytest.raises(ImageError, match="120 x 80 pixels are more than"):
        images.pixels(jpeg(120, 80), CLIP, "pad", quick=True)


@pytest.mark.parametrize("quick", [False, True])
def test_a_spec_says_how_pictures_are_scaled(quick: bool, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(40, 30))
    write(tmp_path, "a.json", [record("<image>\nA?", "B.", image="a.jpg")] * 4)
    asked = spec(tmp_path, mix="a.json", quick_pictures=quick)
    place = {"micro_batch": 2, "accumulation": 1, "rank": 0, "world": 1, "seed": 0}
    loader = Loader(asked, tokenizer("llama_legacy"), FORMAT, PATCHES, **place)
    pixels = next(loader.steps())[0]["pixel_values"]
    loader.close()
    want = [images.pixels(tmp_path / "a.jpg", FORMAT, asked.aspect, quick=each) for each in (False, True)]
    assert not (want[0] == want[1]).all()
    assert (pixels[0].permute(1, 2, 0).numpy() == want[quick]).all()
