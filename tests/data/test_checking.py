"""Every planted defect is found, none is invented, and what --fix writes loses nothing."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import images, report
from data.catalog import resolve
from data.checking import Options, Report, check
from data.findings import KINDS
from data.repair import fix, repair

from .places import mixed, picture, record, write
from .support import tokenizer

OPTIONS = Options(tokenizer=tokenizer("llama_legacy"), template="v1", max_length=400, patches=4, workers=2)


def run(root: Path, name: str = "mixed.json", options: Options = OPTIONS) -> Report:
    return check(root, [dataset for dataset, _ in resolve(name)], options, lambda *_: None)


def found(result: Report) -> Counter[tuple[str, int]]:
    return Counter((finding.kind, finding.record) for finding in result.findings)


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()


def plant_pictures(root: Path) -> dict[str, list[str]]:
    """Pictures with a defect each, by kind."""
    folder = root / "odd"
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "half.jpg").write_bytes(jpeg(noise)[:600])
    Image.new("L", (3000, 3000)).save(folder / "giant.png")
    frames = [Image.fromarray(np.full((9, 9, 3), 200 * at, np.uint8)) for at in range(2)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (9, 9)).save(folder / "print.jpg")
    (folder / "turned.jpg").write_bytes(jpeg(noise, exif=exif))
    Image.new("RGBA", (9, 9), (1, 2, 3, 4)).save(folder / "clear.png")
    Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (300, 5)).save(folder / "thin.png")
    noise.save(folder / "png.jpg", "PNG")
    (folder / "there.PNG").write_bytes((folder / "clear.png").read_bytes())
    return {
        "image-missing": ["odd/none.jpg"],
        "image-empty": ["odd/empty.jpg"],
        "image-unreadable": ["odd/page.jpg"],
        "image-damaged": ["odd/half.jpg"],
        "image-giant": ["odd/giant.png"],
        "image-animated": ["odd/moving.gif"],
        "image-cmyk": ["odd/print.jpg"],
        "image-rotated": ["odd/turned.jpg"],
        "image-transparent": ["odd/clear.png"],
        "image-sixteen-bit": ["odd/deep.png"],
        "image-thin": ["odd/thin.png"],
        "image-misnamed": ["odd/png.jpg"],
        "image-outside": ["../secret.png"],
    }


def planted(root: Path) -> tuple[list[Any], Counter[tuple[str, int]]]:
    """Sound records with a defective one of each kind among them."""
    good = picture(root, 1)
    talk = "<image>\nWhat is it?"
    defective: dict[str, Any] = {
        "record-type": "only a text",
        "no-conversations": {"id": "none"},
        "empty-conversation": {"id": "empty", "conversations": []},
        "turn-malformed": {"id": "bent", "conversations": [{"from": "human"}]},
        "role-unknown": {
            "conversations": [{"from": "User", "value": "Hi?"}, {"from": "assistant", "value": "Yo"}]
        },
        "role-order": {
            "conversations": [{"from": "human", "value": "Hi?"}] * 2 + [{"from": "gpt", "value": "Yo"}]
        },
        "leading-answer": {
            "conversations": [{"from": "gpt", "value": "Hello"}, *record("Who?", "Me.")["conversations"]]
        },
        "trailing-question": record("Which way?", "Left.", "And then?"),
        "no-answer": record("Is anyone there?", "  "),
        "empty-answer": record("First?", "", "Second?", "Yes."),
        "empty-question": record("", "I speak unasked."),
        "blank-edge": record("Spaces?", " Here. "),
        "video": {**record("<image>\nA film?", "Yes."), "video": "a.mp4"},
        "image-field": {**record("<image>\nA field?", "Yes."), "image": {"path": good}},
        "placeholder-missing": record("What is shown?", "A dot.", image=good),
        "placeholder-count": record("<image>\n<image>\nBoth?", "No.", image=good),
        "placeholder-in-answer": record("Where is it?", "Here: <image>", image=good),
        "placeholder-as-text": record("What does <image> mean?", "A picture."),
        "too-many-images": record("<image> " * 17 + "?", "Many.", image=[good] * 17),
        "separator-in-text": record("What is </s>?", "An end."),
        "special-in-text": record("What is <unk>?", "A gap."),
        "role-in-text": record("Say it", "USER: no"),
        "control-character": record("A bell?", "Ring \x07 ring"),
        "over-long": record("Short?", "Yes.", "Long?", "very " * 300 + "long."),
        "question-too-long": record("why " * 400, "Because."),
    }
    pictures = plant_pictures(root)
    defective |= {kind: record(talk, f"It is {kind}.", image=path) for kind, path in pictures.items()}
    records: list[Any] = []
    expected: Counter[tuple[str, int]] = Counter()
    for number, (kind, value) in enumerate(defective.items()):
        records.append(record(f"Is record {number} sound?", "It is."))
        if isinstance(value, dict) and "id" not in value:
            value["id"] = f"planted {kind}"
        expected[(kind, len(records))] += 1
        records.append(value)
    twin = record("Is this the same?", "It is.", id="twin")
    records += [twin, {**record("Another?", "Yes."), "id": "twin"}, {**twin, "id": "other"}]
    expected[("duplicate-id", len(records) - 2)] += 1
    expected[("duplicate-record", len(records) - 1)] += 1
    return records, expected


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(images, "MOST_PIXELS", 2_000_000)
    return tmp_path


def test_all_planted_defects_are_found_and_none_is_invented(root: Path) -> None:
    records, expected = planted(root)
    write(root, "planted.json", records)
    result = run(root, "planted.json")
    assert found(result) == expected
    assert len(expected) >= 40
    assert result.lost == sum(KINDS[kind].lost for kind, _ in expected)
    for finding in result.findings:
        assert finding.file == str(root / "planted.json")
        assert KINDS[finding.kind].way_out


def test_all_kinds_are_planted_somewhere(root: Path) -> None:
    kinds = {kind for kind, _ in planted(root)[1]}
    elsewhere = {"file-missing", "file-torn", "file-empty", "rows", "plain-turns", "encoding", "field-twice"}
    elsewhere |= {"image-forbidden"}
    assert kinds | elsewhere == set(KINDS)


def test_sound_data_have_no_findings(root: Path) -> None:
    mixed(root, 30)
    result = run(root)
    assert not result.findings
    file = result.files[0]
    assert (file.records, file.with_pictures, file.pictures, file.turns) == (30, 20, 20, 60)
    assert 0 < file.supervised < file.tokens
    assert len(result.lengths) == 30
    assert sum(result.sides.values()) == 20


def test_files_are_judged_too(root: Path) -> None:
    (root / "torn.json").write_text('[{"id": 1, "conversations": []}, {"id"')
    result = run(root, "torn.json")
    assert [finding.kind for finding in result.findings] == ["empty-conversation", "file-torn"]
    assert "record 1: not valid JSON" in list(result.findings)[1].detail
    assert [finding.kind for finding in run(root, "none.json").findings] == ["file-missing"]
    write(root, "empty.json", [])
    assert [finding.kind for finding in run(root, "empty.json").findings] == ["file-empty"]
    write(root, "nlp_tune.json", [record("A?", "B.")])
    kinds = [(finding.kind, finding.detail) for finding in run(root, "nlp").findings]
    assert kinds == [("rows", "1 records, the catalog says 40,688")]


def test_a_picture_that_may_not_be_read_is_told_and_kept(request: pytest.FixtureRequest) -> None:
    root = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folders are its user's alone
    request.addfinalizer(lambda: shutil.rmtree(root))
    records = [record("<image>\nWhat?", " A dot. ", image=f"{name}/1.png", id=name) for name in "abc"]
    for name in "abc":
        (root / name).mkdir()
        Image.new("RGB", (8, 8)).save(root / name / "1.png")
    write(root, "some.json", records)
    root.chmod(0o755)
    (root / "a" / "1.png").chmod(0)
    (root / "b").chmod(0)
    if os.geteuid() == 0:  # who may read everything
        request.addfinalizer(lambda: os.seteuid(0))
        os.seteuid(65534)
    result = run(root, "some.json")
    if os.getuid() == 0:
        os.seteuid(0)
    want = {("image-forbidden", 0), ("image-forbidden", 1), *(("blank-edge", at) for at in range(3))}
    assert set(found(result)) == want
    assert fix(result, root / "some.json", root / "fixed.json")["written"] == 3
    (root / "b").chmod(0o755)


def test_a_field_that_stands_twice_is_told(root: Path) -> None:
    sound, again = (json.dumps(record(text, "Yes.", id=text)) for text in ("One?", "Two?"))
    twice = again.replace('"conversations": ', '"conversations": [], "conversations": ')
    nested = twice.replace('"value": ', '"value": "lost", "value": ')
    (root / "twice.json").write_text(f"[{sound}, {twice}, {sound.replace('One', 'More')}, {nested}]")
    told = [finding for finding in run(root, "twice.json").findings if finding.kind != "duplicate-id"]
    assert [tuple(finding[2:]) for finding in told if finding.kind == "field-twice"] == [
        (1, "Two?", "conversations"),
        (3, "Two?", "conversations, value"),
    ]
    assert {finding.kind for finding in told} == {"field-twice", "duplicate-record"}


def test_half_a_character_stops_neither_check_nor_fix(root: Path) -> None:
    half = {**record("Half?", " Yes. "), "id": "\ud800"}
    (root / "half.json").write_text(json.dumps([half, record("<\ud800?", "No.", id="\ud801")]))
    result = run(root, "half.json")
    assert [finding.kind for finding in result.findings] == ["blank-edge", "turn-malformed"]
    report.write(result, root / "told")
    fix(result, root / "half.json", root / "fixed.json")
    (kept,) = json.loads((root / "fixed.json").read_text())
    assert kept == {**half, "conversations": record("Half?", "Yes.")["conversations"]}


def test_a_shared_broken_picture_is_told_for_each_record(root: Path) -> None:
    records = [record(f"<image>\nWhich {at}?", "None.", image="a/none.png", id=str(at)) for at in range(5)]
    (root / "a").mkdir()
    (root / "a" / "NONE.jpg").touch()
    write(root, "shared.json", records)
    result = run(root, "shared.json")
    assert found(result) == Counter({("image-missing", at): 1 for at in range(5)})
    assert next(iter(result.findings)).detail == "a/none.png (but NONE.jpg is there)"
    assert result.files[0].pictures == 1


def test_captions_are_checked_as_captions(root: Path) -> None:
    good = picture(root, 1)
    records = [
        record("Describe it. <image>", "a red dot", image=good),
        record("Describe it.", "a blue dot", image=good),
        record("<image>\nA?", "B", "C?", "D", image=good),
        record("<image>\nA?", "", image=good),
        record("<image>\n<image>", "two dots", image=[good, good]),
    ]
    write(root, "captions.json", records)
    options = Options(tokenizer=tokenizer("llama_legacy"), template="plain", patches=4)
    assert found(run(root, "captions.json", options)) == Counter(
        {
            ("placeholder-missing", 1): 1,
            ("plain-turns", 2): 1,
            ("no-answer", 3): 1,
            ("placeholder-count", 4): 1,
        }
    )


def test_without_a_tokenizer_texts_and_pictures_are_still_checked(root: Path) -> None:
    records, expected = planted(root)
    write(root, "planted.json", records)
    result = run(root, "planted.json", Options(template="v1"))
    lengths = {"over-long", "question-too-long", "special-in-text"}
    assert found(result) == Counter({key: n for key, n in expected.items() if key[0] not in lengths})
    unseen = run(root, "planted.json", Options(template="v1", pictures=False))
    assert not any(kind.startswith("image-") and kind != "image-field" for kind, _ in found(unseen))


def test_fix_writes_a_file_that_loses_nothing(root: Path) -> None:
    records, _ = planted(root)
    path = write(root, "planted.json", records)
    before = path.read_bytes()
    result = run(root, "planted.json")
    done = fix(result, path, root / "fixed.json")
    assert path.read_bytes() == before
    again = run(root, "fixed.json")
    assert again.lost == 0
    assert done["written"] == len(json.loads((root / "fixed.json").read_text()))
    assert done["dropped"] + done["written"] == len(records)
    assert done["dropped"] == 16
    for what in (
        "renamed roles",
        "removed a leading answer",
        "removed a trailing question",
        "removed a round without an answer",
        "stripped an answer",
        "put <image> in front",
    ):
        assert done[what] == 1, what
    with pytest.raises(FileExistsError, match="exists already; nothing is overwritten"):
        fix(result, path, root / "fixed.json")


def test_a_round_that_shows_the_picture_is_not_removed() -> None:
    from data.conversation import TEMPLATES

    shown = record("<image>\nA?", "", "B?", "yes", image="x.png")
    assert repair(shown, ["empty-answer"], TEMPLATES["v1"])[0] == shown


def test_the_report_holds_all_of_it(root: Path) -> None:
    records, expected = planted(root)
    mixed(root, 20)
    write(root, "planted.json", records)
    result = check(
        root,
        [dataset for dataset, _ in resolve({"mixed.json": 1, "planted.json": 1})],
        OPTIONS,
        lambda *_: None,
    )
    facts = report.write(result, root / "out")
    told = json.loads((root / "out" / "check.json").read_text())
    findings = told.pop("findings")
    assert told == json.loads(json.dumps(facts))
    assert [tuple(finding.values()) for finding in findings] == list(result.findings)
    assert len(findings) == sum(expected.values()) == sum(told["found"].values())
    assert sum(told["lengths"].values()) == len(result.lengths)
    assert 0 < told["supervised_share"] < 1
    assert told["filled_slots"]["group_by: length"] > told["filled_slots"]["random, 8 a batch"]
    page = (root / "out" / "check.html").read_text()
    assert "data:image/jpeg;base64," in page
    assert page.count("<rect") > 10
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "the picture is not there" in page
    text = report.as_text(result, facts)
    assert "LOST  image-missing: the picture is not there (1)" in text
    assert (
        "planted.json, record 51 (id planted image-missing)" not in text
    )  # pictures are told without their id
    assert f"{result.lost:,} lost" in text
    assert "note  duplicate-id" in text


def test_a_long_list_is_cut_on_the_terminal_only(root: Path) -> None:
    write(root, "bad.json", [record(f"A{at}?", "") for at in range(9)])
    result = run(root, "bad.json")
    facts = report.as_json(result)
    assert "and 4 more" in report.as_text(result, facts)
    assert facts["found"] == {"no-answer": 9}
