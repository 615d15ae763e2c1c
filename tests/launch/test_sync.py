"""The syncer: what offline nodes recorded arrives once, in order and whole; stages are linked afterwards."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.metrics import NoTracker
from launch.online import reach, segments, sync
from tests.launch import tracked
from tests.launch.tracked import RUN, hurried, is_online, kill_mirror, log, start, steps, wait
from tests.wandb_server import Fault, Run, WandbServer

server, folder = tracked.server, tracked.folder


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    hurried(monkeypatch, FLUSH_SECONDS=0.2, TICK_SECONDS=0.1, LAG_SECONDS=0)
    script = "import sys, launch.online.sync as s, launch.online.session as t; t.LAG_SECONDS = 0; s.main(sys.argv[1:])"
    monkeypatch.setattr(sync, "COMMAND", (sys.executable, "-c", script))


def offline(folder: Path, attempt: int, first: int, last: int, outcome: str = "") -> NoTracker:
    """One attempt on a node without a network; without an outcome its node dies."""
    tracker = start(folder, attempt=attempt, start_step=first - 1, mode="offline")
    log(tracker, first, last)
    if outcome:
        tracker.finish(outcome)
        return tracker
    wait(lambda: recorded(folder) >= last)
    kill_mirror(tracker)
    return tracker


def recorded(folder: Path) -> int:
    return segments.last_step(folder) if (folder / "wandb").is_dir() else -1


def go(*folders: Path, running: bool = False, live: bool = False) -> dict[str, Any]:
    """One pass; the report of the last folder."""
    reports = sync.sync_all(folders, running=lambda folder: running, live=live, say=lambda text: None)
    return reports[-1] if reports else {}


def rows_sent(server: WandbServer) -> int:
    """Rows in all requests, so that one sent twice counts twice."""
    bodies = [
        json.loads(p.split(b"\n\n", 1)[1] or b"{}") for p in server.payloads if b"/file_stream\n" in p[:200]
    ]
    return sum(
        len(body.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])) for body in bodies
    )


def the_run(server: WandbServer) -> Run:
    (run,) = server.runs.values()
    return run


def test_three_segments_two_of_them_killed_become_one_run(server: WandbServer, folder: Path) -> None:
    offline(folder, 1, 1, 14)
    offline(folder, 2, 11, 27)  # redoes 11 to 14
    offline(folder, 3, 21, 35, "finished")  # redoes 21 to 27
    held = [segments.scan(path) for path in segments.find(folder)]
    assert [(s.first, s.last, s.closed) for s in held] == [(1, 14, False), (15, 27, False), (28, 35, True)]

    with reach.Lock(folder):
        assert go(folder)["notes"] == ["another syncer is at this run"]
    assert not server.runs
    report = go(folder)
    assert not report["failed"], report
    run = the_run(server)
    assert run.steps == list(range(1, 36))
    assert [row["train/step"] for row in run.history] == run.steps
    assert rows_sent(server) == 35
    assert run.state == "finished"
    assert run.config["attempt"]["value"] == 3

    assert go(folder) == {}  # nothing to do, and nothing is done
    assert rows_sent(server) == 35


def test_rows_that_a_killed_node_never_wrote_come_from_the_file(server: WandbServer, folder: Path) -> None:
    """The last flush is missing from wandb's own file, the checkpoint is newer, and one file is empty."""
    offline(folder, 1, 1, 20)
    (path,) = segments.find(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    lost = segments.scan(path)
    assert 1 < lost.last < 20
    second = offline(folder, 2, 21, 30)
    assert segments.scan(segments.find(folder)[-1]).first == lost.last + 1  # the mirror had read up to there
    empty = segments.find(folder)[-1]
    empty.write_bytes(empty.read_bytes()[:7])
    assert second is not None
    offline(folder, 3, 31, 33, "finished")

    report = go(folder)
    assert not report["failed"], report
    assert the_run(server).steps == list(range(1, 34))
    assert any("is empty" in note for note in report["notes"])
    assert rows_sent(server) == 33


def test_a_file_that_is_still_written_is_left_alone(server: WandbServer, folder: Path) -> None:
    offline(folder, 1, 1, 10)
    tracker = start(folder, attempt=2, start_step=10, mode="offline")
    log(tracker, 11, 15)
    wait(lambda: recorded(folder) >= 15)
    report = go(folder, running=True)
    assert the_run(server).steps == list(range(1, 11))
    assert not list((folder / "wandb").glob("*/*.synced"))[1:]
    assert not report["failed"]
    log(tracker, 16, 20)
    tracker.finish("finished")
    assert not go(folder)["failed"]
    assert the_run(server).steps == list(range(1, 21))
    assert rows_sent(server) == 20


def test_rows_that_the_server_refuses_are_noticed_and_sent_again(server: WandbServer, folder: Path) -> None:
    """`wandb sync` ends with 0 and marks the file as synced; the server has nothing."""
    offline(folder, 1, 1, 12, "finished")
    server.faults.append(Fault("file_stream", status=403, times=1))
    report = go(folder)
    assert list((folder / "wandb").glob("offline*/*.synced"))  # that is what wandb thinks
    assert any("Fatal error" in note for note in report["notes"]), report
    assert any("sent steps 1 to 12 from metrics.jsonl" in note for note in report["notes"]), report
    assert not report["failed"]
    assert the_run(server).steps == list(range(1, 13))
    assert the_run(server).state == "finished"


def test_what_a_server_that_died_at_the_end_lacks_is_sent(
    server: WandbServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = start(folder)
    log(tracker, 1, 5)
    wait(lambda: is_online(folder))
    server.down = True
    log(tracker, 6, 10)
    kill_mirror(tracker)
    report = go(folder)
    assert report["failed"]
    assert f"{server.url} does not answer" in " ".join(report["notes"])
    server.down = False
    assert not go(folder)["failed"]
    assert the_run(server).steps == steps(folder / "metrics.jsonl") == list(range(1, 11))


def test_a_later_online_attempt_makes_offline_files_needless(server: WandbServer, folder: Path) -> None:
    offline(folder, 1, 1, 10)
    tracker = start(folder, attempt=2, start_step=8)
    log(tracker, 9, 20)
    tracker.finish("finished")
    assert the_run(server).steps == list(range(1, 21))
    sent = rows_sent(server)
    assert go(folder) == {}
    assert rows_sent(server) == sent


def test_a_live_view_is_exact_and_repeats_nothing(server: WandbServer, folder: Path) -> None:
    tracker = start(folder, mode="offline")
    for last in (6, 12):
        log(tracker, last - 5, last)
        report = go(folder, running=True, live=True)
        assert not report["failed"], report
        assert the_run(server).steps == list(range(1, last + 1))
        assert the_run(server).state == "running"
    log(tracker, 13, 15)
    tracker.finish("finished")
    report = go(folder)
    assert the_run(server).steps == list(range(1, 16))
    assert the_run(server).state == "finished"
    assert rows_sent(server) == 15


# ---- lineage: pixels -> align -> instruct -> moe


STAGES = ("align", "instruct", "moe")
EDGES = {
    ("demo-align", "checkpoint-demo-align"),
    ("checkpoint-demo-align", "demo-instruct"),
    ("demo-instruct", "checkpoint-demo-instruct"),
    ("checkpoint-demo-instruct", "demo-moe"),
    ("demo-moe", "checkpoint-demo-moe"),
}


def stage(root: Path, name: str, mode: str = "auto") -> Path:
    """Train one stage for three steps and hand it on, as launch.stage does."""
    folder = root / name
    checkpoint = folder / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "shard").write_text(name)
    run = RUN | {"id": f"demo-{name}", "stage": name}
    tracker = start(folder, run=run, mode=mode)
    parent: dict[str, Any] | None = None
    if name != "align":
        before = root / STAGES[STAGES.index(name) - 1]
        parent = json.loads((before / "handoff.json").read_text())
        assert parent is not None
        tracker.use(parent)
    log(tracker, 1, 3)
    handoff = {
        "run": run["id"],
        "experiment": "demo",
        "stage": name,
        "step": 3,
        "digest": name.encode().hex() * 8,
    }
    handoff |= {"path": "checkpoints/step_00000003", "shards": {}, "parent": parent and parent["digest"]}
    (folder / "handoff.json").write_text(json.dumps(handoff))
    tracker.publish_handoff(handoff)
    tracker.finish("finished")
    return folder


def complete(server: WandbServer) -> None:
    assert server.lineage() == EDGES
    assert {run.state for run in server.runs.values()} == {"finished"}
    assert all(run.steps == [1, 2, 3] for run in server.runs.values())


def test_lineage_online(server: WandbServer, tmp_path: Path) -> None:
    for name in STAGES:
        stage(tmp_path, name)
    complete(server)


def test_lineage_offline_then_synced(server: WandbServer, tmp_path: Path) -> None:
    folders = [stage(tmp_path, name, mode="offline") for name in STAGES]
    assert not server.runs
    reports = sync.sync_all(
        reversed(folders), running=lambda folder: False, say=lambda text: None
    )  # any order
    assert not any(report["failed"] or report["waiting"] for report in reports), reports
    complete(server)


def test_lineage_when_the_server_dies_between_stages(server: WandbServer, tmp_path: Path) -> None:
    folders = [stage(tmp_path, "align")]
    server.down = True
    folders.append(stage(tmp_path, "instruct"))
    server.down = False
    folders.append(stage(tmp_path, "moe"))  # its parent's artifact is not there yet
    assert server.lineage() < EDGES
    reports = sync.sync_all(folders, running=lambda folder: False, say=lambda text: None)
    assert not any(report["failed"] or report["waiting"] for report in reports), reports
    complete(server)
