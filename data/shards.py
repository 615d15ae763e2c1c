"""Pictures scaled once and kept as bytes: a memory-mapped file that training copies from instead of decoding.

Optional: 338 KB a picture of 336 x 336, so 210 GB for the 665k mix. A picture whose file has changed since is
decoded again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from data.images import Aspect, ImageError, ImageFormat, pixels
from data.words import refused

AT_ONCE = 256
_ENTRY = np.dtype([("key", "<u8"), ("bytes", "<i8"), ("time", "<i8"), ("slot", "<i8")])


def folder(root: Path, format: ImageFormat, aspect: Aspect) -> Path:
    """Where the pictures of a root lie for a format."""
    facts = [format.size, format.resize, aspect, format.background if aspect == "pad" else 0, "HWC"]
    words = json.dumps(facts)
    return root / ".index" / f"pixels-{format.size}-{aspect}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


class Shard:
    """Prepared pictures, by their paths under the root."""

    def __init__(self, place: Path, root: Path) -> None:
        self._folder = str(root)
        size = json.loads((place / "meta.json").read_text())["size"]
        entries = np.asarray(np.load(place / "entries.npy", mmap_mode="r"))
        self._keys, self._bytes, self._times, self._slots = (entries[name] for name in _ENTRY.names or ())
        self._pixels = np.asarray(np.memmap(place / "pixels.u8", np.uint8, "r")).reshape(-1, size, size, 3)

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, path: str) -> np.ndarray | None:
        """A picture, uint8 [size, size, 3]; None when it is not there, or its file is another one by now."""
        key = _key(path)
        at = int(self._keys.searchsorted(np.uint64(key)))
        if at == len(self._keys) or self._keys[at] != key:
            return None
        try:
            facts = os.stat(f"{self._folder}/{path}")
        except OSError:
            return None
        if facts.st_size != self._bytes[at] or facts.st_mtime_ns != self._times[at]:
            return None
        picture: np.ndarray = self._pixels[self._slots[at]]
        return picture


def open_shard(root: Path, format: ImageFormat, aspect: Aspect) -> Shard | None:
    """The prepared pictures of a root, if there are any."""
    place = folder(root, format, aspect)
    return Shard(place, root) if (place / "meta.json").is_file() else None


def build(
    root: Path,
    paths: Iterable[str],
    format: ImageFormat,
    aspect: Aspect,
    workers: int = 4,
    progress: Callable[[int], None] | None = None,
) -> tuple[int, list[str]]:
    """Prepare pictures, each path once; how many, and what could not be read.

    All or nothing: it replaces what was there when it is whole.
    """
    place = folder(root, format, aspect)
    partial = place.with_name(f"{place.name}.{os.getpid()}.part")
    partial.mkdir(parents=True)
    entries: list[tuple[int, int, int, int]] = []
    broken: list[str] = []

    def prepared(path: str) -> tuple[str, np.ndarray | None, os.stat_result | None, str]:
        try:
            facts = os.stat(root / path)
            return path, pixels(root / path, format, aspect), facts, ""
        except ImageError as error:
            return path, None, None, str(error)
        except OSError as error:
            return path, None, None, refused(error)

    try:
        with ThreadPoolExecutor(workers) as pool, (partial / "pixels.u8").open("wb") as file:
            todo = _once(paths)
            while some := list(islice(todo, AT_ONCE)):
                for path, raw, facts, why in pool.map(prepared, some):
                    if raw is None or facts is None:
                        broken.append(why)
                        continue
                    file.write(raw.data)
                    entries.append((_key(path), facts.st_size, facts.st_mtime_ns, len(entries)))
                if progress:
                    progress(len(entries))
        if not entries:
            return 0, broken
        np.save(partial / "entries.npy", np.sort(np.array(entries, dtype=_ENTRY), order="key"))
        (partial / "meta.json").write_text(json.dumps({"size": format.size}))
        shutil.rmtree(place, ignore_errors=True)
        os.rename(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(entries), broken


def _once(paths: Iterable[str]) -> Iterator[str]:
    seen: set[int] = set()
    for path in paths:
        key = _key(path)
        if key not in seen:
            seen.add(key)
            yield path


def _key(path: str) -> int:
    digest = hashlib.blake2b(path.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
