"""Prepared pictures are the decoded ones, byte for byte, for as long as their files stay."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from data.images import pixels
from data.prepare import main
from data.shards import build, folder, open_shard

from .places import FORMAT, mixed, picture
from .test_loader import loader, spec


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
