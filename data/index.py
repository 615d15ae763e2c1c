"""The training index: an annotation file tokenised once for a tokenizer and a template, memory-mapped.

It is keyed by content, so all ranks, workers and runs share it, and a changed file gets a new one. A build
that was killed goes on from its last mark; an index is there only when its `meta.json` is, written last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.conversation import IGNORED, IMAGE_ID
from data.indexing import COLUMNS, FORMAT, Builder, faults_of, pictures, words
from data.offsets import backend_of
from data.whole import locked, write_whole
from data.words import refused

__all__ = ["Fault", "Index", "Row", "faults_of", "open_index", "pictures", "words"]


class Fault(NamedTuple):
    """A record that cannot be trained on."""

    record: int
    id: str
    why: str


class Row(NamedTuple):
    """One record of an index; `ends` are the tokens after which an answer is complete."""

    input_ids: np.ndarray  # int64, -200 an image
    labels: np.ndarray  # int64
    ends: list[int]
    images: list[str]


class Index:
    """An open index. `columns` are memory-mapped arrays, one value a record."""

    def __init__(self, folder: Path, annotation: Path) -> None:
        self.folder, self.annotation = folder, annotation
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        self.columns = {name: _map(folder / f"{name}.col", np.dtype(kind)) for name, kind in COLUMNS.items()}
        self._tokens = _map(folder / "tokens.bin", np.dtype(self.meta["token_type"]))
        self._spans = _map(folder / "spans.bin", np.dtype("<i4"))
        self._paths = _map(folder / "paths.bin", np.dtype("u1"))
        wanted = ("token_at", "tokens", "span_at", "spans", "images", "head_images")
        self._facts = [self.columns[name].item for name in wanted]
        self._image = 0xFFFF if self._tokens.dtype == np.uint16 else IMAGE_ID

    def __len__(self) -> int:
        return len(self.columns["tokens"])

    def row(self, record: int) -> Row:
        """The tokens, labels and picture paths of a record."""
        first, count, at, spans, shown, before = [fact(record) for fact in self._facts]
        raw = self._tokens[first : first + count]
        ids = raw.astype(np.int64)
        pairs = self._spans[2 * at : 2 * (at + spans)].tolist()
        starts, ends = pairs[::2], pairs[1::2]
        labels = np.empty(count, np.int64)
        labels.fill(IGNORED)  # np.full takes twice as long
        for start, end in zip(starts, ends, strict=True):
            labels[start:end] = ids[start:end]
        images: list[str] = []
        if shown > 0:
            places = raw == self._image
            ids[places] = IMAGE_ID
            if shown > before:  # one stands in what is learnt
                labels[places] = IGNORED
            paths = self.columns["path_at"]
            stop = paths.item(record + 1) if record + 1 < len(paths) else len(self._paths)
            joined = self._paths[paths.item(record) : stop].tobytes()
            images = joined.decode("utf-8", "surrogatepass").split("\0")[:-1]
        return Row(ids, labels, ends, images)

    def faults(self) -> Iterator[Fault]:
        """The records that cannot be trained on, and why."""
        with (self.folder / "faults.jsonl").open(encoding="utf-8") as file:
            for line in file:
                yield Fault(*json.loads(line))


def open_index(
    annotation: Path,
    tokenizer: Any,
    template: str,
    progress: Callable[[int, int], None] | None = None,
    key: str = "",
) -> Index:
    """The index of an annotation file; when there is none one process builds it and others wait.

    `progress` is told the bytes read and the file's; `key` is the `fingerprint`, when it is known. Raises
    RecordError when the file is not JSON, OSError when there is nowhere to write.
    """
    content = digest(annotation)
    name = f"{annotation.stem}-{content[:16]}-{(key or fingerprint(tokenizer, template))[:16]}"
    homes = cache_folders(annotation)
    for home in homes:
        if (home / name / "meta.json").is_file():
            return Index(home / name, annotation)
    writable = [home for home in homes if _writable(home)]
    if not writable:
        raise OSError(f"{annotation}: no place to write its index; set XDG_CACHE_HOME to a shared folder")
    home = writable[0]
    with locked(home / f"{name}.lock") as alone:
        if not (home / name / "meta.json").is_file():
            part = home / (f"{name}.part" if alone else f"{name}.{socket.gethostname()}.{os.getpid()}.part")
            try:
                Builder(annotation, tokenizer, template, part, content).build(progress)
            except OSError as error:
                raise OSError(f"{annotation}: its index is not whole: {refused(error, home)}") from None
            shutil.rmtree(home / name, ignore_errors=True)
            os.rename(part, home / name)
    return Index(home / name, annotation)


def cache_folders(annotation: Path) -> list[Path]:
    """Where indexes lie: beside the data, or in the user's cache when the data are read-only."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [annotation.resolve().parent / ".index", user / "moe-vlm" / "index"]


def digest(path: Path) -> str:
    """SHA-256 of a file, remembered beside its indexes for as long as size and time stay what they were."""
    facts = path.stat()
    stamp = [facts.st_size, facts.st_mtime_ns, facts.st_ino]
    notes = [home / f"{path.name}.digest" for home in cache_folders(path)]
    for note in notes:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(note.read_text())
            if known["stamp"] == stamp:
                return str(known["sha256"])
    with path.open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    for note in notes:
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(note, json.dumps({"stamp": stamp, "sha256": value}))
            break
    return value


def fingerprint(tokenizer: Any, template: str) -> str:
    """What decides the ids besides the text: the tokenizer's whole definition, the template, the format."""
    if getattr(tokenizer, "is_fast", False):
        words = backend_of(tokenizer).to_str()
    else:
        words = type(tokenizer).__name__ + json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = [words, str(tokenizer.bos_token_id), template, str(FORMAT)]
    if template == "chat":
        chat = tokenizer.chat_template
        chat = chat.get("default") if isinstance(chat, dict) else chat
        parts += [str(chat), str(tokenizer.eos_token), "each answer where it stands"]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _map(path: Path, kind: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype=kind)
    return np.asarray(np.memmap(path, dtype=kind, mode="r"))  # a plain view: memmap's own indexing is slow


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
