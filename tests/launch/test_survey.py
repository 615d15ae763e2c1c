"""Facts are read from the ends of files, kept between looks, and never out of date."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.files import newest_lines, write_json
from launch.operating import survey
from launch.operating.survey import Facts
from launch.record import RunFolder, find_runs


def sweep(root: Path, count: int) -> list[RunFolder]:
    for n in range(count):
        folder = RunFolder(root / "sweep" / f"lr={n}")
        write_json(
            folder.run_file, {"id": f"id-{n}", "name": f"sweep/lr={n}", "stage": "moe", "parent": None}
        )
        folder.note("submitting", batch=str(root / "batches" / "b"), index=n)
        folder.note("start", attempt=f"1_{n}-0", number=0, steps=50)
        folder.metrics_file.write_text('{"step": 3, "loss": 1.5}\n')
    return find_runs(root)


def test_what_is_kept_is_used_and_what_changed_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "WORTH_KEEPING", 1)
    runs = sweep(tmp_path, 60)
    first = survey.survey(runs, tmp_path)
    assert (tmp_path / survey.KEPT).is_file()
    read: list[str] = []
    whole = Facts.read.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Facts, "read", classmethod(lambda cls, path: read.append(path) or whole(cls, path)))
    assert survey.survey(runs, tmp_path) == first
    assert read == []
    runs[7].note("verdict", attempt="1_7-0", verdict="error", reason="ValueError", again=False)
    runs[8].metrics_file.write_text('{"step": 4, "loss": 1.25}\n')
    write_json(runs[9].handoff_file, {"step": 50})
    again = survey.survey(runs, tmp_path)
    assert read == [str(runs[n].path) for n in (7, 8, 9)]
    assert (again[7].verdict, again[8].step, again[8].loss, again[9].done) == ("error", 4, 1.25, 50)
    runs[9].handoff_file.unlink()
    assert survey.survey(runs, tmp_path)[9].done is None


@pytest.mark.parametrize("text", ["", "{", '{"version": 0, "runs": {}}', '{"version": 1, "runs": 3}', "[]"])
def test_a_spoilt_or_older_file_is_of_no_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(survey, "WORTH_KEEPING", 1)
    runs = sweep(tmp_path, 3)
    (tmp_path / survey.KEPT).write_text(text)
    assert [facts.step for facts in survey.survey(runs, tmp_path)] == [3, 3, 3]


def test_a_folder_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "WORTH_KEEPING", 1)
    runs = sweep(tmp_path, 3)

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "replace", refuse)
    assert len(survey.survey(runs, tmp_path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep"]


def test_a_long_journal_is_read_from_its_end_only_as_far_as_needed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.note("submitting", batch="b", index=4)
    for attempt in range(3):
        folder.note("start", attempt=f"1_4-{attempt}", number=attempt, steps=9)
        with open(folder.journal_file, "a") as file:
            file.writelines(
                f'{{"attempt": "1_4-{attempt}", "event": "saved", "step": {s}}}\n' for s in range(3000)
            )
    facts = Facts.read(str(tmp_path))
    assert (facts.attempts, facts.started, facts.element, facts.said) == (3, True, 4, "submitting")
    # A journal of before attempts were numbered is counted.
    other = RunFolder(tmp_path / "old")
    for attempt in range(4):
        other.note("start", attempt=f"1_4-{attempt}")
    other.note("submitting", batch="b", index=0)
    assert Facts.read(str(other.path))[7:9] == (False, 4)


def test_lines_come_newest_first_whatever_the_blocks(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for text in (
        b"",
        b"\n",
        b"one",
        b"one\ntwo\n",
        b"\n".join(b"x" * n for n in range(200)),
        b"a" * 9000 + b"\nb",
    ):
        path.write_bytes(text)
        for block in (1, 7, 4096):
            assert list(newest_lines(path, block)) == (text.split(b"\n")[::-1] if text else [b""])
    assert list(newest_lines(tmp_path / "none")) == []


def test_a_handoff_counts_when_it_is_whole(tmp_path: Path) -> None:
    assert survey.handoff_step(str(tmp_path)) is None
    write_json(tmp_path / "handoff.json", {"step": 7, "shards": {"a": {"step": 3}}})
    assert survey.handoff_step(str(tmp_path)) == 7
    (tmp_path / "handoff.json").write_text('{"step":9}')
    assert survey.handoff_step(str(tmp_path)) == 9
    for torn in ('{"step": 9', "", "null"):
        (tmp_path / "handoff.json").write_text(torn)
        assert survey.handoff_step(str(tmp_path)) is None


def test_a_torn_line_of_a_journal_takes_no_whole_one_with_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.note("start", attempt="a")
    with open(folder.journal_file, "a") as file:
        file.write('{"event": "sav')
    folder.note("ended", attempt="a")
    assert [record["event"] for record in folder.journal] == ["start", "ended"]
