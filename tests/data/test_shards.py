"""Prepared pictures are the decoded ones, byte for byte, for as long as their files stay."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import shards
from data.images import pixels
from data.prepare import main
from data.shards import build, folder, open_shard
from data.whole import locked

from .places import FORMAT, mixed, picture, record, write
from .test_loader import loader, spec
from .test_prepare import DOOR


def test_prepared_pictures_are_the_decoded_ones(tmp_path: Path) -> None:
    paths = [picture(tmp_path, at) for at in range(30)]
    assert open_shard(tmp_path, FORMAT, "pad") is None
    made, broken = build(tmp_path, [*paths, *paths, "pictures/none.png"], FORMAT, "pad", workers=2)
    assert made == 30
    assert broken == [f"{tmp_path}/pictures/none.png: there is no such file or folder"]
    shard = open_shard(tmp_path, FORMAT, "pad")
    assert shard is not None
    assert len(shard) == 30
    for path in paths:
        want = pixels(tmp_path / path, FORMAT, "pad")
        assert np.array_equal(shard.get(path), want)  # type: ignore[arg-type]
    assert shard.get("pictures/other.png") is None
    os.utime(tmp_path / paths[3], (1, 1))
    assert shard.get(paths[3]) is None
    (tmp_path / paths[4]).unlink()
    assert shard.get(paths[4]) is None
    assert open_shard(tmp_path, FORMAT, "square") is None
    assert build(tmp_path, [], FORMAT, "square") == (0, [])
    assert not folder(tmp_path, FORMAT, "square").exists()


def test_training_takes_prepared_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed(tmp_path, 12)
    before = [batch for step in itertools.islice(loader(spec(tmp_path)).steps(), 4) for batch in step]
    assert (
        build(tmp_path, [f"pictures/{at:05d}.png" for at in range(12) if at % 3 != 2], FORMAT, "pad")[0] == 8
    )
    monkeypatch.setattr("data.loader.pixels", None)  # nothing is decoded any more
    after = [batch for step in itertools.islice(loader(spec(tmp_path)).steps(), 4) for batch in step]
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def whole(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder(root, FORMAT, "pad").iterdir()}


def rest(root: Path) -> list[str]:
    return sorted(path.name.rpartition(".")[2] for path in (root / ".index").iterdir())


def stopped_after(root: Path, paths: list[str], batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that is stopped, with two pictures a batch."""
    monkeypatch.setattr(shards, "AT_ONCE", 2)

    def stop(done: int, size: int) -> None:
        if done == 2 * batches:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(root, paths, FORMAT, "pad", progress=stop)
    assert open_shard(root, FORMAT, "pad") is None


def test_a_build_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [picture(tmp_path, at) for at in range(11)]
    build(tmp_path, paths, FORMAT, "pad")
    want = whole(tmp_path)
    shutil.rmtree(tmp_path / ".index")
    stopped_after(tmp_path, paths, 3, monkeypatch)
    (part,) = (tmp_path / ".index").glob("*.part")
    with (part / "pixels.u8").open("ab") as file:  # killed in the midst of a batch
        file.write(b"half of a picture")
    with (part / "entries.part").open("ab") as file:
        file.write(b"half")
    decoded: list[Path] = []

    def counted(path: Path, *rest: Any) -> np.ndarray:
        decoded.append(path)
        return pixels(path, *rest)

    monkeypatch.setattr(shards, "pixels", counted)
    assert build(tmp_path, paths, FORMAT, "pad") == (11, [])
    assert sorted(decoded) == [tmp_path / path for path in paths[6:]]
    assert whole(tmp_path) == want
    assert rest(tmp_path) == ["lock", folder(tmp_path, FORMAT, "pad").name]


def test_what_changed_since_a_build_was_stopped_is_prepared_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [picture(tmp_path, at) for at in range(8)]
    stopped_after(tmp_path, paths, 3, monkeypatch)
    shutil.copy(tmp_path / paths[7], tmp_path / paths[1])
    (tmp_path / paths[2]).unlink()
    made, broken = build(tmp_path, paths, FORMAT, "pad")
    assert (made, len(broken)) == (7, 1)
    shard = open_shard(tmp_path, FORMAT, "pad")
    assert shard is not None
    assert len(shard) == 7
    for path in [*paths[:2], *paths[3:]]:
        assert np.array_equal(shard.get(path), pixels(tmp_path / path, FORMAT, "pad"))  # type: ignore[arg-type]


def test_a_build_of_another_mix_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [picture(tmp_path, at) for at in range(8)]
    stopped_after(tmp_path, paths, 3, monkeypatch)
    place = folder(tmp_path, FORMAT, "pad")
    (place.parent / f"{place.name}.4711.part").mkdir()  # what a run without a lock left
    assert build(tmp_path, paths[:5], FORMAT, "pad") == (5, [])
    assert len(whole(tmp_path)["pixels.u8"]) == 5 * FORMAT.size**2 * 3
    assert rest(tmp_path) == ["lock", place.name]


def test_two_builds_do_not_meet(tmp_path: Path) -> None:
    paths = [picture(tmp_path, at) for at in range(3)]
    place = folder(tmp_path, FORMAT, "pad")
    place.parent.mkdir()
    with (
        locked(place.with_name(f"{place.name}.lock")),
        pytest.raises(OSError, match="another run is preparing these pictures; let it finish, or stop it"),
    ):
        build(tmp_path, paths, FORMAT, "pad")
    assert build(tmp_path, paths, FORMAT, "pad") == (3, [])


def test_a_killed_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for at in range(600):
        Image.new("RGB", (300, 200), (at % 256, at // 256, 7)).save(tmp_path / "pictures" / f"{at}.jpg")
    write(tmp_path, "a.json", [record("<image>\nA?", "b", image=f"pictures/{at}.jpg") for at in range(600)])
    arguments = ["pixels", "--root", str(tmp_path), "a.json", "--format", "clip-224", "--workers", "1"]
    started = subprocess.Popen([sys.executable, str(DOOR), *arguments], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while (
        not any(f.stat().st_size for f in tmp_path.glob(".index/*.part/entries.part"))
        and time.monotonic() < end
    ):
        time.sleep(0.005)
    started.kill()
    started.communicate(timeout=60)
    (part,) = tmp_path.glob(".index/*.part")
    done = (part / "entries.part").stat().st_size // 32
    assert 0 < done < 600
    assert not list(tmp_path.glob(".index/*/meta.json"))
    assert main(arguments) == 0
    assert "600 pictures in " in capsys.readouterr().out
    (place,) = tmp_path.glob(".index/pixels-224-*/")
    assert (place / "pixels.u8").stat().st_size == 600 * 224 * 224 * 3


def test_the_command_prepares_a_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed(tmp_path, 6)
    arguments = ["pixels", "--root", str(tmp_path), "mixed.json", "--format", "clip-224"]
    assert main(arguments) == 0
    assert "4 pictures in " in capsys.readouterr().out
    (tmp_path / "pictures" / "00000.png").write_bytes(b"")
    assert main(arguments) == 1
    told = capsys.readouterr().out
    assert "3 pictures in " in told
    assert "00000.png: the file is empty" in told
