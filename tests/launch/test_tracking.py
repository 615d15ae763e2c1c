"""Rows and W&B while a run trains: each step once, no waiting for a server, nothing lost, nothing leaked.

The client is the real one; the server is tests/wandb_server.py.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launch import redact, tracking
from launch.metrics import JsonlTracker, Reader, loads, rows, scalars
from launch.online import mirror, reach, segments
from launch.online.orders import Orders, keep, kept
from launch.record import RunFolder
from launch.spec import WandbSpec
from launch.tracking import Trackers, WandbTracker, trackers
from tests.launch import tracked
from tests.launch.tracked import (
    HANDOFF,
    ROOT,
    RUN,
    descendants,
    hurried,
    is_online,
    kill_mirror,
    log,
    start,
    state,
    steps,
    wait,
)
from tests.wandb_server import Fault, WandbServer

server, folder = tracked.server, tracked.folder


# ---- metrics.jsonl


def test_rows_of_a_killed_attempt_go_and_each_step_stays_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlTracker(path, start_step=0)
    log(first, 1, 12)
    with path.open("a") as file:
        file.write('{"step": 13, "lo')  # killed while writing
    second = JsonlTracker(path, start_step=10)
    log(second, 11, 15)
    second.finish("finished")
    assert steps(path) == list(range(1, 16))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", []),
        ('{"step":1}\n{"step":1}\n{"step":2}\n', [1, 2]),
        ('{"step":1}\n\0\0\0\n{"step":2}\n[1]\n{"loss":1}\n{"step":3}\n', [1, 2, 3]),
        ('{"step":1}\n{"step":2}', [1]),
        ('{"step":3}\n{"step":4}\n{"step":9}\n', [3, 4]),
    ],
)
def test_a_damaged_file_is_repaired(tmp_path: Path, text: str, kept: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    JsonlTracker(path, start_step=4).finish("failed")
    assert steps(path) == kept


def test_a_sound_file_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(JsonlTracker(path, start_step=0), 1, 5)
    before = path.stat()
    JsonlTracker(path, start_step=5)
    assert path.stat().st_ino == before.st_ino
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_full_disk_delays_rows_and_loses_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path, start_step=0)
    log(tracker, 1, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
    try:
        log(tracker, 3, 5)
        assert steps(path) == [1, 2]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log(tracker, 6, 6)
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().err.count("rows wait in memory") == 1


def test_a_reader_goes_on_where_it_stopped_and_leaves_half_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = Reader(path, after=1)
    assert list(reader) == []
    path.write_text('{"step":1}\n{"step":2}\n{"step":')
    assert [row["step"] for row in reader] == [2]
    with path.open("a") as file:
        file.write('3}\n{"step":4}\n')
    assert [row["step"] for row in reader] == [3, 4]
    assert [row["step"] for row in rows(path, 3)] == [4]


def test_a_reader_starts_again_when_the_file_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(JsonlTracker(path, start_step=0), 1, 9)
    reader = Reader(path)
    assert [row["step"] for row in reader][-1] == 9
    log(JsonlTracker(path, start_step=4), 5, 12)
    assert [row["step"] for row in reader] == [10, 11, 12]


def test_the_loads_of_experts() -> None:
    assert loads([5, 5, 5, 5]) == (0.25, 0.25, pytest.approx(1.0))
    assert loads([8, 0]) == (1.0, 0.0, 0.0)
    assert loads([0, 0]) == (0.0, 0.0, 0.0)
    most, least, even = loads([3, 1])
    assert (most, least) == (0.75, 0.25)
    assert even == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))


def test_what_a_dashboard_gets_is_bounded_and_plain() -> None:
    row: dict[str, Any] = {
        "step": 7,
        "time": 1.0,
        "loss": 2.0,
        "note": "x" * 500,
        "ids": [1, 2],
        "val/loss": 3,
    }
    assert scalars(row) == {"train/loss": 2.0, "val/loss": 3}
    deep = row | {f"moe/layer{i}/counts": [1, 2, 3, 4] for i in range(200)}
    shown = scalars(deep)
    assert len(shown) <= 100
    assert shown["moe/max_share"] == pytest.approx(0.4)
    assert shown["moe/min_share"] == pytest.approx(0.1)
    assert "moe/layer3/entropy" in scalars(deep | {"step": 10})
    few = row | {f"moe/layer{i}/counts": [1, 2, 3, 4] for i in range(12)}
    assert len(scalars(few)) == 2 + 3 + 36
    lossy = few | {"moe/layer0/dropped": 0.1, "moe/layer1/dropped": 0.3}
    assert scalars(lossy)["moe/dropped"] == pytest.approx(0.2)
    assert scalars(lossy)["moe/layer1/dropped"] == 0.3


def test_lists_stay_whole_in_the_file_and_tensors_become_numbers(tmp_path: Path) -> None:
    class Scalar:
        def tolist(self) -> float:
            return 1.5

    tracker = JsonlTracker(tmp_path / "metrics.jsonl", start_step=0)
    tracker.log(1, {"moe/layer0/counts": list(range(64)), "loss": Scalar(), "bad": float("nan")})
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row["moe/layer0/counts"] == list(range(64))
    assert row["loss"] == 1.5
    assert math.isnan(row["bad"])


# ---- secrets


SECRETS = {
    "HF_TOKEN": "hf_QRSTUVWXYZabcdefghij",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCY",
    "OPENAI_API_KEY": "sk-proj-0123456789abcdefghij",
    "DATABASE_PASSWORD": "correct-horse-battery",
    "SLURM_JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJtZSJ9.c2lnbmF0dXJl",
    "SLURM_SITE_TOKEN": "site-token-987654321",
    "SLURM_JOB_COMMENT": "use hf_QRSTUVWXYZabcdefghij please",
    "GITHUB_PAT": "ghp_0123456789abcdefghijABCDEFGHIJ",
    "MY_CREDENTIALS": "plain-but-named-so",
}


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("export HF_TOKEN=abc123def", "abc123def"),
        ("curl -H 'Authorization: Bearer abcdefgh1234'", "abcdefgh1234"),
        ("https://me:pa55word@git.example.org/x.git", "pa55word"),
        ("git clone git@host; login --password hunter2hunter2", "hunter2hunter2"),
        ("key is AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
        ("ghp_0123456789abcdefghijABCDEFGHIJ", "ghp_01234"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "MIIE"),
        ("wandb_v1_abcdefghijklmnopqrstuvwxyz", "abcdefghijklmn"),
    ],
)
def test_secrets_are_taken_out_of_texts(text: str, hidden: str) -> None:
    assert hidden not in redact.redact_text(text)
    assert redact.HIDDEN in redact.redact_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "module load cuda/12.4",
        "train:512",
        "tokenizer=hub/name",
        "source /opt/x/activate",
        "key: value",
        "mlp2x_gelu",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact.redact_text(text.replace("key: value", "keys: value")) == text.replace(
        "key: value", "keys: value"
    )


def test_settings_are_redacted_by_name_and_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SITE_SECRET", "tulips-and-roses")
    spec = {
        "cluster": {"env": {"HF_TOKEN": "abc", "OMP": "1"}, "setup": ["echo tulips-and-roses"]},
        "tokens": 5,
    }
    assert redact.redact(spec) == {
        "cluster": {"env": {"HF_TOKEN": redact.HIDDEN, "OMP": "1"}, "setup": [f"echo {redact.HIDDEN}"]},
        "tokens": 5,
    }


def test_no_secret_reaches_the_server_or_its_files(
    server: WandbServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    config = {
        "cluster": {
            "env": {"WANDB_API_KEY": "1234567890" * 4, "NCCL_DEBUG": "INFO"},
            "setup": ["export HUB_TOKEN=planted-in-setup", "curl https://me:planted-in-url@example.org"],
        },
        "note": f"with {SECRETS['DATABASE_PASSWORD']}",
    }
    tracker = trackers(folder, RUN, config, WandbSpec(), rank=0, attempt=1, start_step=0)
    log(tracker, 1, 3)
    tracker.summary({"data": {"api_token": "planted-in-summary"}})
    tracker.table("answers", ["question"], [[f"what is {SECRETS['HF_TOKEN']}?"]])
    tracker.finish("finished")
    assert server.runs["demo-align"].steps == [1, 2, 3]
    sent = b"\n".join(server.payloads)
    files = b"\n".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"4242" in sent  # wandb did look at the environment
    planted = [
        "planted-in-setup",
        "planted-in-url",
        "planted-in-summary",
        "1234567890" * 4,
        *SECRETS.values(),
    ]
    for secret in planted:
        assert secret.encode() not in sent, secret
        assert secret.encode() not in files, secret


def test_the_mirror_gets_no_other_process_s_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-/tmp/gone.sock")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setenv("HF_TOKEN", "hf_QRSTUVWXYZabcdefghij")
    found = tracking.environment(tmp_path)
    assert "HF_TOKEN" not in found
    assert "WANDB_SERVICE" not in found
    assert found["WANDB_API_KEY"] == "k"


# ---- W&B


def test_one_run_over_requeues_with_each_step_once(server: WandbServer, folder: Path) -> None:
    """Preempted, then the whole node lost, then finished; the second and third redo steps."""
    first = start(folder)
    log(first, 1, 12)
    first.finish("preempted")
    assert server.runs["demo-align"].state == "preempted"

    second = start(folder, attempt=2, start_step=10)
    log(second, 11, 30)
    wait(lambda: is_online(folder, 2))
    assert ", after step 12\n" in (folder / "wandb" / "mirror_2.log").read_text()
    kill_mirror(second)

    third = start(folder, attempt=3, start_step=25)
    log(third, 26, 40)
    third.finish("finished")

    (run,) = server.runs.values()
    assert run.steps == list(range(1, 41))
    assert [row["train/step"] for row in run.history] == run.steps
    assert steps(folder / "metrics.jsonl") == run.steps
    assert run.state == "finished"
    assert (run.group, run.job_type, run.display_name) == ("demo", "align", "align lr=1e-3")
    assert run.tags == ["small"]
    assert run.config["train"]["value"] == {"optim": {"lr": 2e-5}}
    assert run.config["attempt"]["value"] == 3
    assert run.history[0]["moe/max_share"] == pytest.approx(3 / 7)
    assert run.history[19]["train/step_seconds_p50"] == 0.1


def test_a_killed_trainer_leaves_nothing_unsent(server: WandbServer, folder: Path) -> None:
    """SIGKILL of the trainer alone (out of memory): the mirror sends what the file has and ends."""
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom launch.spec import WandbSpec\n"
        "from launch.tracking import trackers\n"
        f"t = trackers(Path(sys.argv[1]), {RUN!r}, {{}}, WandbSpec(), rank=0, attempt=1, start_step=0)\n"
        "for step in range(1, 31): t.log(step, {'loss': 1.0})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT, check=False)
    wait(lambda: state(folder).get("closed"))
    assert server.runs["demo-align"].steps == list(range(1, 31))
    assert server.runs["demo-align"].state == "failed"
    wait(lambda: not mirror.alive(state(folder)["pid"]))


def test_a_server_that_is_down_at_the_start_gets_all_when_it_is_back(
    server: WandbServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurried(monkeypatch, RETRY_SECONDS=0.5, TICK_SECONDS=0.1)
    go = folder.with_name("go")
    wait_for = f"while os.getppid() == {os.getpid()} and not os.path.exists({str(go)!r}): time.sleep(0.01)"
    held = f"import os, time\n{wait_for}\n{WandbTracker.command[2]}"
    monkeypatch.setattr(WandbTracker, "command", (sys.executable, "-c", held))
    server.down = True
    tracker = start(folder)
    log(tracker, 1, 20)
    go.touch()  # who waits for the mirror, or the server, would wait still
    wait(lambda: state(folder).get("mode") == "offline")
    server.down = False
    wait(lambda: len(server.runs) == 1)
    log(tracker, 21, 30)
    tracker.finish("finished")
    assert server.runs["demo-align"].steps == list(range(1, 31))
    assert server.runs["demo-align"].state == "finished"


def test_an_outage_in_the_middle_holds_nothing_up(
    server: WandbServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = start(folder)
    log(tracker, 1, 10)
    wait(lambda: "demo-align" in server.runs)
    server.faults.append(outage := Fault("file_stream", status=503))
    log(tracker, 11, 199)
    wait(lambda: outage.seen)
    log(tracker, 200, 249)
    outage.times = outage.seen  # not before the last of them was logged
    tracker.finish("finished")
    assert server.runs["demo-align"].steps == list(range(1, 250))


def test_rows_that_the_server_refuses_are_sent_again(
    server: WandbServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a 4xx the client sends nothing more and says so nowhere."""
    hurried(monkeypatch, LAG_SECONDS=0)
    server.faults.append(Fault("file_stream", status=403, times=1))
    tracker = start(folder)
    log(tracker, 1, 10)
    tracker.finish("finished")
    assert server.faults[0].seen >= 1
    assert server.runs["demo-align"].steps == list(range(1, 11))
    assert state(folder)["delivered"]


def test_a_server_that_is_down_at_the_end_holds_up_only_as_long_as_there_is_time(
    server: WandbServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = start(folder)
    log(tracker, 1, 5)
    wait(lambda: is_online(folder))
    server.down = True
    log(tracker, 6, 10)
    tracker.finish("preempted", within=3.0)  # what is left after the warning and the save
    # The client itself gives up after FINISH_SECONDS, ten times as long: it was not waited for.
    assert "took too long to take the last rows" in capsys.readouterr().err
    assert not state(folder).get("closed")
    server.down = False
    later = start(folder, attempt=2, start_step=10)
    log(later, 11, 15)
    later.finish("finished")
    assert server.runs["demo-align"].steps == list(range(1, 16))


def test_a_mirror_that_dies_is_started_again(
    server: WandbServer, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = start(folder)
    log(tracker, 1, 10)
    wait(lambda: is_online(folder))
    kill_mirror(tracker)
    assert isinstance(tracker, Trackers)
    tracker.members[1]._next_look = 0.0  # type: ignore[attr-defined]
    log(tracker, 11, 20)
    tracker.finish("finished")
    assert server.runs["demo-align"].steps == list(range(1, 21))
    assert "starting it again" in capsys.readouterr().err


def test_signals_of_the_cluster_leave_the_mirror_alone(server: WandbServer, folder: Path) -> None:
    tracker = start(folder)
    log(tracker, 1, 10)
    wait(lambda: is_online(folder))
    for pid in descendants(state(folder)["pid"]):
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            os.kill(pid, number)
    log(tracker, 11, 20)
    tracker.finish("preempted")
    assert server.runs["demo-align"].steps == list(range(1, 21))
    assert server.runs["demo-align"].state == "preempted"


def test_a_client_that_dies_as_the_attempt_ends_takes_no_row_along(
    server: WandbServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurried(monkeypatch, TICK_SECONDS=5.0)  # the end comes before the mirror has looked again
    tracker = start(folder)
    log(tracker, 1, 20)
    wait(lambda: is_online(folder))
    core = [
        p for p in descendants(state(folder)["pid"]) if "wandb-core" in Path(f"/proc/{p}/comm").read_text()
    ]
    for pid in core:
        os.kill(pid, signal.SIGKILL)
    tracker.finish("finished")
    assert core
    assert server.runs["demo-align"].steps == list(range(1, 21))
    assert server.runs["demo-align"].state == "finished"


def test_a_tag_on_the_page_reaches_attempts_until_one_obeys(
    server: WandbServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurried(monkeypatch, ORDERS_SECONDS=0.2, TICK_SECONDS=0.1)
    monkeypatch.setattr(tracking, "LOOK_SECONDS", 0.0)
    tracker = start(folder)
    log(tracker, 1, 2)
    wait(lambda: is_online(folder) and "demo-align" in server.runs)
    assert tracker.asked() == frozenset()
    server.runs["demo-align"].tags += ["stop-after-save", "favourite"]
    step = iter(range(3, 10000))
    wait(lambda: tracker.log(next(step), {"loss": 1.0}) or "stop-after-save" in tracker.asked())
    assert tracker.asked() == {"stop-after-save"}
    tracker.finish("failed")  # killed before the save that would have obeyed
    assert sorted(server.runs["demo-align"].tags) == ["favourite", "small"]
    later = start(folder, attempt=2, start_step=2)
    wait(lambda: later.log(next(step), {"loss": 1.0}) or bool(later.asked()))
    obeying = Orders(lambda: False, lambda doing, step: None, later, save_every=1)
    assert obeying()
    obeying.note(RunFolder(folder))
    later.finish("preempted")
    last = start(folder, attempt=3, start_step=next(step) - 1)
    first = next(step)
    log(last, first, first + 3)
    last.finish("finished")
    assert last.asked() == frozenset()


def test_an_order_of_before_a_submission_counts_no_more(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    keep(folder, {"requeue"})
    assert kept(folder) == ["requeue"]
    folder.note("submitting", batch="b", index=0)
    assert kept(folder) == []


def test_artifacts_tables_and_summaries(server: WandbServer, folder: Path) -> None:
    from PIL import Image

    checkpoint = folder / "checkpoints" / "step_00000020"
    checkpoint.mkdir(parents=True)
    (checkpoint / "shard").write_bytes(b"weights")
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    tracker = start(folder)
    tracker.use({"run": "demo-parent", "digest": "cd" * 32})  # was never uploaded: stays wanted
    log(tracker, 1, 20)
    tracker.publish(type("Checkpoint", (), {"path": checkpoint, "step": 20})())
    tracker.publish_handoff(HANDOFF | {"path": "checkpoints/step_00000020", "shards": {}, "parent": None})
    tracker.table("answers", ["question", "picture"], [["what?", folder / "red.png"], ["why?", None]])
    tracker.summary({"data/replaced": 3})
    tracker.finish("finished")

    run = server.runs["demo-align"]
    assert run.steps == list(range(1, 21))
    artifact = server.artifact("checkpoint-demo-align:h-abababababab")
    assert {"latest", "step-20"} <= set(artifact.aliases)
    contents = json.loads(server.blobs[artifact.manifest])["contents"]
    assert contents["checkpoint/shard"]["ref"] == (checkpoint / "shard").as_uri()
    assert "handoff.json" in contents
    assert not any(b"weights" in payload for payload in server.payloads)
    assert run.summary["answers"]["nrows"] == 2
    assert run.summary["data/replaced"] == 3
    assert run.summary["checkpoint/step"] == 20
    assert any((folder / "red.png").read_bytes() in payload for payload in server.payloads)
    kinds = [
        json.loads(line)["kind"] for line in (folder / "wandb" / "wanted.jsonl").read_text().splitlines()
    ]
    assert kinds == ["use", "summary", "handoff", "table", "summary"]
    assert len(state(folder)["held"]) == 2  # the handoff and the table, not the parent's


def test_a_handoff_is_found_by_its_artifact_s_name(
    server: WandbServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = folder / "checkpoints" / "step_00000020"
    checkpoint.mkdir(parents=True)
    (checkpoint / "shard").write_bytes(b"weights")
    tracker = start(folder)
    handoff = HANDOFF | {
        "path": "checkpoints/step_00000020",
        "shards": {"shard": {"size": 7}},
        "parent": None,
    }
    tracker.publish_handoff(handoff)
    tracker.finish("finished")
    script = "from launch.online.session import fetch_handoff as f; import json, sys; print(json.dumps(f(sys.argv[1])))"
    place = "team/moe-vlm/checkpoint-demo-align:latest"
    done = subprocess.run([sys.executable, "-c", script, place], cwd=ROOT, check=True, capture_output=True)
    assert json.loads(done.stdout) == handoff | {"folder": str(folder)}


def test_offline_when_there_is_no_account(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    tracker = start(folder)
    log(tracker, 1, 10)
    tracker.finish("finished")
    assert state(folder)["mode"] == "offline"
    (path,) = segments.find(folder)
    found = segments.scan(path)
    assert (found.rows, found.first, found.last, found.closed) == (10, 1, 10, True)


def test_an_account_is_a_key_or_a_line_in_netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not reach.account("https://api.wandb.ai")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert reach.account("https://api.wandb.ai")
    assert not reach.account("https://wandb.example.org")
    (tmp_path / "netrc").write_text("machine wandb.example.org:8080 login user password x\n")
    assert reach.account("http://wandb.example.org:8080")  # as `wandb login` writes it
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert reach.account("https://wandb.example.org")


@pytest.mark.parametrize(
    ("spec", "environment"), [({"mode": "disabled"}, {}), ({}, {"WANDB_MODE": "disabled"})]
)
def test_disabled_leaves_the_rows_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, spec: Mapping[str, Any], environment: Mapping[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tracker = start(folder, **spec)
    log(tracker, 1, 3)
    tracker.publish_handoff(HANDOFF)
    tracker.finish("finished")
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_record_nothing(folder: Path) -> None:
    tracker = trackers(folder, RUN, {}, WandbSpec(), rank=1, attempt=1, start_step=0)
    log(tracker, 1, 3)
    tracker.finish("finished")
    assert not folder.exists()


def test_a_tracker_that_cannot_start_says_so_and_training_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(WandbTracker, "command", (str(folder / "no-such-python"),))
    tracker = start(folder)
    log(tracker, 1, 3)
    tracker.use({"no": "digest"})
    tracker.publish_handoff({"no": "digest"})
    tracker.finish("finished")
    assert steps(folder / "metrics.jsonl") == [1, 2, 3]
    assert "W&B: FileNotFoundError" in capsys.readouterr().err


def test_a_mirror_that_fails_is_reported_at_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(WandbTracker, "command", (sys.executable, "-c", "raise SystemExit(3)"))
    tracker = start(folder)
    log(tracker, 1, 3)
    tracker.finish("finished")
    assert "W&B: its process failed" in capsys.readouterr().err
    assert steps(folder / "metrics.jsonl") == [1, 2, 3]


def test_a_journal_that_cannot_be_counted_keeps_no_row_back(folder: Path) -> None:
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "attempt_1.json").write_text('{"id": "x"}')
    (folder / "attempts.jsonl").write_text('{"event": "start", "time": 1.0, "attempt": "1", "step": "x"}\n')
    seen = mirror.Mirror(folder, 1)
    assert seen.spent() == {}
    assert "goodput cannot be counted" in seen.state["note"]


def test_names_fit_and_stay_apart() -> None:
    assert tracking.safe("demo/lr=1e-3,k=2", 64) == "demo-lr-1e-3-k-2"
    long = [tracking.safe("x" * 70 + end, 64) for end in "ab"]
    assert long[0] != long[1]
    assert {len(name) for name in long} == {64}
