"""The demo data: the reference's layout, true and even answers, held-out scenes that no training file has."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data import demo, scenes, studio

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
                assert max(picture.size) == scenes.SIDE
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
    drawn: dict[str, set[scenes.Scene]] = {"held_out": set(), "train": set()}
    draw, save = scenes.Scene.draw, studio.Studio.save
    last: list[scenes.Scene] = []

    def remember(scene: scenes.Scene, rng: random.Random) -> Image.Image:
        last.append(scene)
        return draw(scene, rng)

    def sort(maker: studio.Studio, picture: Image.Image, path: str) -> str:
        if last:  # a photo is no scene
            drawn["held_out" if path.startswith("held_out/") else "train"].add(last.pop())
        return save(maker, picture, path)

    monkeypatch.setattr(scenes.Scene, "draw", remember)
    monkeypatch.setattr(studio.Studio, "save", sort)
    demo.make(tmp_path / "root", seed=0)
    assert len(drawn["held_out"]) == len(rows(tmp_path / "root", "held_out.json")) == 300
    assert len(drawn["train"]) > 2000
    assert not drawn["held_out"] & drawn["train"]


def test_the_answers_of_a_kind_are_even() -> None:
    rng = random.Random(0)
    for kind, chances in {"color": 6, "shape": 4, "place": 9, "count": 3, "exists": 2}.items():
        answers = Counter[str]()
        while answers.total() < 1800:
            scene = scenes.sample_scene(rng)
            if kind != "place" or scene.alone():
                answers[scene.ask(kind, rng.choice(scene.alone() or scene.items), rng)[1]] += 1
        assert len(answers) == chances
        assert answers.most_common(1)[0][1] < 1800 / chances * 1.2


def test_held_out_asks_each_kind_as_often_and_names_it(folder: Path) -> None:
    heads = {"color": "What color", "shape": "What shape", "place": "Where is", "count": "How many"}
    asked = Counter[str]()
    for row in rows(folder, "held_out.json"):
        question = row["conversations"][0]["value"].removeprefix("<image>\n")
        assert question.startswith(heads.get(row["dataset"], "Is there"))
        asked[row["dataset"]] += 1
    assert asked == dict.fromkeys(scenes.KINDS, 12)


def test_the_answers_are_what_was_drawn() -> None:
    """The pixel in the middle of an item has the color that the answer names, and no color is elsewhere."""
    rng = random.Random(0)
    for _ in range(200):
        scene = scenes.sample_scene(rng)
        picture = scene.draw(rng)
        middles = {
            place: picture.getpixel((32 * x + 16, 32 * y + 16)) for place, (x, y) in scenes.PLACES.items()
        }
        for item in scene.items:
            place, shape, color = item
            assert middles.pop(place) == scenes.COLORS[color]
            question, answer = scene.ask("color", item, rng)
            assert answer == color
            named = question.removesuffix("?").split()[-1]
            assert named == (shape if item in scene.alone() else scenes.PLURALS[shape])
            assert scene.ask("shape", item, rng) == (f"What shape is {color}?", shape)
            assert scene.ask("place", item, rng)[1] == place
            assert f"{color} {shape} at the {place}" in scene.caption()
        assert set(middles.values()) <= set(scenes.PAPERS)
        assert scene.ask("count", scene.items[0], rng)[1] == scenes.NUMBERS[len(scene.items)]
        question, answer = scene.ask("exists", scene.items[0], rng)
        words = set(question.removesuffix("?").split())
        assert answer == ("yes" if any(words & {*item[1:]} for item in scene.items) else "no")


def test_a_shape_and_a_color_name_the_same_items() -> None:
    rng = random.Random(2)
    looks = Counter[int]()
    for _ in range(300):
        items = scenes.sample_scene(rng).items
        assert len({place for place, _, _ in items}) == len(items)
        pairs = {item[1:] for item in items}
        assert len({shape for shape, _ in pairs}) == len({color for _, color in pairs}) == len(pairs)
        looks[len(pairs)] += 1
    assert looks[1] > looks[2] > 60


def test_each_shape_covers_its_own_pixels() -> None:
    masks = set()
    for shape in scenes.SHAPES:
        picture = scenes.Scene((("center", shape, "red"),)).draw(random.Random(5))
        cell = picture.crop((32, 32, 64, 64))
        masks.add(tuple(pixel in scenes.PAPERS for pixel in cell.get_flattened_data()))
    assert len(masks) == len(scenes.SHAPES)


def test_a_conversation_never_tells_what_it_asks_later() -> None:
    rng = random.Random(1)
    for _ in range(500):
        told: set[tuple[str, str]] = set()
        turns = scenes.sample_scene(rng).conversation(rng)
        assert turns
        for question, answer in turns:
            head = question.split()[0]
            if head == "How":
                assert not any(kind == "place" for kind, _ in told)  # else the places told were counted
                continue
            words = {word.strip("?") for word in question.replace("crosses", "cross").split()}
            words |= {word.removesuffix("s") for word in words}
            names = words & {*scenes.SHAPES, *scenes.COLORS} | ({answer} if head == "What" else set())
            facts = {("place" if head == "Where" else "look", name) for name in names}
            if answer != "no":
                assert not facts & told
                told |= facts


def test_a_second_call_does_nothing_and_says_so(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    command = [sys.executable, str(ROOT / "data" / "demo.py"), str(folder), "--seed", "3", "--scale", "0.2"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert "already there, nothing to do" in said.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_fault_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def burst(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(studio.Studio, "photo", burst)
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
    monkeypatch.setattr(studio, "find_spec", lambda name: None)
    with pytest.raises(studio.DemoError, match=r"scikit-image.*pip install scikit-image"):
        demo.make(tmp_path / "root")
    monkeypatch.undo()
    monkeypatch.setitem(studio.PHOTOS, "dodo.png", "a dodo")
    with pytest.raises(studio.DemoError, match=r"has no dodo\.png"):
        demo.make(tmp_path / "root")


@pytest.mark.parametrize("scale", ["nan", "inf", "-1", "0", "much", "1001"])
def test_a_scale_that_no_number_of_samples_has_is_told(
    scale: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        demo.main([str(tmp_path / "root"), f"--scale={scale}"])
    assert end.value.code == 2
    assert f"expected a number above 0, at most 1000, got '{scale}'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
