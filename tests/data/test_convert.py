"""The publishers' formats become the schema; nothing is overwritten or left half-written."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data import records
from data.convert import CONVERTERS, in_front, write, write_pictures
from data.records import RecordError, pairs


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]


def converted(kind: str, source: Any, tmp_path: Path, prefix: str = "pictures/") -> list[dict[str, Any]]:
    (tmp_path / "source.json").write_text(json.dumps(source))
    return list(CONVERTERS[kind](tmp_path / "source.json", prefix))


@pytest.mark.parametrize("kind", ["llava", "lvis"])
def test_llava_files_get_the_prefix_and_the_placeholder_in_front(kind: str, tmp_path: Path) -> None:
    source = [
        {"id": "1", "image": "coco/a.jpg", "conversations": turns("What is it?\n<image>", "A dog.")},
        {
            "id": "2",
            "image": ["a.jpg", "pictures/b.jpg"],
            "conversations": turns("<image>\n<image>\nTwo?", "Yes."),
        },
        {"id": "3", "model": "gpt", "conversations": turns("Hi, what is <image>?", "A tag.")},
    ]
    assert converted(kind, source, tmp_path) == [
        {"id": "1", "image": "pictures/coco/a.jpg", "conversations": turns("<image>\nWhat is it?", "A dog.")},
        {
            "id": "2",
            "image": ["pictures/a.jpg", "pictures/b.jpg"],
            "conversations": turns("<image>\n<image>\nTwo?", "Yes."),
        },
        {"id": "3", "model": "gpt", "conversations": turns("Hi, what is <image>?", "A tag.")},
    ]


def test_svit_talks_become_records(tmp_path: Path) -> None:
    talk = [{"from": "user", "value": " What? "}, {"from": "gpt", "value": "This."}]
    source = [
        {"image_id": 7, "conversations": [{"topic": "x", "content": talk}, {"content": talk * 2}]},
        {"id": 8, "image": "8.jpg", "conversations": turns("<image>\nA?", "b")},
    ]
    got = converted("svit", source, tmp_path, "svit")
    assert [value["image"] for value in got] == ["svit/7.jpg", "svit/7.jpg", "svit/8.jpg"]
    assert got[0]["conversations"] == turns("<image>\nWhat?", "This.")
    assert got[1]["conversations"] == turns("<image>\nWhat?", "This.", "What?", "This.")
    assert got[2]["conversations"] == turns("<image>\nA?", "b")


def test_lrv_rows_become_records(tmp_path: Path) -> None:
    source = [
        {"image_id": "2344", "question": " Is it? ", "answer": "No.\n", "task": "x"},
        {"image_id": "chart_1.png", "question": "Higher?", "answer": "Yes."},
    ]
    got = converted("lrv", source, tmp_path, "lrv_tune/lrv-vg")
    assert [value["image"] for value in got] == ["lrv_tune/lrv-vg/2344.jpg", "lrv_tune/lrv-vg/chart_1.png"]
    assert got[0]["conversations"] == turns("<image>\nIs it?", "No.")


def test_mimic_it_instructions_become_records(tmp_path: Path) -> None:
    data = {
        "LA_INS_1": {
            "instruction": "What?",
            "answer": "This.",
            "image_ids": ["LA_IMG_1"],
            "rel_ins_ids": ["x"],
        },
        "LA_INS_2": {"instruction": "Both?", "answer": "Yes.", "image_ids": ["a", "b"]},
        "LA_INS_3": {"instruction": "Why?", "answer": "So.", "image_ids": []},
    }
    got = converted("mimic-it", {"meta": {"version": "1"}, "data": data}, tmp_path, "mimicit_tune/LA")
    assert got[0] == {
        "id": "LA_INS_1",
        "image": "mimicit_tune/LA/LA_IMG_1.jpg",
        "conversations": turns("<image>\nWhat?", "This."),
    }
    assert got[1]["image"] == ["mimicit_tune/LA/a.jpg", "mimicit_tune/LA/b.jpg"]
    assert got[1]["conversations"][0]["value"] == "<image>\n<image>\nBoth?"
    assert "image" not in got[2]


def test_mimic_it_pictures_become_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "CHUNK", 10)
    source = {f"IMG_{at}": base64.b64encode(bytes([at]) * 50).decode() for at in range(5)}
    source["IMG_9"] = "data:image/jpeg;base64," + base64.b64encode(b"nine").decode()
    source["IMG_bad"] = "not base64!"
    source["../evil"] = "AAAA"
    source["IMG_nothing"] = ""
    (tmp_path / "images.json").write_text(json.dumps(source))
    lost = ["IMG_bad: not base64", "'../evil': no name of a file", "IMG_nothing: not base64"]
    assert write_pictures(tmp_path / "images.json", tmp_path / "out") == (6, lost)
    assert (tmp_path / "out" / "IMG_3.jpg").read_bytes() == bytes([3]) * 50
    assert (tmp_path / "out" / "IMG_9.jpg").read_bytes() == b"nine"
    assert not (tmp_path / "evil.jpg").exists()
    assert write_pictures(tmp_path / "images.json", tmp_path / "out") == (0, lost)
    assert not (tmp_path / "out" / "IMG_nothing.jpg").exists()


def test_a_picture_that_finds_no_room_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "images.json").write_text('{"IMG": "AAAA"}')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"IMG.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_pictures(tmp_path / "images.json", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("What?\n<image>", "<image>\nWhat?"),
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("<image>", "<image>"),
        ("A <image> and <image>.", "<image>\n<image>\nA  and ."),
        ("no picture ", "no picture "),
    ],
)
def test_placeholders_move_to_the_front(text: str, want: str) -> None:
    assert in_front(text) == want


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    made = [{"id": 1, "image": "ü.jpg"}, {"id": 2}, {"id": 3, "image": "b"}]
    assert write(iter(made), tmp_path / "a.json", tmp_path / "t.json") == (2, 1)
    assert json.loads((tmp_path / "a.json").read_text()) == [made[0], made[2]]
    assert json.loads((tmp_path / "t.json").read_text()) == [made[1]]
    assert write(iter([]), tmp_path / "none.json") == (0, 0)
    assert json.loads((tmp_path / "none.json").read_text()) == []
    with pytest.raises(FileExistsError, match=r"a\.json exists already; nothing is overwritten"):
        write(iter(made), tmp_path / "a.json")

    def broken() -> Iterator[dict[str, Any]]:
        yield {"id": 1}
        raise RecordError("torn")

    with pytest.raises(RecordError):
        write(broken(), tmp_path / "b.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "none.json", "t.json"]


def test_objects_are_read_pair_by_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"a": 1, "ü": {"b": ["}", "ö"]}, "c": "x" * 50, "d": None}
    path = tmp_path / "a.json"
    for chunk in (1, 7, 4096):
        monkeypatch.setattr(records, "CHUNK", chunk)
        for text in (json.dumps(value), json.dumps(value, indent=2, ensure_ascii=False)):
            path.write_text(text, encoding="utf-8")
            assert dict(pairs(path)) == value
    path.write_text('{"a": 1')
    with pytest.raises(RecordError, match=r"a\.json, line 1.*the object is not closed"):
        list(pairs(path))
    path.write_text('{"a": 1} {"b": 2}')
    with pytest.raises(RecordError, match=r"byte 9, record 1: .*more follows its end"):
        list(pairs(path))
    path.write_text("[1]")
    with pytest.raises(RecordError, match=r"expected a JSON object, but it starts with '\['"):
        list(pairs(path))
    path.write_text("[5]")
    with pytest.raises(RecordError, match="expected an object, found a number"):
        list(CONVERTERS["lrv"](path, ""))
