"""Look at one record or one picture and name its defects."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from data.conversation import IMAGE, MOST_IMAGES, Template
from data.images import facts
from data.words import is_path, is_text, kind_of

Found = Iterator[tuple[str, str]]  # kind, detail

ENDINGS = {
    "jpeg": ("jpg", "jpeg", "jpe", "jfif"),
    "mpo": ("jpg", "jpeg", "mpo"),
    "tiff": ("tif", "tiff"),
    "ppm": ("ppm", "pgm", "pbm"),
}
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Picture(NamedTuple):
    """A picture's size and its defects."""

    width: int
    height: int
    defects: list[tuple[str, str]]


def broken(record: Any, template: Template) -> tuple[str, str] | None:
    """The first thing that keeps a record from being read at all."""
    if not isinstance(record, dict):
        return "record-type", f"it is {kind_of(record)}"
    turns = record.get("conversations")
    if not isinstance(turns, list):
        return "no-conversations", f"its keys are {', '.join(map(repr, list(record)[:6])) or 'none'}"
    if not turns:
        return "empty-conversation", ""
    for number, turn in enumerate(turns, 1):
        sound = isinstance(turn, dict) and isinstance(turn.get("from"), str) and is_text(turn.get("value"))
        if not sound:
            return "turn-malformed", f"turn {number}"
    if record.get("video"):
        return "video", str(record["video"])
    image = record.get("image")
    paths = [] if image in (None, "", []) else [image] if isinstance(image, str) else image
    if not isinstance(paths, list) or not all(map(is_path, paths)):
        return "image-field", repr(image)[:80]
    if template.style != "plain":
        roles = ("human", "gpt") if template.style != "chat" else ("human", "gpt", "system")
        for number, turn in enumerate(turns, 1):
            if turn["from"] not in roles:
                return "role-unknown", f"turn {number} is from {turn['from']!r}"
        speakers = [turn["from"] for turn in turns if turn["from"] != "system"]
        for number in range(1, len(speakers)):
            if speakers[number] == speakers[number - 1]:
                return "role-order", f"turns {number} and {number + 1} are both from {speakers[number]}"
    return None


def paths_of(record: dict[str, Any]) -> list[str]:
    """The picture paths of a sound record."""
    image = record.get("image")
    return [image] if isinstance(image, str) and image else list(image or [])


def defects(record: dict[str, Any], template: Template, specials: Sequence[str]) -> Found:
    """What is wrong with the texts of a record that can be read; the first that loses it is the last one
    told.
    """
    turns = record["conversations"]
    paths = paths_of(record)
    plain = template.style == "plain"
    if plain and len(turns) != 2:
        yield "plain-turns", f"{len(turns)} turns"
        return
    if not plain and turns[0]["from"] == "gpt":
        yield "leading-answer", shown(turns[0]["value"])
        turns = turns[1:]
    answers = turns[1:] if plain else [turn for turn in turns if turn["from"] == "gpt"]
    if not any(turn["value"].strip() for turn in answers):
        yield "no-answer", ""
        return
    yield from _placeholders(turns, answers, paths, plain)
    odd = _odd("\n".join([turn["value"] for turn in turns]), template, specials)
    roles = _roles(template)
    for number, turn in enumerate(turns, 1):
        text, stripped = turn["value"], turn["value"].strip()
        if number > 1 if plain else turn["from"] == "gpt":
            if not stripped:
                yield "empty-answer", f"turn {number}"
            elif text != stripped and not plain:
                yield "blank-edge", f"turn {number}: {shown(text)}"
        elif not stripped:
            yield "empty-question", f"turn {number}"
        if not odd:
            continue
        if not plain and template.end and template.end in text:
            yield "separator-in-text", f"turn {number}: {shown(text)}"
        elif found := [special for special in specials if special in text]:
            yield "special-in-text", f"turn {number}: {', '.join(found)}"
        if roles and roles.search(text):
            yield "role-in-text", f"turn {number}: {shown(text)}"
        if control := _CONTROL.search(text):
            yield "control-character", f"turn {number}: {control!r}"
    if not plain and turns[-1]["from"] == "human":
        yield "trailing-question", shown(turns[-1]["value"])


def _odd(text: str, template: Template, specials: Sequence[str]) -> bool:
    """Whether there may be anything in a text that is told of one: substrings are found faster than patterns."""
    speakers = [f"{template.user}: ", f"{template.assistant}: "]
    return any(word and word in text for word in (template.end, *speakers, *specials)) or (
        not text.replace("\n", " ").isprintable()
    )


@functools.cache
def _roles(template: Template) -> re.Pattern[str] | None:
    if template.style == "plain" or not template.assistant:
        return None
    return re.compile(rf"\b({template.assistant}|{template.user}): ")


def _placeholders(turns: list[Any], answers: list[Any], paths: list[str], plain: bool) -> Found:
    count = sum(turn["value"].count(IMAGE) for turn in turns)
    if plain:
        # The question's words and all but one of its placeholders are dropped.
        count = min(1, turns[0]["value"].count(IMAGE)) + turns[1]["value"].count(IMAGE)
    told = sum(turn["value"].count(IMAGE) for turn in answers)
    if not paths and count:
        yield "placeholder-as-text", f"{count} times"
    elif paths and not count:
        yield "placeholder-missing", f"{len(paths)} pictures"
    elif paths and count != len(paths):
        yield "placeholder-count", f"{count} placeholders, {len(paths)} pictures"
    elif told:
        yield "placeholder-in-answer", f"{told} times"
    if len(paths) > MOST_IMAGES:
        yield "too-many-images", str(len(paths))


def picture(root: Path, beside: Path, path: str, hint: bool = True) -> Picture:
    """Decode a picture as training would, at an eighth of its size where the format can; name its defects.

    `hint`: for one that is missing, look for a file of a like name.
    """
    if ".." in PurePosixPath(path).parts or (path.startswith("/") and not Path(path).is_relative_to(root)):
        return Picture(0, 0, [("image-outside", path)])
    place = root / path
    try:
        if not place.is_file() and (beside / path).is_file():
            place = beside / path
        if not place.is_file():
            return Picture(0, 0, [("image-missing", f"{path}{_like(place) if hint else ''}")])
        seen = facts(place)
    except PermissionError:
        return Picture(0, 0, [("image-forbidden", path)])
    found = [(kind, path) for kind in seen.defects]
    ending = place.suffix.lower().removeprefix(".")
    if seen.format and ending not in ENDINGS.get(seen.format, (seen.format,)):
        found.append(("image-misnamed", f"{path} is {seen.format.upper()}"))
    return Picture(seen.width, seen.height, found)


def _like(place: Path) -> str:
    """A file of the same name but for its ending or case, as a hint."""
    if place.is_dir():
        return " (it is a folder)"
    if not place.parent.is_dir():
        return f" (there is no folder {place.parent})"
    stem = place.stem.lower()
    with os.scandir(place.parent) as entries:
        near = next((entry.name for entry in entries if Path(entry.name).stem.lower() == stem), None)
    return f" (but {near} is there)" if near else ""


def shown(text: str) -> str:
    """A text, short enough for a line."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."
