"""One global stream: no sample lost or taken twice, whatever the ranks, resumes and faults."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data.images import ImageFormat
from data.loader import DataError, Loader, held_out, texts
from data.spec import DataSpec

from .places import FORMAT, PATCHES, mixed, number_of, picture, record, write
from .support import fresh_tokenizer, tokenizer

TOK = "llama_legacy"


def spec(root: Path, /, **changes: Any) -> DataSpec:
    base = DataSpec(root=str(root), mix="mixed.json", template="v1", max_length=512, workers=2)
    return dataclasses.replace(base, **changes)


def loader(
    given: DataSpec,
    *,
    micro: int = 2,
    accumulation: int = 2,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    image: ImageFormat = FORMAT,
    replaced: Path | None = None,
) -> Loader:
    return Loader(
        given,
        tokenizer(TOK),
        image,
        PATCHES,
        micro_batch=micro,
        accumulation=accumulation,
        rank=rank,
        world=world,
        seed=seed,
        replaced=replaced,
    )


def numbers(batch: dict[str, torch.Tensor]) -> list[int]:
    """Which samples a micro-batch holds, by their answers; each picture must be its sample's."""
    found, images = [], iter(batch["pixel_values"])
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        told = tokenizer(TOK).decode([label for label in labels.tolist() if label >= 0])
        match = re.search(r"Number (\d+)\.", told)
        assert match, told
        found.append(int(match[1]))
        for _ in range(int((ids == -200).sum())):
            assert number_of(next(images)) == found[-1]
    assert next(images, None) is None
    return found


def take(source: Loader | Iterator[Any], steps: int) -> list[list[list[int]]]:
    """Steps as micro-batches of sample numbers."""
    iterator = source.steps() if isinstance(source, Loader) else source
    return [[numbers(batch) for batch in step] for step in itertools.islice(iterator, steps)]


def flat(steps: Any) -> list[int]:
    return [number for step in steps for batch in step for number in batch]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    mixed(tmp_path, 40)
    return tmp_path


@pytest.mark.parametrize("group_by", ["none", "length", "modality"])
def test_each_epoch_takes_each_sample_once(group_by: Any, root: Path) -> None:
    got = loader(spec(root, group_by=group_by), micro=3, accumulation=2, world=1)  # 6 does not divide 40
    assert got.samples == 40
    stream = flat(take(got, 20))
    got.close()
    for epoch in range(3):
        assert sorted(stream[epoch * 40 : (epoch + 1) * 40]) == list(range(40))
    assert stream[:40] != stream[40:80]


@pytest.mark.parametrize("group_by", ["none", "length", "modality"])
def test_ranks_take_slices_of_one_stream(group_by: Any, root: Path) -> None:
    given = spec(root, group_by=group_by)
    want = [Counter(flat([step])) for step in take(loader(given, micro=2, accumulation=6), 12)]
    for world, micro, accumulation in ((2, 2, 3), (3, 2, 2), (4, 3, 1), (6, 1, 2)):
        parts = [
            take(loader(given, micro=micro, accumulation=accumulation, rank=rank, world=world), 12)
            for rank in range(world)
        ]
        for step in range(12):
            assert all(len(part[step]) == accumulation for part in parts)
            assert Counter(flat([part[step] for part in parts])) == want[step]


def test_modality_groups_follow_the_reference_within_an_epoch(root: Path) -> None:
    steps = take(loader(spec(root), micro=2, accumulation=2), 9)
    kinds = [{number % 3 == 2 for number in flat([step])} for step in steps]
    assert all(len(kind) == 1 for kind in kinds[:8])
    assert {True} in kinds
    assert {False} in kinds


def test_length_groups_leave_the_least_padding(root: Path) -> None:
    padding = {}
    for group_by in ("none", "length", "modality"):
        got = loader(spec(root, group_by=group_by), micro=4, accumulation=1)
        take(got, 10)
        padding[group_by] = got.report()["padding"]
    assert padding["length"] < 0.4 * padding["modality"]
    assert padding["length"] < 0.4 * padding["none"]


@pytest.mark.parametrize("group_by", ["none", "modality"])
def test_a_stream_resumes_at_any_point(group_by: Any, root: Path) -> None:
    mixed(root, 7, "more.json", start=100)
    given = spec(root, mix={"mixed.json": 1.5, "more.json": 2.0}, group_by=group_by, workers=1)
    first = loader(given, micro=2, accumulation=3)
    steps, whole, states = first.steps(), [], [json.dumps(first.state_dict())]
    for _ in range(64):
        whole += take(steps, 1)
        states.append(json.dumps(first.state_dict()))  # what is loaded ahead must not count
    first.close()
    assert max(map(len, states)) < 1000
    for point in random.Random(0).sample(range(60), 25):  # of two orders: 50 in all
        second = loader(given, micro=2, accumulation=3)
        second.load_state_dict(json.loads(states[point]))
        assert take(second, 4) == whole[point : point + 4]
        second.close()


def test_a_stream_goes_on_over_other_ranks(root: Path) -> None:
    given = spec(root, mix={"mixed.json": 1.5})
    want = [Counter(flat([step])) for step in take(loader(given, micro=1, accumulation=12), 15)]
    state: dict[str, Any] = {}
    step = 0
    for world, micro, accumulation in ((2, 3, 2), (3, 2, 2), (4, 1, 3)):
        parts = []
        for rank in range(world):
            own = loader(given, micro=micro, accumulation=accumulation, rank=rank, world=world)
            if state:
                own.load_state_dict(state)
            parts.append(take(own, 5))
            last = own.state_dict()
        for turn in range(5):
            assert Counter(flat([part[turn] for part in parts])) == want[step + turn]
        state, step = last, step + 5


def test_weights_say_how_often_a_sample_comes(root: Path) -> None:
    mixed(root, 10, "more.json", start=100)
    given = spec(root, mix={"mixed.json": 0.5, "more.json": 2.3}, group_by="none")
    got = loader(given, micro=1, accumulation=1)
    assert got.samples == 20 + 23
    stream = flat(take(got, 43 * 4))
    for epoch in range(4):
        part = stream[epoch * 43 : (epoch + 1) * 43]
        assert sum(number < 100 for number in part) == 20
        counts = Counter(number for number in part if number >= 100)
        assert set(counts.values()) <= {2, 3}
        assert len(counts) == 10
    # Half of the samples an epoch, the other half in the next.
    assert sorted(number for number in stream[:86] if number < 100) == list(range(40))
    assert got.report()["sources"] == {"mixed.json": 20, "more.json": 23}


def test_the_seed_decides_the_stream(root: Path) -> None:
    first = take(loader(spec(root)), 5)
    assert take(loader(spec(root)), 5) == first
    assert take(loader(spec(root, workers=0)), 5) == first
    assert take(loader(spec(root), seed=1), 5) != first


def test_a_mix_smaller_than_a_step_wraps_over_epochs(tmp_path: Path) -> None:
    mixed(tmp_path, 5)
    stream = flat(take(loader(spec(tmp_path), micro=4, accumulation=3), 5))
    for epoch in range(12):
        assert sorted(stream[epoch * 5 : epoch * 5 + 5]) == list(range(5))


def test_a_state_of_another_stream_is_refused(root: Path) -> None:
    state = loader(spec(root)).state_dict()
    (root / "again").mkdir()
    mixed(root / "again", 41)
    (root / "again" / "mixed.json").write_text(
        json.dumps(json.loads((root / "again" / "mixed.json").read_text())[1:])
    )
    for other, words in (
        (loader(spec(root / "again")), "has data "),
        (loader(spec(root, group_by="none")), "group_by modality, this run has none"),
        (loader(spec(root), seed=3), "seed 0, this run has 3"),
        (loader(spec(root), micro=1), "step_samples 4, this run has 2"),
        (loader(spec(root, mix={"mixed.json": 0.5})), "epoch_samples 40, this run has 20"),
    ):
        with pytest.raises(DataError, match=words):
            other.load_state_dict(state)


def test_batches_have_the_agreed_form(root: Path) -> None:
    batch = next(loader(spec(root, group_by="none")).steps())[0]
    assert {key: (value.dtype, value.dim()) for key, value in batch.items()} == {
        "input_ids": (torch.int64, 2),
        "labels": (torch.int64, 2),
        "attention_mask": (torch.bool, 2),
        "pixel_values": (torch.uint8, 4),
    }
    assert (batch["input_ids"][~batch["attention_mask"]] == tokenizer(TOK).pad_token_id).all()
    assert (batch["labels"][~batch["attention_mask"]] == -100).all()
    assert batch["pixel_values"].shape[1:] == (3, 8, 8)
    assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
    texts_only = write(root, "text.json", [record("A?", "Number 2."), record("B?", "Number 5.")])
    batch = next(loader(spec(root, mix=str(texts_only))).steps())[0]
    assert batch["pixel_values"].shape == (0, 3, 8, 8)


def test_a_broken_picture_is_replaced_by_its_like(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "pictures" / "00004.png").write_bytes(b"broken")
    (root / "pictures" / "00012.png").unlink()
    given = spec(root, bad_samples=2)
    with caplog.at_level(logging.WARNING):
        got = loader(given)
        stream = flat(take(got, 10))
    assert 4 not in stream
    assert 12 not in stream
    assert sum(number % 3 == 2 for number in stream) == 13  # text-only ones stay what they were
    assert len(stream) == 40
    replaced = got.report()["replaced"]
    assert len(replaced) == got.report()["replaced_count"] == 2
    assert "mixed.json, record 4 (id 4): " in " ".join(replaced)
    assert "00012.png: there is no such file" in " ".join(replaced)
    assert sum("replaced a sample: " in message for message in caplog.messages) == 2
    for workers in (0, 3):
        assert flat(take(loader(dataclasses.replace(given, workers=workers)), 10)) == stream
    assert got.state_dict()["replaced"] == 2
    got = loader(given)
    got.load_state_dict({**got.state_dict(), "step": 10, "replaced": 2})
    with pytest.raises(DataError, match=r"3 samples cannot be used, and data\.bad_samples allows 2"):
        take(got, 10)


def test_what_is_replaced_is_counted_over_ranks_and_attempts(root: Path) -> None:
    for at in (4, 12, 27):
        (root / "pictures" / f"{at:05d}.png").write_bytes(b"broken")
    given, notes = spec(root, bad_samples=9, group_by="none"), root / "notes"
    alone = loader(given, micro=4)
    take(alone, 10)
    want = alone.report()["replaced_count"]
    assert want >= 3

    def rank(number: int, world: int, **changes: Any) -> Loader:
        asked = dataclasses.replace(given, **changes)
        return loader(asked, micro=4 // world, rank=number, world=world, replaced=notes)

    both = [rank(0, 2), rank(1, 2)]
    for got in both:
        take(got, 10)
    for got in both:
        assert got.report()["replaced_count"] == got.state_dict()["replaced"] == want
        assert sorted(got.report()["replaced"]) == sorted(alone.report()["replaced"])
    assert all(len(file.read_text().splitlines()) < want for file in notes.iterdir())  # neither had them all
    # Another attempt comes by the last steps again, on another number of ranks: these are the same samples.
    for step in (9, 6, 5, 4, 3, 2, 1, 0):
        with (notes / "rank_0.jsonl").open("a") as file:
            file.write('[3, "torn by a ki')
        again = rank(0, 1)
        again.load_state_dict({**again.state_dict(), "step": step})
        take(again, 10 - step)
        assert again.report()["replaced_count"] == want
    more = rank(1, 2, bad_samples=want)
    more.load_state_dict({**more.state_dict(), "step": 10})
    with pytest.raises(DataError, match=rf"data\.bad_samples allows {want}"):
        take(more, 10)
    assert "00004.png: not a picture" in " ".join(more.report()["replaced"])


def test_over_the_budget_the_run_stops_with_the_list(root: Path) -> None:
    (root / "pictures" / "00004.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        take(loader(spec(root)), 10)
    told = str(caught.value)
    assert told.startswith("1 samples cannot be used, and data.bad_samples allows 0:\n")
    assert f"{root}/mixed.json, record 4 (id 4): {root}/pictures/00004.png: the file is empty" in told
    assert "`python data/prepare.py check`" in told


def test_a_wrong_root_is_not_replaced_away(root: Path) -> None:
    for path in (root / "pictures").iterdir():
        path.unlink()
    with pytest.raises(
        DataError, match=r"64 samples in a row.*is data.root .* the folder that the paths start"
    ):
        take(loader(spec(root, bad_samples=1000)), 10)


def test_a_picture_without_its_like_cannot_be_replaced(root: Path) -> None:
    records = [record("<image>\nA?", "Number 1.", image=picture(root, 1)), record("B?", "Number 2.")]
    write(
        root, "few.json", [*records, record("<image> <image>\nTwo?", "Number 3.", image=["x.png", "y.png"])]
    )
    (root / "pictures" / "00001.png").unlink()
    with pytest.raises(DataError, match=r"64 samples in a row|no other sample is like it"):
        take(loader(spec(root, mix="few.json", bad_samples=100)), 3)


def test_untrainable_records_stop_the_run_before_it_starts(root: Path) -> None:
    records = mixed(root, 10)
    records[3]["conversations"].pop(0)
    records[5]["conversations"][1]["value"] = ""
    records[6]["conversations"][0]["value"] += " word" * 600
    write(root, "mixed.json", records)
    with pytest.raises(DataError) as caught:
        loader(spec(root, bad_samples=2))
    told = str(caught.value)
    assert "3 samples cannot be used, and data.bad_samples allows 2" in told
    assert "mixed.json, record 5 (id 5): no answer to learn from" in told
    assert "mixed.json, record 6: its question alone fills max_length 512" in told
    got = loader(spec(root, bad_samples=3))
    assert got.samples == 7
    assert got.report()["dropped"] == 3
    assert set(flat(take(got, 4))) == {0, 1, 2, 4, 7, 8, 9}


def test_a_long_list_of_faults_is_cut(root: Path) -> None:
    write(root, "bad.json", [record("A?", "") for _ in range(30)])
    with pytest.raises(DataError, match="and 10 more"):
        loader(spec(root, mix="bad.json"))
    with pytest.raises(DataError, match=r"the mix 'bad.json' has no samples"):
        loader(spec(root, mix="bad.json", bad_samples=30))


def test_over_long_samples_are_cut_and_counted(root: Path) -> None:
    records = mixed(root, 6)
    for value in records:
        value["conversations"] += [
            {"from": "human", "value": "More?"},
            {"from": "gpt", "value": "and on" * 200},
        ]
    write(root, "mixed.json", records)
    got = loader(spec(root, max_length=200))
    for step in itertools.islice(got.steps(), 3):
        for batch in step:
            assert batch["input_ids"].shape[1] < 200
            assert not any("and on" in tokenizer(TOK).decode(ids[ids >= 0]) for ids in batch["input_ids"])
    assert got.report()["cut"] == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"root": "$NO_SUCH_VARIABLE/x"}, "that variable is not set here: export it, or name a folder"),
        ({"root": "/no/such/folder"}, "data.root: there is no folder /no/such/folder on this machine"),
        ({"mix": "llava-zz"}, "the mix names 'llava-zz', which is not in the catalog"),
        ({"mix": "hybrid-ft"}, "there is no la_tune_256k.json, here or in train_json"),
        ({"mix": "torn.json"}, "torn.json, line 1, byte 2, record 0: not valid JSON"),
        ({"template": "phi"}, "the tokenizer does not suit template phi: the template ends turns with"),
        ({"template": "v7"}, "no template is called 'v7'"),
    ],
)
def test_what_the_data_lack_is_told_in_words(changes: dict[str, Any], words: str, root: Path) -> None:
    (root / "torn.json").write_text("[{")
    with pytest.raises(ValueError) as caught:
        loader(spec(root, **changes))
    assert words in str(caught.value)


def test_an_unsound_tokenizer_does_not_start(root: Path) -> None:
    with pytest.raises(DataError, match="there is no pad token"):
        Loader(
            spec(root),
            fresh_tokenizer(TOK),
            FORMAT,
            PATCHES,
            micro_batch=1,
            accumulation=1,
            rank=0,
            world=1,
            seed=0,
        )


def test_a_users_own_file_may_lie_beside_its_pictures(root: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    mixed(own, 6)
    for path in (root / "pictures").iterdir():
        path.unlink()
    got = loader(spec(root, mix=str(own / "mixed.json")))
    assert sorted(flat(take(got, 3))[:6]) == list(range(6))


def test_variables_in_the_root_are_expanded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_ROOT", str(root.parent))
    assert loader(spec(root, root=f"$SOME_ROOT/{root.name}")).samples == 40


def test_closing_stops_what_is_loaded_ahead(root: Path) -> None:
    got = loader(spec(root))
    steps = got.steps()
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    got.close()
    got.close()


def test_texts_are_all_turns_and_the_templates_words(root: Path) -> None:
    write(
        root, "odd.json", [record("<image>\nA?", "b", image="x.png"), "not a record", {"conversations": None}]
    )
    first, second, *rest = texts(spec(root, mix={"odd.json": 1.0}))
    assert (first, second) == ("<image>\nA?", "b")
    assert any(text.startswith("A chat between") and text.endswith("USER: ASSISTANT:") for text in rest)


def test_held_out_questions(root: Path) -> None:
    write(
        root,
        "asked.json",
        [
            record("<image>\nA?", "b", image="x.png"),
            {**record("C?", "d", "E?", "f"), "dataset": "gqa"},
        ],
    )
    first, second = held_out(spec(root, held_out="asked.json"))
    assert first.image_paths == (root / "x.png",)
    assert first.conversations == [{"from": "human", "value": "<image>\nA?"}]
    assert (first.answer, first.dataset) == ("b", "asked")
    assert (second.answer, second.dataset, len(second.conversations)) == ("f", "gqa", 3)
    write(root, "asked.json", [record("A?")])
    with pytest.raises(
        DataError, match=r"asked.json, record 0: a held-out record needs a question and an answer"
    ):
        held_out(spec(root, held_out="asked.json"))
    write(root, "asked.json", ["A?"])
    with pytest.raises(DataError, match=r"asked.json, record 0: the record is a text, not an object"):
        held_out(spec(root, held_out="asked.json"))
    with pytest.raises(DataError, match=r"there is no none.json"):
        held_out(spec(root, held_out="none.json"))
