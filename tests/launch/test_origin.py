"""Starting from a W&B artifact or a model of the hub: resolved to a digest in the plan, refused in words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import handoff, origin
from launch.files import read_json, write_json
from launch.handoff import HandoffError
from launch.identity import plain
from launch.operating.again import _read
from launch.origin import Origin, OriginError
from launch.plan import make
from launch.reader import SpecError
from launch.record import RunFolder, find_runs
from moe import storage
from moe.adapters import InterchangeError
from moe.interchange import export_hf
from moe.origin import fill
from moe.parallel import Groups
from moe.spec import MoESpec
from moe.upcycle import upcycle
from moe.vlm import VLM
from tests.launch import tracked
from tests.launch.chain import write
from tests.moe import tiny
from tests.wandb_server import WandbServer

server = tracked.server
PLACE = "team/moe-vlm/checkpoint-demo-instruct"


def finished(path: Path) -> RunFolder:
    """A run folder of stage instruct with a checkpoint and its handoff."""
    folder = RunFolder(path)
    write_json(folder.run_file, {"id": "demo-instruct", "experiment": "demo", "point": "", "stage": "instruct",
                                 "name": "demo/run", "identity": "ab" * 32, "code": "c0de"})  # fmt: skip
    write_json(folder.spec_file, {"stage": "instruct"})
    partial = storage.start(folder.checkpoints, 20)
    with storage.Writer() as writer:
        file, _ = writer.write(partial / "state_00000.bin", [memoryview(b"weights")])
    storage.seal(partial, {"step": 20, "files": {"state_00000.bin": file}})
    handoff.publish(folder, storage.publish(partial, 20).path, parent=None)
    return folder


def third(folder: Path, start: str) -> Path:
    """The YAML of a sparse stage that starts there."""
    file = write(folder)
    file.write_text(file.read_text().replace("init_from: s2", f"init_from: {start!r}"))
    return file


def refusal(folder: Path, start: str) -> str:
    with pytest.raises(SpecError) as told:
        make(third(folder, start))
    return str(told.value)


def test_a_run_of_another_project_is_found_by_its_artifact(server: WandbServer, tmp_path: Path) -> None:
    folder = finished(tmp_path / "elsewhere" / "run")
    tracker = tracked.start(folder.path)
    said = read_json(folder.handoff_file)
    assert said is not None
    tracker.publish_handoff(said)
    tracker.finish("finished")

    plan = make(third(tmp_path, f"wandb:{PLACE}:latest"))
    (stage,) = plan.stages
    (run,) = stage.runs
    assert isinstance(run.parent, Origin)
    assert (run.parent.folder.path, run.parent.digest) == (folder.path, said["digest"])
    record = run.record("code")
    assert (record["parent"], record["parent_identity"]) == (str(folder.path), "ab" * 32)
    assert record["origin"]["digest"] == said["digest"]
    # The same run by an alias that says the digest; another parent would be another run.
    (same,) = make(third(tmp_path, f"wandb:{PLACE}:h-{said['digest'][:12]}")).stages[0].runs
    assert same.identity == run.identity

    # At the start of an attempt, and its lineage: the artifact of the other project.
    parent = handoff.start(record, "instruct")
    assert parent is not None
    assert handoff.check(*parent, digests=True) == folder.path / said["path"]
    child = tracked.start(tmp_path / "child", run={**tracked.RUN, "id": "child"}, project="another")
    child.use(parent[1])
    child.finish("finished")
    assert ("checkpoint-demo-instruct", "child") in server.lineage()

    # A resubmission from the folder alone makes the same run.
    write_json(run.folder.run_file, record)
    write_json(run.folder.spec_file, plain(run.spec))
    assert _read(run.folder, run.folder.path.parents[1], {}).identity == run.identity

    words = refusal(tmp_path, "wandb:team/moe-vlm/checkpoint-nobody:latest")
    assert "s3.yaml:3:" in words
    assert "W&B says" in words
    write_json(folder.handoff_file, said | {"digest": "f" * 64})
    with pytest.raises(HandoffError, match="was planned from wandb:"):
        handoff.start(record, "instruct")


def test_an_artifact_needs_a_login_and_a_whole_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert "names no artifact" in refusal(tmp_path, "wandb:checkpoint-x")
    words = refusal(tmp_path, f"wandb:{PLACE}:v0")
    assert re.search(r"no login for https?://\S+ here", words)
    assert "wandb login" in words


def test_a_handoff_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    said = {**(read_json(folder.handoff_file) or {}), "folder": str(folder.path)}
    named = f"wandb:{PLACE}:v1"

    def refused(after: str, handoff: dict[str, Any]) -> str:
        with pytest.raises(OriginError) as told:
            origin.from_wandb(named, named[6:], after, handoff)
        return f"{told.value} ({told.value.hint})"

    assert origin.from_wandb(named, named[6:], "instruct", said).artifact == PLACE
    assert "starts from a handoff of stage align" in refused("align", said)
    assert "is not on this file system" in refused("instruct", said | {"folder": str(tmp_path / "gone")})
    other = refused("instruct", said | {"digest": "e" * 64})
    assert f"{folder.path} now holds {said['digest'][:12]}" in other
    assert f":h-{said['digest'][:12]}" in other
    shard = folder.path / said["path"] / "state_00000.bin"
    shard.write_bytes(b"short")
    assert "has 5 bytes where 7 were written" in refused("instruct", said)


# ---- the hub


def exported(folder: Path, model: VLM | None = None) -> VLM:
    """A dense model as a Hugging Face folder."""
    model = model or tiny.model("qwen2", seed=5)
    export_hf(model, folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "README.md").write_text("not the model's")
    return model


def test_a_hub_folder_is_a_start_and_its_files_are_the_digest(tmp_path: Path) -> None:
    source = exported(tmp_path / "hub")
    (run,) = make(third(tmp_path, f"hub:{tmp_path / 'hub'}")).stages[0].runs
    assert isinstance(run.parent, Origin)
    root = run.parent.folder.path.parent
    assert root.name == ".origins"
    assert find_runs(root.parent) == []  # it is no run
    assert run.parent.folder.tokenizer.joinpath("tokenizer_config.json").is_file()
    record = run.record("code")
    parent = handoff.start(record, "instruct")
    assert parent is not None
    path = handoff.check(*parent, digests=True)

    vlm = tiny.model("qwen2", seed=6)
    fill(path, vlm)
    for name, tensor in vlm.state_dict().items():
        if not name.startswith("tower."):  # that is the spec's own
            assert torch.equal(tensor, source.state_dict()[name]), name

    (again,) = make(third(tmp_path, f"hub:{tmp_path / 'hub'}")).stages[0].runs
    assert again.identity == run.identity
    weights = next((tmp_path / "hub").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(HandoffError, match="is not what it was"):
        handoff.check(*parent, digests=True)
    (other,) = make(third(tmp_path, f"hub:{tmp_path / 'hub'}")).stages[0].runs
    assert other.identity != run.identity
    weights.unlink()
    with pytest.raises(HandoffError, match="missing or has another size"):
        handoff.check(*parent, digests=False)


def test_a_hub_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    exported(folder)
    with pytest.raises(InterchangeError, match=r"another model than the spec's: .* set model\.backbone"):
        fill(folder, tiny.model("qwen2", config={**tiny.CONFIG, "num_key_value_heads": 2, "hidden_size": 48}))
    sparse = tiny.model("qwen2")
    upcycle(sparse, MoESpec(experts=4), Groups.single(), seed=0)
    exported(tmp_path / "sparse", sparse)
    assert "has experts already" in refusal(tmp_path, f"hub:{tmp_path / 'sparse'}")
    said = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {"model_type": "llama", "moe": {"moe_enable": False}})
    assert "a language model without a projector" in refusal(tmp_path, f"hub:{folder}")
    write_json(folder / "config.json", said)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert "has no weights" in refusal(tmp_path, f"hub:{folder}")
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(tmp_path, f"hub:{folder}")
    assert "there is no folder" in refusal(tmp_path, f"hub:{tmp_path / 'nowhere'}")


def test_a_name_is_looked_up_in_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "home" / "hub" / "models--someone--small" / "snapshots" / ("1" * 40)
    exported(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("1" * 40)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (run,) = make(third(tmp_path, "hub:someone/small")).stages[0].runs
    assert isinstance(run.parent, Origin)
    assert read_json(run.parent.folder.handoff_file)["path"] == str(snapshot)  # type: ignore[index]
    words = refusal(tmp_path, "hub:someone/large")
    assert "is not in the cache, and the hub cannot be reached" in words
    assert "HF_HOME on the shared file system" in words
