"""The second door over run folders in each state, without SLURM's accounting and without SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.files import write_json
from launch.operating import verbs
from launch.record import RunFolder
from tests.launch import chain

ROOT = Path(__file__).resolve().parents[2]


def call(runs: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "runs.py"), "--runs", str(runs), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": path or os.environ["PATH"]},
    )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Runs in five states, of one array with SLURM's id 100."""
    root = tmp_path / "runs"
    batch = root / "batches" / "t-0"
    write_json(batch / "batch.json", {"state": "submitted", "token": "t-0", "job": "100"})
    for index, name in enumerate(["done", "running", "queued", "failed", "cancelled", "new"]):
        folder = RunFolder(root / "sweep" / name)
        write_json(folder.run_file, {"id": f"sweep-{name}-1234", "stage": "moe"})
        if name != "new":
            folder.note("submitting", batch=str(batch), index=index)
        if name in ("done", "running", "failed"):
            folder.note("start", attempt=f"100_{index}-0", steps=50)
            folder.metrics_file.write_text('{"step": 7, "loss": 2.5}\n')
            log = folder.log_of(f"100_{index}-0", 0)
            log.parent.mkdir(parents=True)
            log.write_text(f"rank 0 of {name}\n")
        if name == "done":
            write_json(folder.handoff_file, {"step": 50})
        if name == "failed":
            folder.note("verdict", attempt="100_3-0", verdict="error", reason="ValueError: 3", again=False)
            folder.log_of("100_3-0", 1).write_text("Traceback of rank 1\n")
            write_json(folder.logs("100_3-0") / "failure_1.json", {"kind": "error"})
        if name == "cancelled":
            folder.note("cancelled", by="me")
    return root


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH with a squeue that knows two of the elements."""
    slurm = chain.fake_slurm(tmp_path / "bin")
    (slurm / "queue").write_text("100_1|RUNNING|None|n[1-2]|t-0\n100_2|PENDING|Priority||t-0\n")
    for name in ("scancel", "scontrol"):
        (slurm / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {slurm}/called\n')
    (slurm / "sacct").write_text(f"#!/bin/sh\necho sacct >> {slurm}/asked\ncat {slurm}/past\n")
    asking = (
        (slurm / "squeue")
        .read_text()
        .replace("import pathlib\n", f"import pathlib\nopen('{slurm}/asked', 'a').write('squeue\\n')\n")
    )
    (slurm / "squeue").write_text(asking)
    for name in ("scancel", "scontrol", "sacct"):
        (slurm / name).chmod(0o755)
    return chain.path_with(slurm)


def test_list_names_the_runs(runs: Path) -> None:
    done = call(runs, "list")
    assert done.stdout.split() == [
        f"sweep/{n}" for n in ("cancelled", "done", "failed", "new", "queued", "running")
    ]
    assert json.loads(call(runs, "list", "--json", "sweep/new").stdout) == ["sweep/new"]


def test_status_tells_each_state(runs: Path, path: str) -> None:
    rows = {row["run"]: row for row in json.loads(call(runs, "status", "--json", path=path).stdout)}
    assert {name.split("/")[1]: row["name"] for name, row in rows.items()} == {
        n: n for n in ("cancelled", "done", "failed", "new", "queued", "running")
    }
    assert rows["sweep/running"]["step"] == 7
    assert rows["sweep/running"]["job"] == "100_1"
    assert rows["sweep/queued"]["reason"] == "Priority"
    assert rows["sweep/failed"]["reason"] == "error: ValueError: 3"
    text = call(runs, "status", path=path).stdout
    assert "7/50" in text
    assert "n[1-2]" in text


def test_many_who_watch_ask_slurm_once_and_one_look_asks_it_always(runs: Path, path: str) -> None:
    asked = Path(path.partition(":")[0], "asked")
    for _ in range(3):
        call(runs, "wait", "--timeout", "0.1", "--every", "60", path=path)
    assert asked.read_text().split().count("squeue") <= 2  # and one whether something is held
    first = asked.read_text().split().count("squeue")
    text = call(runs, "status", path=path).stdout
    assert asked.read_text().split().count("squeue") == first + 1
    assert "n[1-2]" in text
    kept = next(runs.glob(".queue_*.json"))
    kept.write_text(kept.read_text().replace('"time": 1', '"time": -1'))  # long ago
    call(runs, "wait", "--timeout", "0.1", "--every", "60", path=path)
    assert asked.read_text().split().count("squeue") == first + 2


def test_without_slurm_what_was_submitted_is_unknown_and_the_rest_is_told(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = call(runs, "status", "--json", path=str(tmp_path / "empty"))
    states = {row["run"].split("/")[1]: row["name"] for row in json.loads(done.stdout)}
    assert states["done"] == "done"
    assert states["new"] == "new"
    assert states["running"] == "unknown"


def test_exit_code_says_whether_all_are_done(runs: Path, path: str) -> None:
    assert call(runs, "status", "--exit-code", "sweep/done", path=path).returncode == 0
    assert call(runs, "status", "--exit-code", path=path).returncode == 1


def test_logs_open_the_rank_that_failed(runs: Path) -> None:
    assert call(runs, "logs", "failed").stdout == "Traceback of rank 1\n"
    assert call(runs, "logs", "failed", "--rank", "0").stdout == "rank 0 of failed\n"
    assert call(runs, "logs", "100_0").stdout == "rank 0 of done\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status", "nothing"], "nothing: no such run"),
        (["logs"], "logs shows one run, and 6 are meant"),
        (["logs", "new"], "has not started"),
        (["logs", "done", "--attempt", "9"], "9: no such attempt; there are 100_0-0"),
        (["logs", "done", "--rank", "5"], "rank_5.log: no such log"),
        (["cancel", "sweep"], "2 runs would be cancelled; say -y"),
    ],
)
def test_what_a_wrong_command_says(runs: Path, path: str, arguments: list[str], words: str) -> None:
    done = call(runs, *arguments, path=path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_empty_folder_has_no_runs(tmp_path: Path) -> None:
    assert "no runs in" in call(tmp_path, "status").stdout


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("sweep/done", ["done"]),
        ("sweep", ["cancelled", "done", "failed", "new", "queued", "running"]),
        ("sweep/", ["cancelled", "done", "failed", "new", "queued", "running"]),
        ("*/[dq]*", ["done", "queued"]),
        ("ne", ["done", "new"]),
        ("unning", ["running"]),
        ("sweep-failed-1234", ["failed"]),
        ("sweep-fai", ["failed"]),
        ("100_3", ["failed"]),
        ("100", ["cancelled", "done", "failed", "queued", "running"]),
    ],
)
def test_addresses(runs: Path, word: str, names: list[str]) -> None:
    assert json.loads(call(runs, "list", "--json", word).stdout) == [f"sweep/{name}" for name in names]


def test_an_experiments_yaml_names_its_runs(tmp_path: Path) -> None:
    file = chain.write(tmp_path)
    write_json(RunFolder(tmp_path / "runs" / "s3" / "run").run_file, {"id": "x"})
    write_json(RunFolder(tmp_path / "runs" / "s33" / "run").run_file, {"id": "y"})
    assert json.loads(call(tmp_path / "runs", "list", "--json", str(file)).stdout) == ["s3/run"]


@pytest.mark.parametrize("verb", ["cancel", "requeue", "resubmit", "explain", "logs"])
def test_what_changes_runs_takes_a_part_of_a_name_only_where_one_run_has_it(runs: Path, verb: str) -> None:
    done = call(runs, verb, "ne")
    assert done.returncode == 2
    assert "ne may mean sweep/done, sweep/new; say more of the name" in done.stderr


def test_cancel_names_them_notes_who_and_ends_them(runs: Path, path: str, tmp_path: Path) -> None:
    done = call(runs, "cancel", "sweep", "-y", path=path)
    assert done.returncode == 0, done.stderr
    assert "sweep/queued  queued  100_2" in done.stdout
    assert "cancelled 2 run(s)" in done.stdout
    assert (tmp_path / "bin" / "called").read_text() == "scancel 100_2 100_1\n"
    assert RunFolder(runs / "sweep" / "queued").last("cancelled") is not None
    again = call(runs, "cancel", "done", "--json", path=path)
    assert json.loads(again.stdout) == {"cancel": []}


def test_requeue_saves_first_and_says_what_it_cannot_do(runs: Path, path: str, tmp_path: Path) -> None:
    log = tmp_path / "bin" / "called"
    done = call(runs, "requeue", "running", path=path)
    assert (done.returncode, "goes back into the queue when it has" in done.stdout) == (0, True), done.stderr
    assert call(runs, "requeue", "running", "--now", path=path).returncode == 0
    assert log.read_text().splitlines() == ["scancel --signal=USR2 100_1", "scontrol requeue 100_1"]
    assert "it is in the queue already" in call(runs, "requeue", "queued", path=path).stderr
    refused = call(runs, "requeue", "failed", path=path)
    assert refused.returncode == 1
    assert "SLURM no longer has job 100_3; `runs.py resubmit sweep/failed` submits it anew" in refused.stderr
    # As long as SLURM remembers the job, it is the same job again, with its budgets anew.
    with open(tmp_path / "bin" / "queue", "a") as queue:
        queue.write("100_3|FAILED|NonZeroExitCode|n1|t-0\n100_4|PENDING|JobHeldUser||t-0\n")
    assert call(runs, "requeue", "failed", path=path).returncode == 0
    events = [record["event"] for record in RunFolder(runs / "sweep" / "failed").journal]
    assert events[-3:] == ["requeued", "released", "submitting"]
    assert "held" in call(runs, "status", "cancelled", path=path).stdout
    assert "released; it waits" in call(runs, "requeue", "cancelled", path=path).stdout
    assert log.read_text().splitlines()[2:] == ["scontrol requeue 100_3", "scontrol release 100_4"]


def test_throttle_limits_the_array_once(runs: Path, path: str, tmp_path: Path) -> None:
    done = call(runs, "throttle", "sweep", "3", path=path)
    assert done.stdout == "array 100: at most 3 at a time\n"
    assert (tmp_path / "bin" / "called").read_text() == "scontrol update JobId=100 ArrayTaskThrottle=3\n"
    assert call(runs, "throttle", "sweep", "0", path=path).stdout == "array 100: no limit\n"
    assert "nothing to throttle" in call(runs, "throttle", "done", "3", path=path).stdout
    assert (
        "limit: expected a whole number from 0 on, got '-1'"
        in call(runs, "throttle", "sweep", "--", "-1", path=path).stderr
    )


def test_wait_ends_when_nothing_is_open(runs: Path, path: str) -> None:
    assert call(runs, "wait", "done", path=path).returncode == 0
    failed = call(runs, "wait", "done", "failed", path=path)
    assert (failed.returncode, "error: ValueError: 3" in failed.stdout) == (1, True)
    late = call(runs, "wait", "running", "--timeout", "0.2", path=path)
    assert (late.returncode, "not over after 0.2 s" in late.stderr) == (1, True)


def test_cost_has_a_line_for_all(runs: Path, path: str) -> None:
    lines = call(runs, "status", "--cost", path=path).stdout.splitlines()
    assert lines[0].split()[6:] == [
        "GPU-h",
        "goodput",
        "queue",
        "start",
        "load",
        "train",
        "replay",
        "save",
        "eval",
        "lost",
    ]
    assert lines[-1].startswith("all ")
    rows = json.loads(call(runs, "status", "--cost", "--json", path=path).stdout)
    assert all("gpu_hours" in row["cost"] for row in rows)


def test_slurm_is_asked_once_and_accounting_once(runs: Path, path: str, tmp_path: Path) -> None:
    silent = RunFolder(runs / "sweep" / "silent")
    write_json(silent.run_file, {"id": "s"})
    silent.note("submitting", batch=str(runs / "batches" / "t-0"), index=9)
    (tmp_path / "bin" / "past").write_text("100_9|CANCELLED by 1007|0:0|5|6|7|n1\n")
    rows = {row["run"]: row for row in json.loads(call(runs, "status", "--json", path=path).stdout)}
    assert (rows["sweep/silent"]["name"], rows["sweep/silent"]["reason"]) == (
        "cancelled",
        "by user 1007 with scancel",
    )
    (tmp_path / "bin" / "past").write_text("100_9|OUT_OF_MEMORY|0:125|5|6|7|n1\n")
    assert "(accounting says OUT_OF_MEMORY)" in call(runs, "status", "silent", path=path).stdout
    assert "more memory than its node" in call(runs, "explain", "silent", path=path).stdout
    asked = (tmp_path / "bin" / "asked").read_text().splitlines()
    assert asked == ["squeue", "sacct"] * 3


def test_runs_whose_parent_failed_say_so(runs: Path, path: str, tmp_path: Path) -> None:
    below = {"parent": str(runs / "sweep" / "failed"), "stage": "moe"}
    for index, name in ((7, "waits"), (8, "gone")):
        folder = RunFolder(runs / "below" / name)
        write_json(folder.run_file, {"id": name, "name": f"below/{name}", **below})
        folder.note("submitting", batch=str(runs / "batches" / "t-0"), index=index)
    deeper = RunFolder(runs / "below" / "deeper")
    write_json(deeper.run_file, {"id": "d", "name": "below/deeper", "parent": str(runs / "below" / "gone")})
    deeper.note("submitting", batch=str(runs / "batches" / "t-0"), index=10)
    record = RunFolder(runs / "sweep" / "failed")
    write_json(record.run_file, {**record.run, "name": "sweep/failed"})
    with open(tmp_path / "bin" / "queue", "a") as queue:
        queue.write("100_7|PENDING|DependencyNeverSatisfied||t-0\n")
    rows = {row["run"]: row for row in json.loads(call(runs, "status", "below", "--json", path=path).stdout)}
    assert (rows["below/waits"]["name"], rows["below/waits"]["reason"]) == ("blocked", "sweep/failed failed")
    for name in ("gone", "deeper"):
        found = rows[f"below/{name}"]
        assert (found["name"], found["reason"]) == (
            "cancelled",
            "cancelled by SLURM because sweep/failed failed",
        )


def test_a_run_is_explained(runs: Path, path: str) -> None:
    done = call(runs, "explain", "failed", path=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sweep/failed  failed, step 7/50\n")
    assert "why: Its last attempt failed with an error: ValueError: 3." in done.stdout
    story = json.loads(call(runs, "explain", "queued", "--json", path=path).stdout)
    assert (story["run"], story["cause"]) == ("sweep/queued", "priority")


def resubmit(root: Path, slurm: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return call(root, "resubmit", *arguments, path=chain.path_with(slurm))


def test_what_failed_is_submitted_anew_with_what_waited_for_it(tmp_path: Path) -> None:
    slurm = chain.fake_slurm(tmp_path / "bin")
    sweep = "sweep: {train.optim.lr: [1e-5, 2e-5, 3e-5]}\n"
    file = chain.write(tmp_path, sweep2=sweep, sweep3=sweep)
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), str(file)]
    env = {**os.environ, "PATH": chain.path_with(slurm)}
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=60)
    root = tmp_path / "runs"
    RunFolder(root / "s1" / "run").make()
    write_json(RunFolder(root / "s1" / "run").handoff_file, {"step": 5})
    for index, lr in enumerate(("1e-5", "2e-5", "3e-5")):
        folder = RunFolder(root / "s2" / f"lr={lr}")
        folder.note("start", attempt=f"101_{index}-0", number=0, steps=5)
        if lr == "2e-5":
            write_json(folder.handoff_file, {"step": 5})
        else:
            folder.note(
                "verdict", attempt=f"101_{index}-0", verdict="error", reason="ValueError", again=False
            )
    (slurm / "queue").write_text("102_1|PENDING|Priority||x\n")  # what could start; the rest is cancelled
    refused = resubmit(root, slurm, "s3/lr=1e-5", "-y")
    assert refused.returncode == 2
    assert (
        "s3/lr=1e-5 starts from s2/lr=1e-5, which is failed: runs.py resubmit s2/lr=1e-5 s3/lr=1e-5"
        in refused.stderr
    )
    assert "4 runs would be resubmitted; say -y" in resubmit(root, slurm, "--only", "failed").stderr
    done = resubmit(root, slurm, "--only", "failed", "-y", "--json")
    assert done.returncode == 0, done.stderr
    jobs = json.loads(done.stdout)["resubmit"]
    assert [(job["runs"], job["dependency"]) for job in jobs] == [
        (["s2/lr=1e-5", "s2/lr=3e-5"], ""),
        (["s3/lr=1e-5", "s3/lr=3e-5"], "aftercorr:103"),
    ]
    folder = RunFolder(root / "s2" / "lr=3e-5")
    assert [r["event"] for r in folder.journal][-2:] == ["submitting", "released"]
    assert folder.last("submitting")["index"] == 2  # type: ignore[index]
    assert "nothing to resubmit" in resubmit(root, slurm, "--only", "failed", "-y").stderr


def test_a_run_that_would_be_another_with_this_code_is_not_submitted(tmp_path: Path) -> None:
    slurm = chain.fake_slurm(tmp_path / "bin")
    command = [
        sys.executable,
        str(ROOT / "launch" / "submit.py"),
        str(chain.write(tmp_path)),
        "--only",
        "align",
    ]
    subprocess.run(
        command, env={**os.environ, "PATH": chain.path_with(slurm)}, check=True, capture_output=True
    )
    (slurm / "queue").write_text("")
    folder = RunFolder(tmp_path / "runs" / "s1" / "run")
    folder.make()
    record = folder.run
    write_json(folder.run_file, {**record, "identity": "0" * 64})
    done = resubmit(tmp_path / "runs", slurm, "s1")
    assert done.returncode == 2
    assert "s1/run would not be the same run with this code" in done.stderr
    write_json(folder.run_file, {**record, "code": "gone"})
    assert "is gone: without --same-code" in resubmit(tmp_path / "runs", slurm, "s1", "--same-code").stderr


@pytest.mark.parametrize(
    "file", ["run.json", "spec.json", "attempts.jsonl", "metrics.jsonl", "handoff.json", "eval.json"]
)
@pytest.mark.parametrize(
    "damage", [b"\xff\xfe\x00junk\n", b'{"step": null, "time": null, "cluster": null}\n', None]
)
def test_a_damaged_file_takes_no_other_run_with_it(
    runs: Path,
    file: str,
    damage: bytes | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", "")  # without a squeue to wait for
    run = next(path.parent for path in runs.rglob("run.json") if "failed" in path.parts)
    (run / file).unlink(missing_ok=True)
    if damage is None:
        (run / file).mkdir()
    else:
        (run / file).write_bytes(damage)
    for verb in (["explain", "sweep/failed"], ["status", "--cost", "--json"], ["status"]):
        assert verbs.main(["--runs", str(runs), *verb]) == 0
    assert "sweep/done" in capsys.readouterr().out
