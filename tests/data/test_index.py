"""The index says what encoding says; it is built once, goes on when killed, and follows the file."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import indexing as module
from data.conversation import IGNORED, encode
from data.index import Index, cache_folders, open_index
from data.tokenizer_file import TokenizerFile

from .places import mixed, record, write
from .support import GOLDENS, lines, tokenizer


def conversations() -> list[dict[str, Any]]:
    """The recorded conversations as records with as many pictures as they have placeholders."""
    records = []
    for line in lines("sample"):
        if line["version"] != "plain":
            count = sum(turn["value"].count("<image>") for turn in line["conversations"])
            image = [f"a/{at} ü.png" for at in range(count)] if line["has_image"] else None
            records.append({"id": line["id"], "image": image, "conversations": line["conversations"]})
    return records


@pytest.mark.parametrize(("template", "folder"), [("phi", "phi2"), ("v1", "llama_legacy")])
def test_rows_are_the_encoded_records(template: str, folder: str, tmp_path: Path) -> None:
    records = conversations()
    tok = tokenizer(folder)
    index = open_index(write(tmp_path, "a.json", records), tok, template)
    faults = {fault.record: fault for fault in index.faults()}
    assert len(index) == len(records)
    assert 5 < len(faults) < len(records) / 5
    for number, value in enumerate(records):
        if number in faults:
            assert index.columns["images"][number] == -1
            assert faults[number].id == value["id"]
            continue
        row = index.row(number)
        want = encode(value["conversations"], tok, template, bool(value["image"]))
        assert row.input_ids.tolist() == want.input_ids
        assert row.labels.tolist() == [IGNORED if label == -200 else label for label in want.labels]
        assert row.ends == want.turn_ends
        assert row.images == (value["image"] or [])
        head = int(index.columns["head"][number])
        assert (row.labels[:head] == IGNORED).all()
        assert row.labels[head] != IGNORED
        assert index.columns["head_images"][number] == (row.input_ids[:head] == -200).sum()


FAULTS = [
    ("words", "the record is a text, not an object"),
    ({"id": 7}, "the record has no list of 'conversations', only 'id'"),
    ({"conversations": ["hi"]}, "a turn is not an object with 'from' and 'value'"),
    ({**record("<image>\nA?", "b"), "video": "a.mp4"}, "the record has a 'video', and only pictures"),
    ({**record("<image>\nA?", "b"), "image": 5}, "'image' must be a path or a list of paths"),
    (record("<image>\n<image>\nA?", "b", image="a.png"), "2 <image> placeholders for 1 pictures"),
    (record("A?", "b", image="a.png"), "0 <image> placeholders for 1 pictures"),
    (record("A?", ""), "no answer to learn from"),
    (record("A?"), "no answer to learn from"),
    ({"conversations": []}, "the conversation is empty"),
    ({"conversations": [{"from": "human", "value": 3}]}, "turn 1 needs 'from' and a text"),
]


def test_each_fault_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", [record("Ok?", "yes"), *(value for value, _ in FAULTS)])
    index = open_index(path, tokenizer("phi2"), "phi")
    found = list(index.faults())
    assert [fault.record for fault in found] == list(range(1, len(FAULTS) + 1))
    for fault, (_, words) in zip(found, FAULTS, strict=True):
        assert words in fault.why
    assert len(index.row(3).input_ids) == 0


def test_it_is_shared_until_content_template_or_tokenizer_change(tmp_path: Path) -> None:
    mixed(tmp_path, 6)
    path = tmp_path / "mixed.json"
    first = open_index(path, tokenizer("phi2"), "phi")
    assert open_index(path, tokenizer("phi2"), "phi").folder == first.folder
    os.utime(path, (1, 1))
    assert open_index(path, tokenizer("phi2"), "phi").folder == first.folder  # touched, not changed
    others = [
        open_index(path, tokenizer("phi2"), "v1").folder,
        open_index(path, tokenizer("qwen1_5"), "qwen").folder,
        open_index(write(tmp_path, "mixed.json", [record("New?", "yes")]), tokenizer("phi2"), "phi").folder,
    ]
    assert len({first.folder, *others}) == 4


def test_a_killed_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MARK", 4)
    records = mixed(tmp_path, 30)
    records[9] = "broken"  # type: ignore[call-overload]
    path = write(tmp_path, "mixed.json", records)
    tok = tokenizer("llama_legacy")

    class Killed(Exception):
        pass

    read: list[int] = []

    def progress(done: int, size: int) -> None:
        read.append(done)
        if len(read) == 3:
            raise Killed

    with pytest.raises(Killed):
        open_index(path, tok, "v1", progress)
    part = next(cache_folders(path)[0].glob("*.part"))
    assert json.loads((part / "mark.json").read_text())["records"] == 12
    with (part / "tokens.bin").open("ab") as file:
        file.write(b"half a write")
    resumed = open_index(path, tok, "v1", lambda done, size: read.append(done))
    assert read[3] > read[2]
    assert not part.exists()
    whole = open_index(write(tmp_path, "again.json", records), tok, "v1")
    for name in (*(f"{name}.col" for name in module.COLUMNS), "tokens.bin", "spans.bin", "paths.bin"):
        assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    assert [fault.record for fault in resumed.faults()] == [9]


def test_a_mark_without_its_bytes_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MARK", 4)
    mixed(tmp_path, 12)
    path = tmp_path / "mixed.json"

    def stop(done: int, size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_index(path, tokenizer("phi2"), "phi", stop)
    part = next(cache_folders(path)[0].glob("*.part"))
    (part / "tokens.bin").write_bytes(b"")
    assert open_index(path, tokenizer("phi2"), "phi").row(0).ends


def _open(path: str, queue: Any) -> None:
    phi = TokenizerFile(GOLDENS / "tokenizers" / "phi2")
    index = open_index(Path(path), phi, "phi", lambda done, size: queue.put("built"))
    queue.put(len(index))


def test_processes_that_start_together_build_it_once(tmp_path: Path) -> None:
    mixed(tmp_path, 50)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_open, args=(str(tmp_path / "mixed.json"), queue)) for _ in range(2)]
    for process in processes:
        process.start()
    told = [queue.get(timeout=120) for _ in range(3)]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert sorted(map(str, told)) == ["50", "50", "built"]


def test_read_only_data_are_indexed_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    mixed(root, 3)
    (root / ".index").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index = open_index(root / "mixed.json", tokenizer("phi2"), "phi")
    assert index.folder.parent == tmp_path / "cache" / "moe-vlm" / "index"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="no place to write its index; set XDG_CACHE_HOME"):
        open_index(root / "mixed.json", tokenizer("phi2"), "phi")


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    class Wide:
        """A tokenizer with one id more than two bytes hold."""

        def __getattr__(self, key: str) -> Any:
            return getattr(tokenizer("phi2"), key)

        def get_vocab(self) -> dict[str, int]:
            return {"far": 70_000}

    records = mixed(tmp_path, 5)
    index = open_index(tmp_path / "mixed.json", Wide(), "phi")
    assert index.meta["token_type"] == "<i4"
    want = encode(records[0]["conversations"], tokenizer("phi2"), "phi").input_ids
    assert index.row(0).input_ids.tolist() == want
    assert index.row(0).input_ids.dtype == np.int64


def test_records_are_found_again_in_their_file(tmp_path: Path) -> None:
    from data.records import read

    records = mixed(tmp_path, 20)
    index = open_index(tmp_path / "mixed.json", tokenizer("phi2"), "phi")
    for number in random.Random(0).sample(range(20), 5):
        start, end = (int(index.columns[key][number]) for key in ("start", "end"))
        assert read(tmp_path / "mixed.json", start, end) == records[number]
    assert Index(index.folder, tmp_path / "mixed.json").meta["records"] == 20
