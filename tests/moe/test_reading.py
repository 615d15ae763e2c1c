"""Ranges of files into tensors: straight, through a buffer, across pieces; and each piece checked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe import digests, storage
from moe.fragments import FROZEN, Fragment
from moe.pieces import PIECES, Index, layout, runs
from moe.reading import fill
from moe.storage import Damaged

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)


def written(folder: Path, tensors: list[Tensor]) -> Index:
    """Tensors a, b, ... in one file."""
    pieces = [Fragment(chr(97 + i), FROZEN, (len(t),), 0, t) for i, t in enumerate(tensors)]
    with storage.Writer() as writer:
        facts, parts = writer.write(folder / "f.bin", runs(pieces))
        text = json.dumps(layout(pieces, "f.bin") | {PIECES: {"f.bin": parts}}).encode()
        index, _ = writer.write(folder / "index_00000.json", [memoryview(text)])
    return Index.read(folder, {"world": 1, "files": {"f.bin": facts, "index_00000.json": index}})


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_ranges_come_back_whatever_the_pieces(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    draw = data.draw
    with pytest.MonkeyPatch.context() as patch:
        piece = draw(st.sampled_from([8, 64, 1024]))
        patch.setattr(digests, "PIECE", piece)
        patch.setattr(digests, "BATCH", piece * draw(st.integers(1, 3)))
        patch.setattr(digests, "STRIDE", draw(st.sampled_from([5, 32, 4096])))
        kinds = sorted(
            draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=5)), key=lambda d: -d.itemsize
        )
        tensors = [torch.randint(0, 100, (draw(st.integers(1, 300)),)).to(kind) for kind in kinds]
        folder = tmp_path_factory.mktemp("f")
        index = written(folder, tensors)
        assert digests.check(folder / "f.bin", index.files["f.bin"]["digest"], index.files["f.bin"]["size"])
        wanted, right = [], []
        for place, tensor in enumerate(tensors):
            start = draw(st.integers(0, len(tensor) - 1))
            stop = draw(st.integers(start + 1, len(tensor)))
            into = draw(st.sampled_from([tensor.dtype, torch.float32]))
            target = torch.zeros(stop - start, dtype=into)
            wanted.append(Fragment(chr(97 + place), FROZEN, (len(tensor),), start, target))
            right.append(tensor[start:stop].to(into))
        fill(wanted, index, strict=True)
        for piece_, want in zip(wanted, right, strict=True):
            assert torch.equal(piece_.tensor, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [slice(0, 3_000_000), slice(1_000_000, 1_200_000)])
def test_a_flipped_bit_is_found_where_it_is_read_and_nowhere_else(
    tmp_path: Path, dtype: torch.dtype, part: slice
) -> None:
    index = written(tmp_path, [torch.arange(3_000_000, dtype=torch.float32)])
    raw = np.memmap(tmp_path / "f.bin", mode="r+")
    raw[4 * 1_100_000] ^= 1
    raw.flush()
    target = torch.zeros(part.stop - part.start, dtype=dtype)
    with pytest.raises(Damaged, match=r"the contents of f\.bin are not what was written"):
        fill([Fragment("a", FROZEN, (3_000_000,), part.start, target)], index, strict=True)
    assert digests.check(tmp_path / "f.bin", index.files["f.bin"]["digest"], 12_000_000) is False
    elsewhere = torch.zeros(100_000, dtype=dtype)  # in the next piece
    fill([Fragment("a", FROZEN, (3_000_000,), 2_200_000, elsewhere)], index, strict=True)
    assert torch.equal(elsewhere, torch.arange(2_200_000, 2_300_000, dtype=torch.float32).to(dtype))


@pytest.mark.parametrize("piece", [1 << 20, 3 << 20])
def test_pieces_of_another_length_are_read_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(digests, "PIECE", piece)
        index = written(tmp_path, [torch.arange(3_000_000, dtype=torch.float32)])
    said = index.files["f.bin"]["digest"]
    assert f"/{piece}:" in said
    assert digests.check(tmp_path / "f.bin", said, 12_000_000)
    target = torch.zeros(3_000_000)
    fill([Fragment("a", FROZEN, (3_000_000,), 0, target)], index, strict=True)
    assert torch.equal(target, torch.arange(3_000_000, dtype=torch.float32))
    raw = np.memmap(tmp_path / "f.bin", mode="r+")
    raw[-1] ^= 1
    raw.flush()
    assert digests.check(tmp_path / "f.bin", said, 12_000_000) is False
    with pytest.raises(Damaged, match="not what was written"):
        fill([Fragment("a", FROZEN, (3_000_000,), 0, target)], index, strict=True)


def test_the_standard_librarys_digest_serves_where_xxhash_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "xxhash", None)
    index = written(tmp_path, [torch.arange(1000)])
    said = index.files["f.bin"]["digest"]
    assert said.startswith(f"blake2b/{digests.PIECE}:")
    assert digests.check(tmp_path / "f.bin", said, 8000)
    target = torch.zeros(1000, dtype=torch.int64)
    fill([Fragment("a", FROZEN, (1000,), 0, target)], index, strict=True)
    assert torch.equal(target, torch.arange(1000))
    assert digests.check(tmp_path / "f.bin", said.replace("blake2b", "xxh3_128"), 8000) is None
    (tmp_path / "f.bin").write_bytes((tmp_path / "f.bin").read_bytes()[:-1])
    with pytest.raises(Damaged, match="ends at byte 7999"):
        fill([Fragment("a", FROZEN, (1000,), 0, target)], index, strict=True)
