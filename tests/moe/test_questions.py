"""A file of questions: answered as each is alone, in its order, and gone on with after whatever ended the command."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.questions import questions
from data.sources import DataError
from launch import ask
from launch import questions as command
from moe import generate
from tests.moe.test_kills import small_disk

TEXTS = [
    "What is this?",
    "A cat?",
    "This is a cat. What is this?",
    "What?",
    "Is this a cat?",
    "A?",
    "What is a cat?",
]
MOST = "5"


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Seven questions in a file: about one picture, about two, about none."""
    draw = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(draw.integers(0, 255, (30, 40, 3), np.uint8)).save(tmp_path / f"{name}.png")
    shown = [
        {"image": "a.png"},
        {"image": "b.png"},
        {},
        {"image": ["b.png", "a.png"]},
        {},
        {"image": "b.png"},
        {},
    ]
    rows = [{"question_id": i * 7, "text": t} | s for i, (t, s) in enumerate(zip(TEXTS, shown, strict=True))]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answer(
    checkpoint: Path, asked: Path, *options: str, to: str = "said.jsonl"
) -> tuple[int, list[dict[str, Any]]]:
    """The command's exit code, and the whole lines of its file."""
    path = asked.parent / to
    given = ["--questions", str(asked), "--answers", str(path), "--max-new-tokens", MOST, *options]
    code = generate.main([str(checkpoint), *given])
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return code, [json.loads(line) for line in lines]


def test_each_is_answered_as_it_is_alone(
    checkpoint: Path, asked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = answer(checkpoint, asked, "--batch", "3")
    out = capsys.readouterr()
    assert (code, out.err, out.out) == (0, "", f"7 answers in {asked.parent / 'said.jsonl'}\n")
    for row, line in zip(said, map(json.loads, asked.read_text().splitlines()), strict=True):
        images = line.get("image", [])
        shown = [images] if isinstance(images, str) else images
        options = [word for image in shown for word in ("--image", str(asked.parent / image))]
        assert generate.main([str(checkpoint), *options, "--max-new-tokens", MOST, line["text"]]) == 0
        assert capsys.readouterr().out.rstrip("\n") == row["text"]
        assert row.keys() == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
        assert (row["question_id"], row["prompt"]) == (line["question_id"], line["text"])
        assert row["model_id"].endswith("/step_00000001")
        assert row["metadata"] == {"template": "v1", "max_new_tokens": 5}
    assert len({row["text"] for row in said}) > 1
    assert len({row["answer_id"] for row in said}) == 7


def test_parts_put_together_are_the_whole(checkpoint: Path, asked: Path) -> None:
    _, whole = answer(checkpoint, asked)
    parts = [answer(checkpoint, asked, "--part", f"{k}/3", to=f"{k}.jsonl")[1] for k in (1, 2, 3)]
    assert [row for part in parts for row in part] == whole
    assert [len(part) for part in parts] == [2, 2, 3]


@pytest.mark.parametrize("left", ["", '{"question_id": 21, "pro'])
def test_a_file_begun_before_is_gone_on_with(
    checkpoint: Path,
    asked: Path,
    left: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer(checkpoint, asked)
    path = asked.parent / "said.jsonl"
    whole = path.read_bytes()
    kept = b"".join(whole.splitlines(keepends=True)[:3])
    path.write_bytes(kept + left.encode())
    say, prompts = command.Model.say, []
    monkeypatch.setattr(command.Model, "say", lambda self, p, s, m: prompts.extend(p) or say(self, p, s, m))
    capsys.readouterr()
    assert answer(checkpoint, asked)[0] == 0
    assert path.read_bytes() == whole
    assert len(prompts) == 4  # the three are not asked again
    assert capsys.readouterr().out == f"7 answers in {path}, 3 of them from before\n"
    monkeypatch.setattr(command, "opened", None)  # nothing is left to ask: no model is loaded
    assert answer(checkpoint, asked)[0] == 0
    assert capsys.readouterr().out == f"7 answers in {path}, 7 of them from before\n"


def test_answers_of_something_else_are_left_alone(
    checkpoint: Path, asked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(checkpoint, asked)
    path = asked.parent / "said.jsonl"
    before = path.read_bytes()
    capsys.readouterr()
    for options in (["--template", "phi"], ["--part", "2/2"], ["--max-new-tokens", "6"]):
        assert answer(checkpoint, asked, *options)[0] == 2
        assert "said.jsonl, line 1: not this command's answer to question" in capsys.readouterr().err
        assert path.read_bytes() == before
    asked.write_text("".join(asked.read_text().splitlines(keepends=True)[:6]))
    assert answer(checkpoint, asked)[0] == 2
    assert "line 7: not this command's answer to any of the questions" in capsys.readouterr().err
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert answer(checkpoint, asked)[0] == 2
    assert "is being written by another process: give each its own --part and file" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_stops_it_and_keeps_what_was_said(
    checkpoint: Path, asked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = asked.parent / "b.png"
    sound = picture.read_bytes()
    picture.write_bytes(sound[:200])
    code, said = answer(checkpoint, asked, "--batch", "1")
    assert (code, len(said)) == (2, 1)
    error = capsys.readouterr().err
    assert "6 questions are left; the same command goes on with them" in error
    assert "error: question 7: " in error
    assert "b.png" in error
    picture.write_bytes(sound)
    assert len(answer(checkpoint, asked, "--batch", "1")[1]) == 7


def test_a_full_disk_is_told_and_loses_no_answer(
    checkpoint: Path, asked: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in asked.read_text().splitlines()] * 6
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, 1 << 20) as real:
        if not real:
            pytest.skip("no right to mount a small disk")
        filler = disk / "filler"
        filler.write_bytes(bytes((1 << 20) - 4096))  # room for a page, a good dozen of answers
        assert answer(checkpoint, asked, "--batch", "5", to="disk/said.jsonl")[0] == 2
        error = capsys.readouterr().err
        left = (disk / "said.jsonl").read_bytes()
        assert len(left) == 4096
        assert not left.endswith(b"\n")
        assert f"error: the disk or quota of {disk / 'said.jsonl'} is full" in error
        filler.unlink()
        code, said = answer(checkpoint, asked, "--batch", "5", to="disk/said.jsonl")
        assert (code, [row["question_id"] for row in said]) == (0, [row["question_id"] for row in rows])
        out = capsys.readouterr().out
        assert f"{left.count(10)} of them from before" in out


def test_ctrl_c_ends_it_and_the_same_command_goes_on(checkpoint: Path, asked: Path) -> None:
    rows = asked.read_text() * 300
    asked.write_text(rows)
    path = asked.parent / "said.jsonl"
    given = ["--questions", str(asked), "--answers", str(path), "--batch", "1", "--max-new-tokens", MOST]
    process = subprocess.Popen(
        [sys.executable, generate.__file__, str(checkpoint), *given], stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "questions are left; the same command goes on with them" in error
    assert "Traceback" not in error
    said = [json.loads(line) for line in path.read_text().splitlines()]
    assert 0 < len(said) < 2100
    assert [row["question_id"] for row in said] == [
        json.loads(line)["question_id"] for line in rows.splitlines()
    ][: len(said)]


def test_the_files_of_other_benchmarks(tmp_path: Path) -> None:
    """ScienceQA's are a list of conversations, whose mark may stand anywhere; a text with several keeps them."""
    (tmp_path / "a.png").touch()
    science = {"id": "17", "image": "a.png", "conversations": [{"from": "human", "value": "Which?\n<image>"}]}
    asked = {"question_id": 3, "image": ["a.png", "a.png"], "text": "<image> or <image>?"}
    plain = {"question_id": "q", "image": "a.png", "text": "Why?", "category": "x"}
    path = tmp_path / "asked.json"
    path.write_text(json.dumps([science, asked, plain, {"question_id": 4, "text": "So?", "image": ""}]))
    found = questions(path, tmp_path)
    assert [q.id for q in found] == ["17", 3, "q", 4]
    assert [q.text for q in found] == ["Which?", "or ?", "Why?", "So?"]
    assert [q.marked for q in found] == ["<image>\nWhich?", "<image> or <image>?", "<image>\nWhy?", "So?"]
    assert [len(q.images) for q in found] == [1, 2, 1, 0]
    letter = questions(path, tmp_path, "Answer with the letter.")
    assert [q.text for q in letter] == [f"{q.text}\nAnswer with the letter." for q in found]
    assert [q.marked for q in letter] == [f"{q.marked}\nAnswer with the letter." for q in found]


def test_all_faults_of_a_file_at_once(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"text": "no id"},
        7,
        {"question_id": True, "text": "no id"},
        {"question_id": 1},
        {"question_id": 1, "text": " "},
        {"question_id": 1, "conversations": [{"from": "gpt", "value": "A."}]},
        {"question_id": 2, "text": "<image> and <image>", "image": "a.png"},
        {"question_id": 3, "text": "Why?", "image": "gone.png"},
        {"question_id": 4, "text": "Why?", "image": 5},
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        questions(path, tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path} cannot be asked:"
    assert lines[1:] == [
        "  record 0: it has no 'question_id', a text or a whole number",
        "  record 1: it is a number, not an object",
        "  record 2: it has no 'question_id', a text or a whole number",
        "  record 3: it has no 'text', nor 'conversations' with a human turn",
        "  record 4: it has no 'text', nor 'conversations' with a human turn",
        "  record 5: it has no 'text', nor 'conversations' with a human turn",
        "  record 6: its text has 2 of <image>, and it names 1 pictures",
        f"  record 7, question 3: there is no file {tmp_path / 'gone.png'}",
        "  record 8: 'image' must be a path or a list of paths",
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    with pytest.raises(DataError, match="and 8 more"):
        questions(path, tmp_path)
    path.write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        questions(path, tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--questions", "q", "Why?"],
            "--questions asks what its file says: no question, --image or --routing",
        ),
        (["--questions", "q"], "--questions wants --answers FILE, where the answers go"),
        (["--answers", "a", "Why?"], "--answers, --images, --append and --part go with --questions FILE"),
        (
            ["--questions", "q", "--answers", "a", "--part", "3/2"],
            "expected K/N, the Kth of N parts, got '3/2'",
        ),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        ask.main(["run", *options])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_files_that_are_not_there(checkpoint: Path, asked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = ["--questions", "/no/such.jsonl", "--answers", str(asked.parent / "x")]
    assert generate.main([str(checkpoint), *missing]) == 2
    assert "error: /no/such.jsonl: there is no such file" in capsys.readouterr().err
    assert not (asked.parent / "x").exists()
    assert answer(checkpoint, asked, to="a.png/x")[0] == 2
    assert "a.png is a file, not a folder" in capsys.readouterr().err
