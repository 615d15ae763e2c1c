"""The data paths that are measured beside one another: each makes the batch of some records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data import fast
from data.buffers import Buffers
from data.collate import collate
from data.images import ImageFormat, pixels
from data.index import Index, open_index
from data.shards import build, open_shard
from tests.bench import data_corpus
from tests.bench.data_reference import Reference, Tensors, collated

FORMAT = ImageFormat(336, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "crop")
Path_ = Callable[[list[int]], Any]


def decoded(index: Index, root: Path, pad: int, quick: bool) -> Path_:
    """As the loader does it: tokens from the index, pictures decoded straight into the batch, as bytes."""
    buffers = Buffers((FORMAT.size, FORMAT.size, 3))

    def batch(numbers: list[int]) -> dict[str, torch.Tensor]:
        rows = [index.row(number) for number in numbers]
        paths = [path for row in rows for path in row.images]
        raw = buffers.take(len(paths))
        for path, out in zip(paths, raw, strict=True):
            pixels(root / path, FORMAT, "pad", quick=quick, out=out)
        return collate(rows, torch.from_numpy(raw).permute(0, 3, 1, 2), pad)

    return batch


def prepared(index: Index, root: Path, pad: int) -> Path_:
    """Tokens from the index, pictures copied from the shard."""
    shard, buffers = open_shard(root, FORMAT, "pad"), Buffers((FORMAT.size, FORMAT.size, 3))
    assert shard is not None

    def batch(numbers: list[int]) -> dict[str, torch.Tensor]:
        rows = [index.row(number) for number in numbers]
        paths = [path for row in rows for path in row.images]
        raw = buffers.take(len(paths))
        for path, out in zip(paths, raw, strict=True):
            np.copyto(out, shard.get(path))  # type: ignore[arg-type]
        return collate(rows, torch.from_numpy(raw).permute(0, 3, 1, 2), pad)

    return batch


def limits(index: Index, root: Path) -> dict[str, Path_]:
    """What decoding and copying cost by themselves."""
    shard = open_shard(root, FORMAT, "pad")
    assert shard is not None
    target = np.empty((64, FORMAT.size, FORMAT.size, 3), np.uint8)

    def pillow(numbers: list[int]) -> None:
        for number in numbers:
            for path in index.row(number).images:
                Image.open(root / path).load()

    def turbo(numbers: list[int]) -> None:
        for number in numbers:
            for path in index.row(number).images:
                picture = fast.jpeg((root / path).read_bytes())
                assert picture is not None
                picture.into(fast._canvas("limit", picture.height, picture.width))

    def copy(numbers: list[int]) -> None:
        for at, number in enumerate(numbers):
            for _ in index.columns["images"][number : number + 1].nonzero()[0]:
                np.copyto(target[at], shard._pixels[number % len(shard)])

    found = {"limit: Pillow decodes": pillow, "limit: copying": copy}
    return {"limit: libjpeg-turbo decodes": turbo, **found} if fast.simplejpeg else found


def contenders(root: Path, count: int, tokenizer: Any) -> dict[str, Path_]:
    """All that run in this process, over the same records."""
    from transformers import CLIPImageProcessorPil

    annotation = root / "mix.json"
    data_corpus.records(annotation, count)
    data_corpus.pictures(root)
    index = open_index(annotation, tokenizer, "phi")
    build(root, [path for number in range(count) for path in index.row(number).images], FORMAT, "pad", 1)
    pad = tokenizer.pad_token_id
    pil = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})

    def reference(processor: Any) -> Path_:
        data = Reference(annotation, root, tokenizer, FORMAT, processor)
        return lambda numbers: collated([data[number] for number in numbers], pad)

    return {
        "reference, fast tokenizer": reference(None),
        "transformers 5, Pillow": reference(pil),
        "transformers 5, tensors": reference(Tensors(FORMAT)),
        "ours, exact": decoded(index, root, pad, quick=False),
        "ours, quick": decoded(index, root, pad, quick=True),
        "ours, prepared": prepared(index, root, pad),
        **limits(index, root),
    }
