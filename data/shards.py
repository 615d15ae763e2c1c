"""Pictures scaled once and kept as bytes: a memory-mapped file that training copies from instead of decoding.

Optional: 338 KB a picture of 336 x 336, so 210 GB for the 665k mix. A picture whose file has changed since is
decoded again. A build that was stopped goes on where its entries end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.images import Aspect, ImageError, ImageFormat, pixels
from data.whole import locked, write_whole
from data.words import refused

AT_ONCE = 256
_MARKS = "entries.part"  # of a build: an entry for each picture that lies in pixels.u8
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
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, list[str]]:
    """Prepare pictures, each path once; how many, and what could not be read.

    All or nothing: it replaces what was there when it is whole. What a build that was stopped had prepared stays,
    and is taken when it is of this mix. `progress` is told the pictures done, and all. OSError when another process
    is at it.
    """
    place = folder(root, format, aspect)
    place.parent.mkdir(parents=True, exist_ok=True)
    todo = list({_key(path): path for path in paths}.items())
    with contextlib.ExitStack() as stack:
        try:
            alone = stack.enter_context(locked(place.with_name(f"{place.name}.lock"), wait=False))
        except BlockingIOError:
            raise OSError(
                f"{place}: another run is preparing these pictures; let it finish, or stop it"
            ) from None
        partial = place.with_name(f"{place.name}.part")
        if not alone:
            partial = place.with_name(f"{place.name}.{socket.gethostname()}.{os.getpid()}.part")
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
        else:
            for left in place.parent.glob(f"{place.name}.*.part"):  # of builds that had no lock
                shutil.rmtree(left, ignore_errors=True)
        known = _resumed(partial, format.size, {key for key, _ in todo})
        sound, broken = _prepare(root, todo, format, aspect, partial, known, workers, progress)
        entries = np.fromfile(partial / _MARKS, _ENTRY)
        # A picture whose file changed between two runs has two entries, of which the later one holds.
        _, first = np.unique(entries["key"][::-1], return_index=True)
        entries = entries[::-1][first]
        entries = entries[np.isin(entries["key"], np.array(sound, dtype="<u8"))]
        if not len(entries):
            shutil.rmtree(partial)
            return 0, broken
        np.save(partial / "entries.npy", entries)
        write_whole(partial / "meta.json", json.dumps({"size": format.size}))
        shutil.rmtree(place, ignore_errors=True)
        os.rename(partial, place)
        (place / _MARKS).unlink()
    return len(entries), broken


def _resumed(partial: Path, size: int, wanted: set[int]) -> np.ndarray:
    """The entries of a build that was stopped, its files cut to them; none if it was of other pictures."""
    partial.mkdir(exist_ok=True)
    marks, raw = partial / _MARKS, partial / "pixels.u8"
    for file in (marks, raw):
        file.touch()
    whole = min(marks.stat().st_size // _ENTRY.itemsize, raw.stat().st_size // (size * size * 3))
    entries = np.fromfile(marks, _ENTRY, whole)
    if not wanted.issuperset(entries["key"].tolist()):
        entries = entries[:0]
    os.truncate(marks, len(entries) * _ENTRY.itemsize)
    os.truncate(raw, len(entries) * size * size * 3)
    return entries[np.argsort(entries["key"], kind="stable")]


def _prepare(
    root: Path,
    todo: list[tuple[int, str]],
    format: ImageFormat,
    aspect: Aspect,
    partial: Path,
    known: np.ndarray,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[int], list[str]]:
    """Append to a build's files what is not among its known entries, sorted by key; the keys of all pictures that
    are there, and what could not be read.
    """
    sound: list[int] = []
    broken: list[str] = []

    def prepared(job: tuple[int, str]) -> tuple[np.ndarray | None, tuple[int, int, int], str]:
        key, path = job
        try:
            facts = os.stat(root / path)
            entry = (key, facts.st_size, facts.st_mtime_ns)
            at = int(known["key"].searchsorted(np.uint64(key), "right")) - 1
            if at >= 0 and known[at].item()[:3] == entry:
                return None, entry, ""
            return pixels(root / path, format, aspect), entry, ""
        except ImageError as error:
            return None, (key, 0, 0), str(error)
        except OSError as error:
            return None, (key, 0, 0), refused(error)

    with (
        ThreadPoolExecutor(workers) as pool,
        (partial / "pixels.u8").open("ab") as raw,
        (partial / _MARKS).open("ab") as marks,
    ):
        slot = len(known)
        for first in range(0, len(todo), AT_ONCE):
            made: list[tuple[int, int, int, int]] = []
            for picture, entry, why in pool.map(prepared, todo[first : first + AT_ONCE]):
                if picture is not None:
                    raw.write(picture.data)
                    made.append((*entry, slot + len(made)))
                if why:
                    broken.append(why)
                else:
                    sound.append(entry[0])
            if made:
                raw.flush()
                os.fdatasync(raw.fileno())  # an entry says that its picture is there, whatever happens
                marks.write(np.array(made, dtype=_ENTRY).tobytes())
                marks.flush()
            slot += len(made)
            if progress:
                progress(min(first + AT_ONCE, len(todo)), len(todo))
    return sound, broken


def _key(path: str) -> int:
    digest = hashlib.blake2b(path.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
