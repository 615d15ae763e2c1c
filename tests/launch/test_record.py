"""The run folder survives kills: whole files or none, and a journal whose torn line is no record."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch import files
from launch.files import read_json, write_json
from launch.record import RunFolder, find_runs

ROOT = Path(__file__).resolve().parents[2]


def test_a_file_is_whole_after_a_kill_at_any_moment(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    write_json(target, {"n": -1, "fill": ""})
    code = """
import sys; from pathlib import Path; from launch.record import write_json
n = 0
while True:
    write_json(Path(sys.argv[1]), {"n": n, "fill": "x" * 200_000})
    n += 1
    print(n, flush=True)
"""
    for killed_after in (1, 3, 7):
        writer = subprocess.Popen(
            [sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert writer.stdout is not None
        for _ in range(killed_after):
            writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        found = read_json(target)
        assert found is not None
        assert len(found["fill"]) == 200_000


def test_a_failed_write_leaves_what_was_there_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    write_json(target, {"a": 1})
    with contextlib.suppress(TypeError):
        write_json(target, {"a": object()})
    assert read_json(target) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_the_journal_skips_a_torn_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.note("start", attempt="a")
    with open(folder.journal_file, "a") as file:
        file.write('{"event": "sav')
    assert [record["event"] for record in folder.journal] == ["start"]
    assert folder.last("start", "saved")["attempt"] == "a"  # type: ignore[index]


def test_a_record_waits_for_another_nodes_and_goes_behind_it(tmp_path: Path) -> None:
    """Another NFS client writes where it saw the end when it took the lock, whatever has been added since."""
    folder = RunFolder(tmp_path)
    folder.note("start", attempt="a")
    with open(folder.journal_file, "r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        end = other.seek(0, os.SEEK_END)
        here = threading.Thread(target=lambda: folder.note("saved", step=1))
        here.start()
        here.join(0.3)
        os.pwrite(other.fileno(), b'{"event": "verdict", "time": 1.0}\n', end)
    here.join()
    assert [record["event"] for record in folder.journal] == ["start", "verdict", "saved"]


def test_a_record_does_not_wait_for_ever_for_a_lock_that_a_dead_node_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LOCKED", 0.05)
    folder = RunFolder(tmp_path)
    folder.note("start", attempt="a")
    with open(folder.journal_file, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        folder.note("saved", step=1)
    assert [record["event"] for record in folder.journal] == ["start", "saved"]


def test_without_locks_records_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))  # Lustre, mounted without `flock`

    monkeypatch.setattr(fcntl, "flock", refuse)
    folder = RunFolder(tmp_path)
    folder.note("start", attempt="a")
    folder.note("saved", step=1)
    assert [record["event"] for record in folder.journal] == ["start", "saved"]


def test_the_last_row_of_metrics_is_the_last_whole_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.last_metrics() == {}
    rows = [json.dumps({"step": step, "fill": "x" * 500}) for step in range(300)]
    folder.metrics_file.write_text("\n".join(rows) + '\n{"step": 300, "fi')
    assert folder.last_metrics()["step"] == 299


def test_runs_are_found_by_their_record_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a/run", "demo/b/lr=1", "code/x/run", "batches/t"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a/run", "demo/b/lr=1", "code/x/run"):
        write_json(tmp_path / name / "run.json", {"id": name})
    assert [run.path.relative_to(tmp_path).as_posix() for run in find_runs(tmp_path)] == [
        "a/run",
        "demo/b/lr=1",
    ]
    assert find_runs(tmp_path / "nowhere") == []
