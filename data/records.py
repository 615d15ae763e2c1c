"""Read the records of an annotation file one at a time: memory does not grow with the file.

The bytes are scanned as Latin-1, in which a character is a byte: so each record's place in the file is known
while Python's own JSON scanner, which is written in C, finds its end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

CHUNK = 1 << 22  # bytes read at a time
_SPACE = " \t\r\n,"


Pairs = list[tuple[str, Any]]


class RecordError(ValueError):
    """An annotation file that is not a list of records; the message names file and place."""


class Record(NamedTuple):
    """One record, its first byte and the byte after its last; `value` may be anything that JSON can say."""

    number: int
    start: int
    end: int
    value: Any


def stream(
    path: Path, start: int = 0, number: int = 0, made: Callable[[Pairs], Any] | None = None
) -> Iterator[Record]:
    """The records of a JSON list or of JSON lines, from byte `start` on, whose record has that number.

    `made` makes an object of its fields, as json's object_pairs_hook; a field's text is then Latin-1. Raises
    RecordError where the file is not JSON, naming line and record.
    """
    decoder = json.JSONDecoder(object_pairs_hook=made)
    with path.open("rb") as file:
        first, listed = _opening(file, path)
        base = start or first
        file.seek(base)
        text, place, ended = "", 0, False
        while True:
            while place < len(text) and text[place] in _SPACE:
                place += 1
            more = place >= len(text)
            if not more:
                if text[place] == "]" and listed:
                    _nothing_follows(file, path, base, text, place + 1, number)
                    return
                try:
                    value, end = _value(decoder, text, place, path, base, number)
                except json.JSONDecodeError as error:
                    # What the chunk cut off shows at its end, or as a string that does not end.
                    cut = error.pos > len(text) - 64 or error.msg.startswith("Unterminated string")
                    if ended or not cut:
                        raise _broken(path, base + error.pos, number, error.msg, ended) from None
                    more = True
                else:
                    # A number at the end of what was read may go on.
                    more = end == len(text) and not ended
                    if not more:
                        yield _record(path, number, base + place, base + end, text[place:end], value)
                        place, number = end, number + 1
            if more:
                if ended and listed:
                    raise _broken(path, base + place, number, "the list is not closed")
                if ended:
                    return
                # Doubling keeps a record that is longer than a chunk from being scanned over and over.
                fresh = file.read(max(CHUNK, len(text) - place))
                base, text, place = base + place, text[place:] + fresh.decode("latin-1"), 0
                ended = not fresh


def read(path: Path, start: int, end: int) -> Any:
    """The record between two bytes."""
    with path.open("rb") as file:
        file.seek(start)
        return json.loads(file.read(end - start))


def _nothing_follows(file: Any, path: Path, base: int, text: str, place: int, number: int) -> None:
    """Refuse a second list or object in a file: it would be lost."""
    while text:
        rest = text[place:].lstrip()
        if rest:
            raise _broken(path, base + len(text) - len(rest), number, "more follows its end", False)
        base, place, text = base + len(text), 0, file.read(CHUNK).decode("latin-1")


def _value(
    decoder: json.JSONDecoder, text: str, place: int, path: Path, base: int, number: int
) -> tuple[Any, int]:
    """The value that starts at `place`, and where it ends; JSONDecodeError where the text may only be cut off."""
    try:
        return decoder.raw_decode(text, place)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        why = "nested too deeply"
    except ValueError:
        why = "a number of thousands of digits"
    raise _broken(path, base + place, number, why, False)


def _record(path: Path, number: int, start: int, end: int, text: str, value: Any) -> Record:
    if not text.isascii():
        try:
            value = json.loads(text.encode("latin-1").decode("utf-8"))
        except UnicodeDecodeError:
            raise _broken(path, start, number, "the text is not UTF-8", False) from None
    return Record(number, start, end, value)


def _opening(file: Any, path: Path) -> tuple[int, bool]:
    """Where the first record may start, and whether the file is a list; else it is JSON lines."""
    head = file.read(64)
    skipped = len(head) - len(head.removeprefix(b"\xef\xbb\xbf").lstrip())
    first = head[skipped : skipped + 1]
    if first == b"[":
        return skipped + 1, True
    if first == b"{":
        return skipped, False
    what = "the file is empty" if not first else f"it starts with {first.decode('latin-1')!r}"
    raise RecordError(f"{path}: expected a JSON list of records, but {what}")


def _broken(path: Path, place: int, number: int, why: str, cut: bool = True) -> RecordError:
    """The error for a byte; `cut`: the file seems to end before its time."""
    with path.open("rb") as file:
        lines, left = 1, place
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            lines, left = lines + chunk.count(b"\n"), left - len(chunk)
        file.seek(max(0, place - 30))
        near = file.read(min(place, 30)).split(b"\n")[-1].decode("utf-8", "replace")
    way_out = "was the download cut short?" if cut else f"after {near!r}"
    return RecordError(
        f"{path}, line {lines}, byte {place}, record {number}: not valid JSON ({why}); {way_out}"
    )


def pairs(path: Path) -> Iterator[tuple[str, Any]]:
    """The keys and values of a file that is one JSON object, one at a time."""
    decoder = json.JSONDecoder()
    with path.open("rb") as file:
        base, text, place, ended, number = 0, "", 0, False, 0
        key: str | None = None
        opened = False
        while True:
            while place < len(text) and text[place] in (_SPACE + ":" if opened else _SPACE + "\xef\xbb\xbf"):
                place += 1
            if place < len(text):
                if not opened:
                    if text[place] != "{":
                        raise RecordError(
                            f"{path}: expected a JSON object, but it starts with {text[place]!r}"
                        )
                    opened, place = True, place + 1
                    continue
                if text[place] == "}" and key is None:
                    _nothing_follows(file, path, base, text, place + 1, number)
                    return
                try:
                    value, end = _value(decoder, text, place, path, base, number)
                except json.JSONDecodeError as error:
                    if ended:
                        raise _broken(path, base + error.pos, number, error.msg) from None
                else:
                    if end < len(text) or ended:
                        value = _record(path, number, base + place, base + end, text[place:end], value).value
                        if key is None:
                            key = value
                        else:
                            yield key, value
                            key, number = None, number + 1
                        place = end
                        continue
            elif ended:
                raise _broken(path, base + place, number, "the object is not closed")
            fresh = file.read(max(CHUNK, len(text) - place))
            base, text, place = base + place, text[place:] + fresh.decode("latin-1"), 0
            ended = not fresh
