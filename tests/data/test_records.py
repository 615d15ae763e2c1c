"""Annotation files are read record by record, whatever their size and spacing."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from data import records
from data.records import CHUNK, RecordError, read, stream

VALUES: list[Any] = [
    {"id": "a", "text": "plain"},
    {"id": "ü", "text": "ein Schiff, 船, \U0001f6a2"},
    {"text": 'quotes " and \\ and } ] [ {'},
    12345,
    "loose",
    None,
    {"deep": [[{"a": [1, 2, {"b": "]"}]}]]},
    {"long": "x" * 300},
]


@pytest.mark.parametrize("chunk", [1, 3, 17, 4096])
@pytest.mark.parametrize("style", ["list", "indented", "lines", "utf8", "bom", "tight"])
def test_every_spacing_and_chunk_size(
    style: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "CHUNK", chunk)
    values = VALUES
    text = {
        "list": lambda: json.dumps(values),
        "indented": lambda: json.dumps(values, indent=2) + "\n",
        "lines": lambda: "\n".join(map(json.dumps, values)) + "\n",
        "utf8": lambda: json.dumps(values, ensure_ascii=False),
        "bom": lambda: "\ufeff " + json.dumps(values),
        "tight": lambda: json.dumps(values, separators=(",", ":"), ensure_ascii=False),
    }[style]()
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    found = list(stream(path))
    assert [record.value for record in found] == values
    assert [record.number for record in found] == list(range(len(values)))
    for record in found:
        assert read(path, record.start, record.end) == record.value
    later = list(stream(path, found[4].end, 5))
    assert later == found[5:]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected a JSON list of records, but the file is empty"),
        (b"<html>", "but it starts with '<'"),
        (b'[{"a": 1},\n{"a": ', "line 2, byte 17, record 1: not valid JSON"),
        (b'[{"a": 1},\n{"a": 2}', "record 2: not valid JSON (the list is not closed)"),
        (b'[{"a": "\xff\xfe"}]', "record 0: not valid JSON (the text is not UTF-8)"),
        (b'[{"a": 1}]\n \n[{"a": 2}]', "line 3, byte 13, record 1: not valid JSON (more follows its end)"),
        (b'[{"a": 1}]' + b" " * CHUNK + b"x", f"byte {CHUNK + 10}, record 1: not valid JSON (more follows"),
        (
            b'[{"a": 1},\n{"a": ' + b"9" * 5000 + b"}]",
            "line 2, byte 11, record 1: not valid JSON (a number of",
        ),
        (b'{"a": 1}\n]', "line 2, byte 9, record 1: not valid JSON"),
        (b'[{"a": 1}, oops]', "record 1: not valid JSON"),
    ],
)
def test_a_broken_file_is_told_with_its_place(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(RecordError) as caught:
        list(stream(tmp_path / "a.json"))
    assert words in str(caught.value)


def test_an_empty_list_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[ ]")
    assert list(stream(tmp_path / "a.json")) == []


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "CHUNK", 1 << 16)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "word " * 100, "id": at} for at in range(8000)]))
    assert path.stat().st_size > 4_000_000
    tracemalloc.start()
    assert sum(1 for _ in stream(path)) == 8000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
