"""Pictures equal the reference's tensors; odd ones become pictures, broken ones an error in words."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data import images
from data.images import ImageError, ImageFormat, load

from .support import GOLDENS

RECORDED = json.loads((GOLDENS / "images.json").read_text())
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FORMATS = {
    "clip336": ImageFormat(336, *CLIP, "crop"),
    "clip224": ImageFormat(224, *CLIP, "crop"),
    "siglip384": ImageFormat(384, *HALF, "squash"),
}
CASES = [
    pytest.param(name, key, facts, id=f"{name}-{key}")
    for name, image in RECORDED["images"].items()
    for key, facts in image["results"].items()
]


@pytest.mark.parametrize(("name", "key", "facts"), CASES)
def test_tensors_equal_the_reference(name: str, key: str, facts: dict[str, Any]) -> None:
    processor, aspect = key.split("/")
    got = load(GOLDENS / "images" / name, FORMATS[processor], aspect)  # type: ignore[arg-type]
    assert list(got.shape) == facts["shape"]
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert got.mean(dim=(1, 2)).tolist() == pytest.approx(facts["mean"], abs=1e-5)
    assert (got.min().item(), got.max().item()) == pytest.approx((facts["min"], facts["max"]), abs=1e-5)
    grid = torch.tensor(facts["grid"])
    places = (2 * torch.arange(grid.shape[1]) + 1) * got.shape[1] // (2 * grid.shape[1])
    assert torch.allclose(got[:, places][:, :, places], grid, rtol=0, atol=6e-5)  # recorded to 4 decimals
    total = got.double().sum().item()
    assert total == pytest.approx(facts["sum"], abs=1e-5 * got.numel())


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (200, 3), (3, 200), (1, 4000), (2, 31), (33, 2)])
def test_tiny_and_thin_pictures_are_pictures(size: tuple[int, int], aspect: Any, format: ImageFormat) -> None:
    got = load(encoded(Image.new("RGB", size, (200, 100, 50))), format, aspect)
    assert got.shape == (3, format.size, format.size)
    middle = got[:, format.size // 2, format.size // 2]
    if aspect == "square" or min(size) > 1 or size == (1, 1):
        want = (torch.tensor((200, 100, 50)) / 255 - torch.tensor(format.mean)) / torch.tensor(format.std)
        assert torch.allclose(middle, want, atol=0.9 if aspect == "pad" else 1e-5)


def test_a_banner_is_scaled_as_a_whole() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 320, 3), np.uint8)
    for picture in (Image.fromarray(noise), Image.fromarray(noise.transpose(1, 0, 2))):
        wide = picture.width > picture.height
        new = (224 * 64, 224) if wide else (224, 224 * 64)
        middle = [slice(None), slice(None)]
        middle[wide] = slice((224 * 64 - 224) // 2, (224 * 64 + 224) // 2)
        want = np.asarray(picture.resize(new, Image.Resampling.BICUBIC))[tuple(middle)]
        got = images.pixels(encoded(picture), FORMATS["clip224"], "square")
        assert (got == want).all()


def test_only_the_kept_part_of_a_long_picture_is_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.meshgrid(np.linspace(0, 20, 380), np.linspace(0, 2, 24))
    waves = np.stack([np.sin(x + k + y) * 120 + 128 for k in range(3)], -1).astype(np.uint8)
    for picture in (waves, waves.transpose(1, 0, 2)):
        data = encoded(Image.fromarray(picture))
        whole = load(data, FORMATS["clip224"], "square")
        monkeypatch.setattr(images, "LONGEST", 8)
        part = load(data, FORMATS["clip224"], "square")
        monkeypatch.undo()
        level = 1 / 255 / 0.26
        assert (whole - part).abs().max() <= 2.02 * level
        assert (whole == part).float().mean() > 0.8


def colour(data: bytes, format: ImageFormat = FORMATS["siglip384"]) -> list[int]:
    return [round(v) for v in ((load(data, format, "pad")[:, 100, 100] * 0.5 + 0.5) * 255).tolist()]


def test_transparency_is_dropped_not_blended() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert colour(encoded(palette, transparency=1)) == [10, 200, 30]
    assert colour(encoded(palette, transparency=bytes([255, 0]))) == [10, 200, 30]
    assert colour(encoded(Image.new("RGBA", (8, 8), (9, 8, 7, 0)))) == [9, 8, 7]
    assert colour(encoded(Image.new("LA", (8, 8), (50, 0)))) == [50, 50, 50]


def test_sixteen_bits_are_scaled_not_saturated() -> None:
    grey = Image.fromarray(np.full((8, 8), 32896, dtype=np.uint16))
    assert grey.mode == "I;16"
    assert colour(encoded(grey)) == [128, 128, 128]
    assert colour(encoded(grey.convert("I"), "TIFF")) == [128, 128, 128]
    assert colour(encoded(Image.new("I", (8, 8), 77), "TIFF")) == [77, 77, 77]
    assert colour(encoded(Image.new("F", (8, 8), 300.0), "TIFF")) == [255, 255, 255]
    assert colour(encoded(Image.new("1", (8, 8), 1))) == [255, 255, 255]


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_the_fast_path_is_at_most_two_grey_levels_away(aspect: Any, format: ImageFormat) -> None:
    for path in sorted((GOLDENS / "images").iterdir()):
        exact, fast = (images.pixels(path, format, aspect, quick=fast).astype(int) for fast in (False, True))
        assert exact.shape == fast.shape
        assert np.abs(exact - fast).max() <= 2
        assert ((exact - fast) ** 2).mean() < 255**2 / 10**6.9  # 69 dB
        assert (exact != fast).mean() < 0.01
        loaded = load(path, format, aspect, quick=True)
        assert (loaded - load(path, format, aspect)).abs().max() < 2.01 / 255 / min(format.std)
    thin = encoded(Image.new("RGB", (1, 90), (9, 99, 199)))
    assert load(thin, format, aspect, quick=True).shape == (3, format.size, format.size)


def test_a_given_array_is_filled() -> None:
    out = np.empty((2, 224, 224, 3), np.uint8)
    path = GOLDENS / "images" / "gray_L_64x50.png"
    for quick in (False, True):
        assert images.pixels(path, FORMATS["clip224"], "pad", quick=quick, out=out[1]) is not None
        assert (out[1] == images.pixels(path, FORMATS["clip224"], "pad", quick=quick)).all()


def test_rotation_by_exif_is_not_applied() -> None:
    picture = Image.fromarray(
        np.repeat(np.array([[[255, 0, 0]] * 8, [[0, 0, 255]] * 8], np.uint8), 4, axis=0)
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = encoded(picture), encoded(picture, exif=exif)
    assert torch.equal(load(plain, FORMATS["clip224"], "pad"), load(turned, FORMATS["clip224"], "pad"))


def test_an_animation_gives_its_first_frame_and_cmyk_its_colours() -> None:
    frames = [Image.new("P", (8, 8), 0), Image.new("P", (8, 8), 1)]
    for frame in frames:
        frame.putpalette([255, 0, 0, 0, 255, 0])
    assert colour(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == [255, 0, 0]
    assert colour(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")) == [255, 0, 0]


def test_broken_files_are_told_apart(tmp_path: Path) -> None:
    def error(path: Path | bytes) -> str:
        with pytest.raises(ImageError) as caught:
            load(path, FORMATS["clip224"], "pad")
        return str(caught.value)

    assert error(tmp_path / "none.jpg") == f"{tmp_path}/none.jpg: there is no such file"
    (tmp_path / "empty.jpg").touch()
    assert error(tmp_path / "empty.jpg").endswith("empty.jpg: the file is empty")
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    assert error(tmp_path / "page.jpg").endswith("page.jpg: not a picture that Pillow can read")
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "JPEG")
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    assert "half.jpg: the picture is damaged: " in error(tmp_path / "half.jpg")
    assert error(tmp_path).endswith(": this is a folder, not a picture")
    assert error(b"") == "picture: the file is empty"


def test_a_giant_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MOST_PIXELS", 99)
    with pytest.raises(ImageError, match="10 x 10 pixels are more than 99; scale it down first"):
        load(encoded(Image.new("L", (10, 10))), FORMATS["clip224"], "pad")
