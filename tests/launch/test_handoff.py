"""What the next stage makes sure of before it starts from a handoff: when it is planned, and on the node."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import cli, handoff
from launch.files import read_json, write_json
from launch.handoff import HandoffError
from launch.plan import make
from launch.record import RunFolder
from moe import storage
from tests.launch import chain

SHARD = "state_00000.bin"


def checkpoint(folder: RunFolder, step: int, content: bytes) -> Path:
    partial = storage.start(folder.checkpoints, step)
    with storage.Writer() as writer:
        file, _ = writer.write(partial / SHARD, [memoryview(content)])
    storage.seal(partial, {"step": step, "files": {SHARD: file}})
    return storage.publish(partial, step).path


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    """A chain whose first two stages are finished."""
    file = chain.write(tmp_path)
    before = None
    for stage in make(file).stages[:2]:
        (run,) = stage.runs
        write_json(run.folder.run_file, run.record("code"))
        write_json(run.folder.spec_file, run.settings)
        run.folder.tokenizer.mkdir()
        (run.folder.tokenizer / "tokenizer.json").write_text("{}")
        before = handoff.publish(run.folder, checkpoint(run.folder, 20, b"weights"), parent=before)
    return file


def parent(yaml: Path) -> RunFolder:
    return make(yaml).stages[1].runs[0].folder


def flipped(folder: RunFolder, shard: Path) -> None:
    shard.write_bytes(b"weIghts")


def cut(folder: RunFolder, shard: Path) -> None:
    shard.write_bytes(b"weigh")


def lost(folder: RunFolder, shard: Path) -> None:
    shard.unlink()


def replaced(folder: RunFolder, shard: Path) -> None:
    """Another checkpoint, whole in itself, in the place of the one handed over."""
    shutil.rmtree(shard.parent)
    checkpoint(folder, 20, b"Weights")


def other_words(folder: RunFolder, shard: Path) -> None:
    (folder.tokenizer / "tokenizer.json").write_text('{"a": 0}')


Damage = Callable[[RunFolder, Path], None]
DAMAGES: list[tuple[Damage, str]] = [
    (cut, f"{SHARD} has 5 bytes where 7 were written"),
    (lost, f"{SHARD} is missing"),
    (replaced, "is not the checkpoint that"),
    (other_words, "is not the tokenizer that the model was trained with"),
]


@pytest.mark.parametrize(
    ("damage", "words"), [*DAMAGES, (flipped, f"the contents of {SHARD} are not what was written")]
)
def test_a_damaged_or_replaced_handoff_is_refused_on_the_node(yaml: Path, damage: Damage, words: str) -> None:
    run = make(yaml).stages[2].runs[0]
    folder, said = handoff.start(run.record("code"), "instruct") or pytest.fail("no parent")
    shard = handoff.check(folder, said, digests=True) / SHARD  # sound as it is
    damage(folder, shard)
    with pytest.raises(HandoffError, match=words):
        handoff.check(folder, said, digests=True)


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_what_can_be_seen_without_reading_it_is_refused_when_planned(
    yaml: Path, damage: Damage, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(yaml), "--dry-run"]) == 0
    folder = parent(yaml)
    damage(folder, folder.checkpoints / storage.folder_name(20) / SHARD)
    capsys.readouterr()
    assert cli.main([str(yaml), "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert "s3.yaml:3:" in told
    assert words in told
    assert f"or remove {folder.handoff_file}, to train s2/run again" in told


def test_a_handoff_of_another_run_or_stage_is_refused(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = parent(yaml)
    said = read_json(folder.handoff_file)
    assert said is not None
    record = make(yaml).stages[2].runs[0].record("code")
    for key, value, words in (
        ("identity", "f" * 64, "was left by another run than the one planned"),
        ("stage", "align", "is the handoff of stage align, and stage instruct is wanted"),
    ):
        write_json(folder.handoff_file, {**said, key: value})
        with pytest.raises(HandoffError, match=words):
            handoff.start(record, "instruct")
        assert cli.main([str(yaml), "--only", "moe", "--dry-run"]) == 2
        assert words in capsys.readouterr().err
    folder.handoff_file.unlink()
    with pytest.raises(HandoffError, match="the run has not finished"):
        handoff.start(record, "instruct")


def test_what_has_been_started_from_is_not_asked_for_again(yaml: Path) -> None:
    """A parent may be cleared away once all that starts from it is done."""
    run = make(yaml).stages[2].runs[0]
    write_json(run.folder.run_file, run.record("code"))
    write_json(run.folder.spec_file, json.loads(json.dumps(run.settings)))
    handoff.publish(run.folder, checkpoint(run.folder, 5, b"sparse"), parent=None)
    shutil.rmtree(parent(yaml).checkpoints)
    assert cli.main([str(yaml), "--dry-run"]) == 0
