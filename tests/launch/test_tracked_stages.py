"""The demo's stages, trained for a few steps and tracked by the real client: all that a run is to tell is there."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  before ranks are forked: each would import it anew
import pytest

from launch import tracking
from launch.files import write_json
from launch.identity import plain
from launch.job import Place
from launch.metrics import NoTracker
from launch.online.orders import Orders
from launch.operating.status import state_of
from launch.operating.verbs import main
from launch.plan import EXPERIMENTS, Run, make
from launch.record import RunFolder
from launch.recovery.findings import comes_back, of_attempt
from launch.recovery.lease import FencedError, Lease
from launch.recovery.pulse import Pulse
from launch.stage import run_stage
from launch.verdict import judged, requested, speak
from tests.launch import tracked
from tests.launch.tracked import hurried, is_online, wait
from tests.ranks import ranks
from tests.wandb_server import WandbServer

server = tracked.server
NAMES = {"align": "stage1_align", "instruct": "stage2_instruct", "moe": "stage3_moe"}
STEPS = {"align": 3, "instruct": 4, "moe": 12}
ALWAYS = (
    *("loss", "ce", "aux", "lr", "grad_norm", "tokens", "samples", "positions", "images", "padding"),
    *("step_seconds", "samples_per_second", "tokens_per_second", "model_tflops", "rss_gb"),
)


def attempt(run: Run, number: int) -> str:
    """One rank's attempt at a run, on the first of two nodes as far as the rank can tell."""
    place = Place(rank=0, local_rank=0, world=1, node="localhost", attempt=f"7_0-{number}")
    place_folder = run.folder.logs(place.attempt)
    place_folder.mkdir(parents=True, exist_ok=True)
    return run_stage(run.folder, place, lambda: False, Pulse(place_folder, 0, place.node))


def chain(folder: Path, data: Path, *changes: str, steps: Mapping[str, int] = STEPS) -> dict[str, Run]:
    """The demo's three runs, planned and written down as a submission does, by stage."""
    common = [f"runs={folder / 'runs'}", f"data.root={data}", "gpus=1", "wandb.system=node"]
    length = [f"{name}:train.steps={steps[stage]}" for stage, name in NAMES.items()]
    plan = make(
        EXPERIMENTS / "demo" / "stage3_moe.yaml", [*common, *length, "moe.expert_parallel=1", *changes]
    )
    found = {}
    for stage in plan.stages:
        (run,) = stage.runs
        write_json(run.folder.spec_file, plain(run.spec))
        write_json(run.folder.run_file, run.record("code"))
        found[run.spec.stage] = run
    return found


def summary_table(server: WandbServer, run: Any, name: str) -> dict[str, Any]:
    """A table of the run's summary, as its page shows it: with pictures, from the artifact that wandb makes of it."""
    assert run.summary[name]["_type"] == "table-file", run.summary[name]
    tables = [json.loads(blob) for blob in server.blobs.values() if blob.startswith(b'{"_type": "table"')]
    found = [table for table in tables if table["columns"] == COLUMNS[name]]
    assert found, f"{name} was not sent"
    return dict(found[-1])


COLUMNS = {
    "held_out/answers": ["picture", "kind", "question", "answer", "said", "right"],
    "routing/shares": ["layer", "expert", "share of text", "share of image"],
    "routing/picture": ["picture"],
    "data/sources": ["source", "samples"],
}


@pytest.mark.slow
def test_three_stages_tell_all_there_is(
    server: WandbServer, tmp_path: Path, demo_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurried(monkeypatch, LEDGER_SECONDS=0.0, NODES_SECONDS=0.0)
    runs = chain(tmp_path, demo_data)
    other = tmp_path / "runs" / "demo" / "stage3_moe" / "run" / "wandb" / "nodes" / "n2.jsonl"
    for stage, run in runs.items():
        if stage == "moe":  # what a second node's sampler leaves
            other.parent.mkdir(parents=True)
            other.write_text(json.dumps({"time": time.time(), "cpu": 0.5, "gpu_use": 0.9}) + "\n")
        assert ranks(1)(functools.partial(attempt, run, 0)) == ["finished"]
    told = {name: server.runs[run.id] for name, run in runs.items()}
    for stage, run in told.items():
        assert run.steps == list(range(1, STEPS[stage] + 1))
        assert run.state == "finished"
        for row in run.history:
            missing = [key for key in ALWAYS if f"train/{key}" not in row]
            assert not missing, (stage, missing)
            assert row["train/model_tflops"] > 0
            assert row["train/rss_gb"] > 0.1
        assert any("goodput/share" in row and "goodput/train_seconds" in row for row in run.history)
        assert 0 < run.summary["goodput/share"] < 1
        check_held_out(server, run, runs[stage])
        assert run.summary["data"]["samples"] > 0
        assert summary_table(server, run, "data/sources")["data"]
    moe = told["moe"]
    last = moe.history[-1]
    for layer in (0, 1):
        for key in ("max_share", "min_share", "entropy", "dropped"):
            assert 0 <= last[f"moe/layer{layer}/{key}"] <= 1
    assert {"train/step_seconds_p50", "train/step_seconds_p95", "train/step_seconds_p99"} <= set(
        moe.history[9]
    )
    assert any(row.get("system/n2/gpu_use") == 0.9 for row in moe.history)
    assert summary_table(server, moe, "routing/picture")["data"][0][0]["_type"] == "image-file"
    routing = summary_table(server, moe, "routing/shares")["data"]
    assert len(routing) == 2 * 4  # sparse layers, experts
    for column in (2, 3):  # of text and of image tokens, over a layer's experts
        assert sum(row[column] for row in routing) == pytest.approx(2)
    assert (runs["moe"].folder.path / "routing.png").stat().st_size > 1000
    # Stage 1 -> 2 -> 3: each used what the one before logged.
    artifacts = {stage: f"checkpoint-{run.id}" for stage, run in runs.items()}
    edges = {(run.id, artifacts[stage]) for stage, run in runs.items()}
    edges |= {(artifacts["align"], runs["instruct"].id), (artifacts["instruct"], runs["moe"].id)}
    assert {edge for edge in server.lineage() if any("checkpoint" in name for name in edge)} == edges
    # The page of it all, with the picture of where questions go.
    assert main(["--runs", str(tmp_path / "runs"), "report", "demo/stage3_moe"]) == 0
    page = (runs["moe"].folder.path / "report.html").read_text()
    assert "which experts text and image tokens" in page
    assert "<figcaption>layer 2 <small>evenness" in page  # the second sparse one, as in the picture
    assert f"{server.url}/team/moe-vlm/runs/{runs['moe'].id}" in page


@pytest.mark.slow
def test_tags_on_its_page_end_an_attempt_where_a_save_is_due(
    server: WandbServer, tmp_path: Path, demo_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurried(monkeypatch, ORDERS_SECONDS=0.1)
    monkeypatch.setattr(tracking, "LOOK_SECONDS", 0.0)
    long = dict.fromkeys(STEPS, 100_000)
    run = chain(tmp_path, demo_data, "stage1_align:train.save_every=5", steps=long)["align"]
    run.folder.note("submitting", batch="b", index=0)

    def put() -> None:
        wait(lambda: is_online(run.folder.path, 0))
        wait(lambda: run.id in server.runs and len(server.runs[run.id].steps) > 2)
        server.runs[run.id].tags.append("stop-after-save")

    hand = threading.Thread(target=put)
    hand.start()
    assert ranks(1)(functools.partial(attempt, run, 0)) == ["preempted"]
    hand.join()
    saved = run.folder.last("saved")
    assert saved is not None
    assert saved["step"] % 5 == 0
    assert saved["step"] == run.folder.last_metrics()["step"]
    assert "stop-after-save" not in server.runs[run.id].tags  # the next attempt is not told again
    found = of_attempt(run.folder, "7_0-0", 0)
    assert (found.verdict, found.reason) == ("cancelled", "on request of the W&B tag stop-after-save")
    assert not comes_back(run.folder, found.verdict)
    speak(run.folder, "7_0-0", found, again=False)
    state = state_of(run.folder, None)
    assert (state.name, state.reason) == ("cancelled", "cancelled: on request of the W&B tag stop-after-save")


@pytest.mark.slow
def test_rows_that_are_missing_before_the_newest_checkpoint_are_computed_again(
    tmp_path: Path, demo_data: Path
) -> None:
    changes = ("wandb.mode=disabled", "train.save_every=4", "train.keep=3")
    run = chain(tmp_path, demo_data, *(f"stage1_align:{c}" for c in changes), steps=dict.fromkeys(STEPS, 10))
    folder = run["align"].folder
    assert ranks(1)(functools.partial(attempt, run["align"], 0)) == ["finished"]
    before = folder.metrics_file.read_text().splitlines()
    handed = json.loads(folder.handoff_file.read_text())
    # An attempt that went on from 4 while 8 and 10 came from one that was cut off, and died after 6.
    folder.metrics_file.write_text("".join(f"{line}\n" for line in before[:6]))
    folder.handoff_file.unlink()
    assert ranks(1)(functools.partial(attempt, run["align"], 1)) == ["finished"]
    assert folder.last("start")["step"] == 4  # type: ignore[index]
    rows = [
        [(row["step"], row["loss"]) for row in map(json.loads, lines)]
        for lines in (before, folder.metrics_file.read_text().splitlines())
    ]
    assert rows[0] == rows[1]
    assert [step for step, _ in rows[1]] == list(range(1, 11))
    again = json.loads(folder.handoff_file.read_text())
    assert again["step"] == handed["step"] == 10


def test_who_was_overtaken_as_it_loaded_drops_no_rows_of_the_other_attempt(
    tmp_path: Path, demo_data: Path
) -> None:
    """It would go on from an older checkpoint, and drops what comes after that when it opens the metrics."""
    run = chain(tmp_path, demo_data, "stage1_align:wandb.mode=disabled")["align"]
    rows = "".join(f'{{"step": {step}}}\n' for step in (1, 2))

    class Overtaken(Pulse):
        def __call__(self, doing: str, step: int) -> None:
            if (run.folder.path / "lease.json").exists() and not run.folder.metrics_file.exists():
                Lease(run.folder, "7_0-1")
                run.folder.metrics_file.write_text(rows)
            super().__call__(doing, step)

    def overtaken() -> str:
        place = Place(rank=0, local_rank=0, world=1, node="localhost", attempt="7_0-0")
        run.folder.logs(place.attempt).mkdir(parents=True)
        with pytest.raises(FencedError):
            run_stage(run.folder, place, lambda: False, Overtaken(run.folder.logs(place.attempt), 0, "n1"))
        return "fenced"

    assert ranks(1)(overtaken) == ["fenced"]
    assert run.folder.metrics_file.read_text() == rows
    assert run.folder.last("start") is None


def test_an_order_waits_for_a_save_and_a_requeue_comes_back(tmp_path: Path) -> None:
    class Told(NoTracker):
        def asked(self) -> frozenset[str]:
            return frozenset({"requeue"})

    folder, beats = RunFolder(tmp_path), []
    folder.note("submitting", batch="b", index=0)
    folder.note("start", attempt="7_0-0")
    orders = Orders(lambda: False, lambda doing, step: beats.append(step), Told(), save_every=4)
    for step in range(1, 5):
        orders.heartbeat("agree", step)
        assert orders() is (step == 4)
    assert beats == [1, 2, 3, 4]
    orders.note(folder)
    folder.note("ended", attempt="7_0-0", outcome="preempted", reason="")
    found = judged(of_attempt(folder, "7_0-0", 0), {}, 0, asked=requested(folder))
    assert found.verdict == "preempted"
    assert comes_back(folder, found.verdict)
    assert folder.last("requeued")["by"] == "the W&B tag requeue"  # type: ignore[index]
    warned = Orders(lambda: True, lambda doing, step: None, Told(), save_every=4)
    assert warned()
    warned.note(folder)  # a warning is no order
    assert sum(record["event"] == "requeued" for record in folder.journal) == 1


def check_held_out(server: WandbServer, run: Any, planned: Run) -> None:
    """Questions with their pictures, and what share was right, as eval.json has them."""
    result = json.loads(planned.folder.eval_file.read_text())
    assert run.summary["held_out"]["accuracy"] == result["accuracy"]
    table = summary_table(server, run, "held_out/answers")
    assert len(table["data"]) == min(64, result["questions"])
    pictured: list[Mapping[str, Any]] = [row[0] for row in table["data"] if isinstance(row[0], dict)]
    assert pictured
    assert all(str(cell["_type"]) == "image-file" for cell in pictured)
