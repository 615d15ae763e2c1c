"""A large corpus from a small one: the file that repeats its records, and the index that a build of it would give.

Tokenising a million records takes ten minutes; this takes seconds. `data_start.py` first shows on a small corpus
that the index is the built one, byte for byte.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from data.index import digest, fingerprint
from data.indexing import COLUMNS

OPENING, BETWEEN, CLOSING = b"[\n", b",\n", b"\n]\n"  # of data_corpus.records
AT = {"token_at": "tokens", "span_at": "spans"}  # a first place, and what counts them


def tiled(small: Path, root: Path, times: int, tokenizer: Any, template: str) -> None:
    """`root` with `small`'s records so many times over, in mix.json and its index."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "pictures").symlink_to(small / "pictures")
    text = (small / "mix.json").read_bytes()
    body = text.removeprefix(OPENING).removesuffix(CLOSING)
    with (root / "mix.json").open("wb") as file:
        file.write(OPENING)
        for turn in range(times):
            file.write(BETWEEN * (turn > 0) + body)
        file.write(CLOSING)
    built = next((small / ".index").glob("mix-*/meta.json")).parent
    meta = json.loads((built / "meta.json").read_text())
    content = digest(root / "mix.json")
    place = root / ".index" / f"mix-{content[:16]}-{fingerprint(tokenizer, template)[:16]}"
    place.mkdir()
    counted = {name: int(np.fromfile(built / f"{of}.col", COLUMNS[of]).sum()) for name, of in AT.items()}
    steps = {**counted, "path_at": (built / "paths.bin").stat().st_size}
    steps["start"] = steps["end"] = len(body) + len(BETWEEN)
    for name, kind in COLUMNS.items():
        column = np.fromfile(built / f"{name}.col", kind)
        with (place / f"{name}.col").open("wb") as file:
            for turn in range(times):
                file.write((column + turn * steps.get(name, 0)).astype(kind).tobytes())
    for name in ("tokens.bin", "spans.bin", "paths.bin"):
        data = (built / name).read_bytes()
        with (place / name).open("wb") as file:
            for _ in range(times):
                file.write(data)
    assert not (built / "faults.jsonl").read_bytes()
    shutil.copy(built / "faults.jsonl", place)
    meta |= {"sha256": content, "records": meta["records"] * times, "tokens": meta["tokens"] * times}
    (place / "meta.json").write_text(json.dumps(meta, indent=1))


def proven(folder: Path, tokenizer: Any, template: str) -> None:
    """Show that a tiled index is the built one."""
    from data.index import open_index
    from tests.bench import data_corpus

    small, large = folder / "small", folder / "large"
    data_corpus.pictures(small, tiny=True)
    data_corpus.records(small / "mix.json", 50)
    open_index(small / "mix.json", tokenizer, template)
    tiled(small, large, 3, tokenizer, template)
    place = next((large / ".index").glob("mix-*/meta.json")).parent
    found = {path.name: path.read_bytes() for path in place.iterdir()}
    shutil.rmtree(place)
    open_index(large / "mix.json", tokenizer, template)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == found
