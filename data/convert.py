"""The publishers' own formats into the annotation schema: {id, image, conversations: [{from, value}]}.

Formats: SVIT (BAAI-DCAI/Visual-Instruction-Tuning), LVIS-Instruct4V and LLaVA (already the schema, but paths
without prefix and <image> anywhere), LRV-Instruction (one question a record), MIMIC-IT (Otter; pictures as
base64 text).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.conversation import IMAGE
from data.records import RecordError, pairs, stream
from data.words import is_path, is_text, kind_of

Converter = Callable[[Path, str], Iterator[dict[str, Any]]]


def llava(path: Path, prefix: str) -> Iterator[dict[str, Any]]:
    """LLaVA's and LVIS-Instruct4V's files: paths get the prefix, <image> moves to the head of its turn."""
    for record in stream(path):
        value = _object(path, record.number, record.value)
        images = value.get("image") or []
        images = [images] if isinstance(images, str) else images
        turns = [
            {**turn, "value": in_front(turn.get("value", "")) if images else turn.get("value", "")}
            for turn in value["conversations"]
        ]
        kept = {key: item for key, item in value.items() if key not in ("image", "conversations")}
        placed = [_join(prefix, image) for image in images]
        image = {"image": placed if len(placed) > 1 else placed[0]} if placed else {}
        yield {**kept, **image, "conversations": turns}


def svit(path: Path, prefix: str) -> Iterator[dict[str, Any]]:
    """SVIT's raw files: a picture id and several talks, each of which becomes a record."""
    for record in stream(path):
        value = _object(path, record.number, record.value)
        if "image" in value:  # the 150k core set is in LLaVA's schema
            image = value["image"]
            yield {**value, "image": _join(prefix, image), "conversations": _headed(value["conversations"])}
            continue
        image = _join(prefix, f"{value['image_id']}.jpg")
        for number, talk in enumerate(value["conversations"]):
            turns = [
                {"from": {"user": "human"}.get(turn["from"], turn["from"]), "value": turn["value"].strip()}
                for turn in talk["content"]
            ]
            yield {"id": f"{value['image_id']}_{number}", "image": image, "conversations": _headed(turns)}


def lrv(path: Path, prefix: str) -> Iterator[dict[str, Any]]:
    """LRV-Instruction's files: one question and answer a record; a chart's id is its file name."""
    for record in stream(path):
        value = _object(path, record.number, record.value)
        name = str(value["image_id"])
        name = name if name.lower().endswith((".jpg", ".jpeg", ".png")) else f"{name}.jpg"
        yield {
            "id": f"{value['image_id']}_{record.number}",
            "image": _join(prefix, name),
            "conversations": _asked(value["question"], value["answer"]),
        }


def mimic_it(path: Path, prefix: str) -> Iterator[dict[str, Any]]:
    """MIMIC-IT's instructions: one question a record; the in-context examples of `rel_ins_ids` are
    dropped.
    """
    there: list[str] = []
    for key, section in pairs(path):
        there.append(key)
        if key != "data":
            continue
        for name, found in section.items():
            value = _object(path, name, found)
            images = [_join(prefix, f"{image}.jpg") for image in value.get("image_ids", [])]
            image = {"image": images if len(images) > 1 else images[0]} if images else {}
            turns = _asked(value["instruction"], value["answer"], len(images))
            yield {"id": name, **image, "conversations": turns}
    if "data" not in there:
        found = ", ".join(map(repr, there[:6])) or "nothing"
        raise RecordError(f"{path}: there is no 'data', only {found}; is this the file of another kind?")


CONVERTERS: dict[str, Converter] = {
    "llava": llava,
    "lvis": llava,
    "svit": svit,
    "lrv": lrv,
    "mimic-it": mimic_it,
}


def write(records: Iterator[dict[str, Any]], out: Path, texts: Path | None = None) -> tuple[int, int]:
    """Write records to a new file, text-only ones to `texts` if given; how many went to each.

    The files are there whole or not at all. FileExistsError rather than writing over one.
    """
    _Fields.where = ""
    if texts == out:
        raise ValueError(f"{out}: two files are to be written there; name another one for --texts")
    files = [path for path in (out, texts) if path]
    for path in files:
        if path.exists():
            raise FileExistsError(f"{path} exists already; nothing is overwritten: name another file")
    partial = [path.with_name(f"{path.name}.{os.getpid()}.part") for path in files]
    counts = [0] * len(files)
    try:
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(path.open("w", encoding="utf-8")) for path in partial]
            for record in records:
                at = 1 if texts and "image" not in record else 0
                opened[at].write(",\n" if counts[at] else "[\n")
                text = json.dumps(record, ensure_ascii=False)
                opened[at].write(text if is_text(text) else json.dumps(record))
                counts[at] += 1
            for file, count in zip(opened, counts, strict=True):
                file.write("\n]\n" if count else "[]\n")
        for path, target in zip(partial, files, strict=True):
            os.replace(path, target)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    return counts[0], counts[1] if texts else 0


def write_pictures(path: Path, folder: Path) -> tuple[int, list[str]]:
    """MIMIC-IT's {id: base64} file to ID.jpg files; how many are new, and the pictures that cannot be written.

    Files that are there stay: a run that was stopped goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made, broken = 0, []
    for name, text in pairs(path):
        target = folder / f"{name}.jpg"
        if not name or target.parent != folder or not is_path(target.name):
            broken.append(f"{name!r}: no name of a file")
            continue
        if target.is_file():
            continue
        try:
            data = base64.b64decode(
                text.split(",", 1)[-1] if text.startswith("data:") else text, validate=True
            )
        except (binascii.Error, AttributeError, ValueError):
            data = b""
        if not data:
            broken.append(f"{name}: not base64")
            continue
        partial = target.with_suffix(f".{os.getpid()}.part")
        try:
            partial.write_bytes(data)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        made += 1
    return made, broken


def in_front(text: str) -> str:
    """A turn with its <image>s moved to its head, a line each, as LLaVA's training does
    (llava/train/train.py).
    """
    count = text.count(IMAGE)
    return (f"{IMAGE}\n" * count + text.replace(IMAGE, "").strip()).strip() if count else text


def _headed(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Turns whose first has an <image>."""
    if not turns or any(IMAGE in turn["value"] for turn in turns):
        return turns
    return [{**turns[0], "value": f"{IMAGE}\n{turns[0]['value']}"}, *turns[1:]]


def _asked(question: str, answer: str, images: int = 1) -> list[dict[str, str]]:
    return [
        {"from": "human", "value": f"{IMAGE}\n" * images + question.strip()},
        {"from": "gpt", "value": answer.strip()},
    ]


def _join(prefix: str, path: str) -> str:
    return (
        f"{prefix.rstrip('/')}/{path}" if prefix and not path.startswith(prefix.rstrip("/") + "/") else path
    )


def latest(path: Path) -> str:
    """The record that was converted last, if it is of this file."""
    return _Fields.where if _Fields.where.startswith(f"{path}, ") else str(path)


class _Fields(dict[str, Any]):
    """A record that says where it lacks a field."""

    where = ""  # of the one read last: what is wrong with a value shows where it is used

    def __missing__(self, key: str) -> Any:
        there = ", ".join(map(repr, list(self)[:6])) or "nothing"
        raise RecordError(
            f"{self.where}: there is no {key!r}, only {there}; is this the file of another kind?"
        )


def _object(path: Path, number: int | str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecordError(f"{path}, record {number}: expected an object, found {kind_of(value)}")
    fields = _Fields(value)
    _Fields.where = f"{path}, record {number}"
    return fields
