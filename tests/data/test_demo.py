"""The demo data: the reference's layout, true and even answers, held-out scenes that no training file has."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data import demo

ROOT = Path(__file__).resolve().parents[2]
PREFIXES = {
    "llava_image_.json": "llava_image/",
    "la_tune_256k.json": "mimicit_tune/LA/",
    "lrv_tune_331k.json": "lrv_tune/",
    "lvis_tune_220k_.json": "lvis_tune/",
    "svit_tune_157k.json": "svit_tune/",
    "nlp_tune.json": "",
    "llava_image_tune_.json": "llava_image_tune/",
    "held_out.json": "held_out/",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "root"
    assert demo.make(folder, seed=3, scale=0.2)
    return folder


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    read: list[dict[str, Any]] = json.loads((folder / name).read_text())
    return read


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_each_row_has_the_references_schema_and_a_picture_that_opens(folder: Path) -> None:
    assert {path.name for path in folder.glob("*.json")} == {*PREFIXES, demo.MARK}
    formats = set()
    for name, prefix in PREFIXES.items():
        assert rows(folder, name)
        for row in rows(folder, name):
            turns = row["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert all(turn["value"].strip() for turn in turns)
            text = "".join(turn["value"] for turn in turns)
            if not prefix:
                assert "image" not in row
                assert "<image>" not in text
                continue
            assert row["image"].startswith(prefix)
            assert turns[0]["value"].startswith("<image>\n")
            assert text.count("<image>") == 1
            with Image.open(folder / row["image"]) as picture:
                picture.load()
                formats.add(picture.format)
                assert max(picture.size) == demo.SIDE
    assert formats == {"JPEG", "PNG"}


def test_every_picture_is_named_by_one_row(folder: Path) -> None:
    named = [row["image"] for name in PREFIXES for row in rows(folder, name) if "image" in row]
    drawn = [path for path in digests(folder) if not path.endswith(".json")]
    assert sorted(named) == sorted(drawn)


def test_the_same_seed_makes_the_same_bytes_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    demo.make(tmp_path / "same", seed=3, scale=0.2)
    demo.make(tmp_path / "other", seed=4, scale=0.2)
    assert digests(tmp_path / "same") == digests(folder)
    assert digests(tmp_path / "other")["held_out.json"] != digests(folder)["held_out.json"]


def test_no_training_scene_is_held_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: dict[str, set[demo.Scene]] = {"held_out": set(), "train": set()}
    draw, save = demo.Scene.draw, demo.Studio.save
    last: list[demo.Scene] = []

    def remember(scene: demo.Scene, rng: Any) -> Image.Image:
        last.append(scene)
        return draw(scene, rng)

    def sort(studio: demo.Studio, picture: Image.Image, path: str) -> str:
        if last:  # a photo is no scene
            drawn["held_out" if path.startswith("held_out/") else "train"].add(last.pop())
        return save(studio, picture, path)

    monkeypatch.setattr(demo.Scene, "draw", remember)
    monkeypatch.setattr(demo.Studio, "save", sort)
    demo.make(tmp_path / "root", seed=0)
    assert len(drawn["held_out"]) == len(rows(tmp_path / "root", "held_out.json")) == 300
    assert len(drawn["train"]) > 3000
    assert not drawn["held_out"] & drawn["train"]


def test_held_out_kinds_are_even_and_no_answer_rules_its_kind(folder: Path, tmp_path: Path) -> None:
    demo.make(tmp_path / "root", seed=0)
    answers: dict[str, Counter[str]] = {}
    for row in rows(tmp_path / "root", "held_out.json"):
        question, answer = (turn["value"] for turn in row["conversations"])
        answers.setdefault(question.split("\n")[1].split()[1], Counter())[answer] += 1
    assert {kind: counts.total() for kind, counts in answers.items()} == {
        "color": 60,
        "shape": 60,
        "is": 60,  # Where is ...
        "many": 60,
        "there": 60,  # Is there ...
    }
    chances = {"color": 6, "shape": 4, "is": 9, "many": 4, "there": 2}
    for kind, counts in answers.items():
        assert len(counts) == chances[kind]
        assert counts.most_common(1)[0][1] <= 60 / chances[kind] * 2


def test_the_answers_are_what_was_drawn() -> None:
    """The pixel in the middle of a cell has the color that the answer names."""
    rng = demo.random.Random(0)
    for _ in range(200):
        scene = demo.sample_scene(rng)
        picture = scene.draw(rng)
        for cell, shape, color in scene.items:
            middle = (cell % 3 * 32 + 16, cell // 3 * 32 + 16)
            assert picture.getpixel(middle) == demo.COLORS[color]
            assert scene.ask("color", (cell, shape, color), rng) == (f"What color is the {shape}?", color)
            assert scene.ask("place", (cell, shape, color), rng)[1] == demo.PLACES[cell]
        empty = set(range(9)) - {cell for cell, _, _ in scene.items}
        for cell in empty:
            assert picture.getpixel((cell % 3 * 32 + 16, cell // 3 * 32 + 16)) in demo.PAPERS
        assert scene.ask("count", scene.items[0], rng)[1] == demo.NUMBERS[len(scene.items)]
        question, answer = scene.ask("exists", scene.items[0], rng)
        color, shape = question.removesuffix("?").split()[-2:]
        assert answer == ("yes" if any(item[1:] == (shape, color) for item in scene.items) else "no")


def test_a_conversation_never_asks_what_it_told() -> None:
    rng = demo.random.Random(1)
    for _ in range(300):
        scene = demo.sample_scene(rng)
        told: set[tuple[str, str]] = set()
        for question, answer in scene.conversation(rng, 6):
            text = f"{question} {answer}"
            shape = next((shape for shape in demo.SHAPES if shape in text), "")
            fact = ("count", "") if not shape else ("cell", shape)
            if question.startswith(("What color", "Is there")):
                fact = ("color", shape)
            assert fact not in told
            told.add(fact)


def test_a_second_call_does_nothing_and_says_so(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    command = [sys.executable, str(ROOT / "data" / "demo.py"), str(folder), "--seed", "3", "--scale", "0.2"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert "already there, nothing to do" in said.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_fault_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def burst(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Studio, "photo", burst)
    with pytest.raises(KeyboardInterrupt):
        demo.make(tmp_path / "root", scale=0.02)
    assert list(tmp_path.iterdir()) == []


def test_other_data_are_never_touched(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert demo.main([str(tmp_path)]) == 2
    assert "holds something else than demo data: name a new or an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert demo.main([str(folder), "--seed", "5"]) == 2
    assert "holds other demo data (seed 3 and not 5, scale 0.2 and not 1.0)" in capsys.readouterr().err


def test_missing_photos_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(demo.DemoError, match=r"scikit-image.*pip install scikit-image"):
        demo.make(tmp_path / "root")
    monkeypatch.undo()
    monkeypatch.setitem(demo.PHOTOS, "dodo.png", "a dodo")
    with pytest.raises(demo.DemoError, match=r"has no dodo\.png"):
        demo.make(tmp_path / "root")
