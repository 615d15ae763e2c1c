"""Build a training index: read records, encode them, append to its files, and mark how far that is done."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.conversation import IGNORED, IMAGE_ID, ConversationError, Encoded, encode_many, remembering
from data.records import Record, stream
from data.whole import write_whole
from data.words import is_path, kind_of

FORMAT = 2  # raise it when an index is laid out, or a conversation encoded, other than before
MARK = 2048  # records between two marks of a build; their tokens are in memory, about 100 MB
COLUMNS = {  # NAME.col, one value a record
    "token_at": "<i8",  # a record's first token in tokens.bin
    "span_at": "<i8",  # its first learnt span in spans.bin, pairs of token numbers
    "path_at": "<i8",  # its picture paths in paths.bin, each closed by a zero byte
    "start": "<i8",  # its bytes in the annotation file
    "end": "<i8",
    "tokens": "<i4",
    "spans": "<i4",
    "words": "<i4",  # the reference's length: texts split at white space
    "head": "<i4",  # tokens before the first learnt one
    "images": "<i2",  # -1: the record cannot be trained on, faults.jsonl says why
    "head_images": "<i2",  # images before the first learnt token
}


def pictures(record: Any) -> list[str]:
    """The picture paths of a record; none when it is text only. ConversationError when they are not texts."""
    image = record.get("image")
    paths = [] if image in (None, "", []) else [image] if isinstance(image, str) else image
    if not isinstance(paths, list) or not all(map(is_path, paths)):
        raise ConversationError("'image' must be a path or a list of paths")
    return paths


def _keys(record: dict[str, Any]) -> str:
    return f", only {', '.join(map(repr, list(record)[:6]))}" if record else ""


def faults_of(record: Any) -> ConversationError | None:
    """What is wrong with a record before its texts are looked at."""
    if not isinstance(record, dict):
        return ConversationError(f"the record is {kind_of(record)}, not an object with 'conversations'")
    if not isinstance(record.get("conversations"), list):
        return ConversationError(f"the record has no list of 'conversations'{_keys(record)}")
    if not all(isinstance(turn, dict) for turn in record["conversations"]):
        return ConversationError("a turn is not an object with 'from' and 'value'")
    if record.get("video"):
        return ConversationError("the record has a 'video', and only pictures can be trained on")
    try:
        pictures(record)
    except ConversationError as error:
        return error
    return None


@dataclass
class Builder:
    """One index being built in a folder; `content` is the annotation file's SHA-256."""

    annotation: Path
    tokenizer: Any
    template: str
    folder: Path
    content: str

    def build(self, progress: Callable[[int, int], None] | None) -> None:
        """Fill the folder, from its last mark on if it has one, and close it with meta.json."""
        size = self.annotation.stat().st_size
        # Ids above 65,534 need four bytes; 65,535 stands for an image.
        narrow = max(self.tokenizer.get_vocab().values()) < 0xFFFF
        self.memory = remembering(self.tokenizer, self.template)
        self.token_type = np.dtype("<u2" if narrow else "<i4")
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [*(f"{name}.col" for name in COLUMNS), "tokens.bin", "spans.bin", "paths.bin", "faults.jsonl"]
        mark = self._resume(names)
        self.counts = {name: mark["sizes"].get(name, 0) for name in names}
        records = stream(self.annotation, mark["byte"], mark["records"])
        with contextlib.ExitStack() as stack:
            stack.enter_context(_uncollected())
            self.files = {name: stack.enter_context((self.folder / name).open("ab")) for name in names}
            number = mark["records"]
            while batch := list(itertools.islice(records, MARK)):
                self._add(batch)
                number = batch[-1].number + 1
                for file in self.files.values():
                    file.flush()
                state = {"byte": batch[-1].end, "records": number, "sizes": self.counts}
                write_whole(self.folder / "mark.json", json.dumps(state))
                if progress:
                    progress(batch[-1].end, size)
            for file in self.files.values():
                os.fsync(file.fileno())
        meta = {
            "format": FORMAT,
            "annotation": self.annotation.name,
            "sha256": self.content,
            "template": self.template,
            "records": number,
            "tokens": self.counts["tokens.bin"] // self.token_type.itemsize,
            "token_type": self.token_type.str,
        }
        (self.folder / "mark.json").unlink(missing_ok=True)
        write_whole(self.folder / "meta.json", json.dumps(meta, indent=1))

    def _resume(self, names: list[str]) -> dict[str, Any]:
        """The last mark, with the files cut back to it."""
        mark: dict[str, Any] = {"byte": 0, "records": 0, "sizes": {}}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads((self.folder / "mark.json").read_text())
            if all((self.folder / name).stat().st_size >= size for name, size in known["sizes"].items()):
                mark = known  # a machine that lost power may have kept the mark and lost the bytes
        for name in names:
            with (self.folder / name).open("ab") as file:
                file.truncate(mark["sizes"].get(name, 0))
        return mark

    def _put(self, name: str, data: bytes) -> None:
        self.files[name].write(data)
        self.counts[name] += len(data)

    def _add(self, batch: list[Record]) -> None:
        broken = [faults_of(record.value) for record in batch]
        asked = [
            (record.value["conversations"], bool(pictures(record.value)))
            for record, fault in zip(batch, broken, strict=True)
            if fault is None
        ]
        encoded = iter(encode_many(asked, self.tokenizer, self.template, self.memory))
        rows: dict[str, list[int]] = {name: [] for name in COLUMNS}
        tokens: list[int] = []
        spans: list[int] = []
        paths: list[bytes] = []
        token_at = self.counts["tokens.bin"] // self.token_type.itemsize
        span_at, path_at = self.counts["spans.bin"] // 8, self.counts["paths.bin"]
        for record, fault in zip(batch, broken, strict=True):
            outcome: Encoded | ConversationError = fault or next(encoded)
            own = [] if fault else pictures(record.value)
            if not isinstance(outcome, ConversationError):
                outcome = _sound(outcome, own)
            if isinstance(outcome, ConversationError):
                name = record.value.get("id", "") if isinstance(record.value, dict) else ""
                self._put(
                    "faults.jsonl", json.dumps([record.number, str(name), str(outcome)]).encode() + b"\n"
                )
                outcome, own = Encoded([], []), []
                images = -1
            else:
                images = len(own)
            ids, pairs = outcome.input_ids, _spans(outcome)
            head = pairs[0] if pairs else 0
            joined = b"".join(path.encode("utf-8", "surrogatepass") + b"\0" for path in own)
            row = {
                "token_at": token_at,
                "span_at": span_at,
                "path_at": path_at,
                "start": record.start,
                "end": record.end,
                "tokens": len(ids),
                "spans": len(pairs) // 2,
                "words": 0 if images < 0 else words(record.value["conversations"]),
                "head": head,
                "images": images,
                "head_images": ids[:head].count(IMAGE_ID),
            }
            for name, value in row.items():
                rows[name].append(value)
            tokens += ids
            spans += pairs
            paths.append(joined)
            token_at, span_at, path_at = token_at + len(ids), span_at + len(pairs) // 2, path_at + len(joined)
        array = np.array(tokens, dtype=np.int32)
        if self.token_type.itemsize == 2:
            array[array == IMAGE_ID] = 0xFFFF
        self._put("tokens.bin", array.astype(self.token_type).tobytes())
        self._put("spans.bin", np.array(spans, dtype="<i4").tobytes())
        self._put("paths.bin", b"".join(paths))
        for name, kind in COLUMNS.items():
            self._put(f"{name}.col", np.array(rows[name], dtype=kind).tobytes())


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Nothing that a build makes refers to itself, and the collector would go over its millions of numbers."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def words(conversations: list[dict[str, str]]) -> int:
    """The reference's length of a sample: its texts split at white space, image tokens not counted."""
    return sum(len(turn["value"].split()) for turn in conversations)


def _sound(encoded: Encoded, images: list[str]) -> Encoded | ConversationError:
    placeholders = encoded.input_ids.count(IMAGE_ID)
    if placeholders != len(images):
        return ConversationError(f"{placeholders} <image> placeholders for {len(images)} pictures")
    if not encoded.turn_ends:
        return ConversationError("no answer to learn from")
    return encoded


def _spans(encoded: Encoded) -> list[int]:
    """Start and end of each run of learnt tokens, flat; each ends where an answer does."""
    flat: list[int] = []
    last = 0
    for end in encoded.turn_ends:
        start = next(at for at in range(last, end) if encoded.labels[at] != IGNORED)
        flat += (start, end)
        last = end
    return flat
