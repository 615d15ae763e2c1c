"""What JSON can say and nobody means: each command tells of it with its record, and goes on with the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.prepare import main

from .places import picture, record, write
from .support import GOLDENS

LLAMA = str(GOLDENS / "tokenizers" / "llama_legacy")
ODD: dict[str, tuple[dict[str, Any], str]] = {  # a record, and what keeps the index from taking it
    "half a character": (record("Is it?", "\ud800 it is."), "turn 2 has half of a character"),
    "a role that is a list": ({"conversations": [{"from": [1], "value": "Is it?"}]}, "turn 1 needs 'from'"),
    "a zero byte": (record("<image>\nIs it?", "It is.", image="a\0.png"), "'image' must be a path"),
    "half a character's path": (
        record("<image>\nIs it?", "It is.", image="\ud800"),
        "'image' must be a path",
    ),
    "no file's name": (record("<image>\nIs it?", "It is.", image="a" * 300), "'image' must be a path"),
    "a number": ({**record("<image>\nIs it?", "It is."), "image": 0}, "'image' must be a path"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_record_is_told_and_the_others_are_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd, why = ODD[name]
    sound = record("<image>\nWhat?", "That.", image=picture(tmp_path, 1))
    write(tmp_path, "mine.json", [sound, odd, record("Who?", "They.")])
    where = ["mine.json", "--root", str(tmp_path)]
    assert main(["check", *where, "--tokenizer", LLAMA]) == 1
    assert "1 lost" in (told := capsys.readouterr().out)
    assert "mine.json, record 1" in told
    assert main(["index", *where, "--tokenizer", LLAMA]) == 1
    assert f"record 1: {why}" in capsys.readouterr().out
    wrong = "image" in odd
    assert main(["pixels", *where]) == wrong
    told = capsys.readouterr().out
    assert "1 pictures in" in told
    assert (f"mine.json, record 1: {why}" in told) == wrong


def test_brackets_without_end_are_no_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep.json").write_text("[" * 5000 + "]" * 5000)
    assert main(["index", "deep.json", "--root", str(tmp_path), "--tokenizer", LLAMA]) == 2
    assert "record 0: not valid JSON (nested too deeply)" in capsys.readouterr().err
