"""The saved workspace and report: made once and then updated, with the chain's runs and panels in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.files import write_json
from launch.operating.verbs import main
from launch.record import RunFolder
from tests.launch import tracked
from tests.launch.told import digest, experiments
from tests.wandb_server import Fault, WandbServer

server = tracked.server


def test_a_second_call_updates_what_the_first_made(
    server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = experiments(tmp_path)
    assert main(["--runs", str(root), "dashboard", "s3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["workspace"].startswith(f"{server.url}/team/moe-vlm?nw=")
    views = {view["type"]: view for view in server.views.values()}
    assert set(views) == {"project-view", "runs"}
    assert said["report"].endswith(views["runs"]["id"].rstrip("="))
    space, page = (views[kind]["spec"] for kind in ("project-view", "runs"))
    for spec in (space, page):
        json.loads(spec)
        for name in ("train/loss", "moe/entropy", "moe/dropped", "goodput/share", "goodput/replay_seconds"):
            assert f'"{name}"' in spec, name
        for experiment in ("s1", "s2", "s3"):
            assert f'"{experiment}"' in spec  # the filter on the runs' group
        assert '"train/step"' in spec
        assert "held_out/answers" in spec
        assert f"[step 400, {digest('s3/top_k=2')[:12]}]" in spec  # lineage
        assert f"checkpoint-s2-0/h-{digest('s2/run')[:12]}/lineage" in spec
    sections = json.loads(space)["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections[:4]] == [
        "Loss by stage",
        "Training",
        "Router balance",
        "Goodput",
    ]
    assert views["project-view"]["displayName"] == "s3: stages"

    handoff = RunFolder(root / "s3" / "top_k=2").handoff_file
    write_json(handoff, json.loads(handoff.read_text()) | {"digest": "f" * 64})
    assert main(["--runs", str(root), "dashboard", "s3"]) == 0
    assert said["workspace"] in capsys.readouterr().out
    assert {id: view["name"] for id, view in server.views.items()} == {
        v["id"]: v["name"] for v in views.values()
    }
    assert all("[step 400, ffffffffffff]" in view["spec"] for view in server.views.values())


def test_what_stands_in_the_way_is_said(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = experiments(tmp_path)
    server.faults.append(Fault("^SaveView$", status=403))
    assert main(["--runs", str(root), "dashboard", "s1"]) == 1
    assert "error: W&B says: " in capsys.readouterr().err
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert main(["--runs", str(root), "dashboard", "s1"]) == 1
    assert f"no login for {server.url} here" in capsys.readouterr().err
