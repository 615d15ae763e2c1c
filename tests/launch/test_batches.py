"""Runs that were submitted and have not started: entries of their batch that read as folders, made once and whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launch import batches, cli, identity
from launch.batches import Batches, entry_of
from launch.files import read_json, write_json
from launch.operating import verbs
from launch.record import RunFolder, find_runs, of_element
from launch.spec import ExperimentSpec
from tests.launch import chain
from tests.launch.killed import run as run_and_kill

ROOT = Path(__file__).resolve().parents[2]
SWEEP = "sweep: {train.optim.lr: [1e-5, 2e-5, 3e-5]}\n"

scalars = st.none() | st.booleans() | st.integers(-2, 2) | st.floats(-2, 2) | st.text(max_size=3)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=8,
)
wholes = st.fixed_dictionaries({"run": trees, "spec": st.dictionaries(st.sampled_from("xyz"), trees)})


@given(wholes, wholes)
@example({"run": [1, 0.0], "spec": {"x": 0.0}}, {"run": [True, 0.0], "spec": {"x": -0.0}})
@settings(max_examples=150, deadline=None)
def test_what_differs_brings_back_the_whole_to_the_letter(
    one: dict[str, object], other: dict[str, object]
) -> None:
    """1, 1.0 and true are three settings, and -0.0 is not 0.0."""
    before = json.dumps(one)
    told = json.loads(json.dumps(batches.changes(one, other)))
    assert json.dumps(batches.applied(one, told), sort_keys=True) == json.dumps(other, sort_keys=True)
    assert json.dumps(one) == before


@pytest.mark.parametrize(
    ("section", "changed"),
    [
        (("train", "optim"), {"lr": 3e-5}),
        (("train",), {"save_every": 7, "precision": "fp32"}),
        (("moe",), {"layers": (0, 3), "capacity_factor": 1.0}),
        (("data",), {"mix": {"llava-ft": 1, "mine.json": 0.5}, "bad_samples": False}),
        (("cluster",), {"sbatch": {"mem": "4G"}, "walltime": ExperimentSpec("moe").cluster.grace}),
        ((), {"init_from": "hub:/a/folder", "seed": 1, "gpus": 16.0}),
        ((), {}),
    ],
)
def test_what_differs_between_two_specs_brings_back_the_other_to_the_letter(
    section: tuple[str, ...], changed: dict[str, Any]
) -> None:
    """Values, and values of another type; what two specs share is not mentioned."""
    one = ExperimentSpec("moe")
    inner: Any = one
    for name in section:
        inner = getattr(inner, name)
    other: Any = replace(inner, **changed)
    for depth in range(len(section), 0, -1):
        above: Any = one
        for name in section[: depth - 1]:
            above = getattr(above, name)
        other = replace(above, **{section[depth - 1]: other})
    told = json.loads(json.dumps(identity.changes(one, other, "spec")))
    assert sorted(path for path, _ in told) == sorted(["spec", *section, name] for name in changed)
    whole = batches.applied({"spec": identity.plain(one)}, told)
    assert json.dumps(whole, sort_keys=True) == json.dumps({"spec": identity.plain(other)}, sort_keys=True)


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = chain.fake_slurm(tmp_path / "bin")
    (found / "scancel").write_text(f'#!/bin/sh\necho "$@" >> {found}/cancelled\n')
    (found / "scancel").chmod(0o755)
    monkeypatch.setenv("PATH", chain.path_with(found))
    monkeypatch.setenv("DATA_ROOT", "/data")
    return found


@pytest.fixture
def command(tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """submit.py with an experiment, or runs.py; its exit code and what it said."""

    def call(*words: str) -> tuple[int, str]:
        runs = ["--runs", str(tmp_path / "runs")]
        code = cli.main(words) if words[0].endswith(".yaml") else verbs.main([*runs, *words])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def test_a_sweep_is_three_files_and_one_request_whatever_its_size(
    tmp_path: Path, slurm: Path, command: Command
) -> None:
    (slurm / "squeue").write_text(f"#!/bin/sh\necho asked >> {slurm}/asked\nexit 1\n")
    rates = ", ".join(f"{n}e-6" for n in range(1, 61))
    chain.write(tmp_path)
    with open(tmp_path / "s1.yaml", "a") as file:
        file.write(f"sweep: {{train.optim.lr: [{rates}]}}\n")
    assert command(str(tmp_path / "s1.yaml"))[0] == 0
    root = tmp_path / "runs"
    files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    made = sorted(path.name for path in files if path.parts[0] != "code")
    assert made == [".submit.lock", "batch.json", "plan.json", "script.sbatch"]
    assert len(list(slurm.glob("sent_*"))) == 1
    assert not (slurm / "asked").exists()


def test_a_batch_that_a_listing_does_not_show_yet_is_not_sent_again(
    tmp_path: Path, slurm: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where a login node may list a folder as it was a minute ago."""
    file, old, listing = str(chain.write(tmp_path)), tmp_path / "old", os.scandir
    old.mkdir()
    assert command(file)[0] == 0
    sent = sorted(slurm.glob("sent_*"))
    monkeypatch.setattr(os, "scandir", lambda path: listing(old if str(path).endswith("/batches") else path))
    code, said = command(file)
    assert code == 0
    assert sorted(slurm.glob("sent_*")) == sent
    assert "nothing to do" in said


@pytest.mark.parametrize(("host", "state"), [({}, "unknown"), ({"host": os.uname().nodename}, "stopped")])
def test_what_may_have_been_sent_is_unknown_while_slurm_is_away(
    tmp_path: Path, slurm: Path, command: Command, host: dict[str, str], state: str
) -> None:
    """The submitter died with its intent written; one on this machine has not started anything then."""
    file = str(chain.write(tmp_path).with_name("s1.yaml"))
    assert command(file)[0] == 0
    (batch,) = tmp_path.glob("runs/batches/*/batch.json")
    write_json(batch, {"state": "intent", "token": batch.parent.name, **host})
    assert "queued" in command("status")[1]
    (slurm / "squeue").write_text(
        "#!/bin/sh\necho squeue: error: Unable to contact slurm controller >&2; exit 1\n"
    )
    said = command("status")[1]
    assert state in said
    assert ("whether it took the job is not known" in said) is (state == "unknown")
    assert ("never started" in said) is (state == "stopped")
    assert "#SBATCH" not in command(file, "--dry-run")[1] or state == "stopped"
    (slurm / "squeue").write_text("#!/bin/sh\n")
    assert "never started" in command("status")[1]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_named_with_the_way_out(
    tmp_path: Path, slurm: Path, command: Command, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    file = str(chain.write(tmp_path))
    assert command(file)[0] == 0

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))  # Lustre, mounted without `flock`

    monkeypatch.setattr(fcntl, "flock", refuse)
    (slurm / "squeue").write_text("#!/bin/sh\n")  # none of them is in the queue any more
    for words in ([file], ["resubmit", "-y", "s1"]):
        code, said = command(*words)
        assert code == 1, said
        assert f"{tmp_path / 'runs'} cannot be locked ({os.strerror(number)})" in said
        assert "`flock`" in said
        assert "runs=FOLDER" in said


def test_a_run_that_waits_reads_as_one_with_a_folder(tmp_path: Path, slurm: Path, command: Command) -> None:
    file = chain.write(tmp_path, sweep2=SWEEP).with_name("s2.yaml")
    assert command(str(file))[0] == 0
    root = tmp_path / "runs"
    assert sorted(path.name for path in root.iterdir()) == [".submit.lock", "batches", "code"]
    names = ["s1", "s2/lr=1e-5", "s2/lr=2e-5", "s2/lr=3e-5"]
    assert json.loads(command("list", "--json")[1]) == [
        name if "/" in name else f"{name}/run" for name in names
    ]
    runs = find_runs(root)
    for folder in runs:
        assert not folder.made
        before = folder.run, folder.spec, folder.journal, folder.last("submitting")
        assert folder.make()
        assert (folder.run, folder.spec, folder.journal, folder.last("submitting")) == before
        assert read_json(folder.run_file) == before[0]
        shutil.rmtree(folder.path)
        os.unlink(next(root.glob(f"batches/{Path(before[2][0]['batch']).name}/made/{before[2][0]['index']}")))
    assert [folder.spec["train"]["optim"]["lr"] for folder in runs[1:]] == [1e-5, 2e-5, 3e-5]
    rows = json.loads(command("status", "--json")[1])
    assert [row["name"] for row in rows] == ["queued"] * 4
    assert "lr=2e-5" in command("explain", "s2/lr=2e-5")[1]
    assert "train.optim.lr" in command("diff", "s2/lr=2e-5", "s2/lr=3e-5")[1]
    assert command("status", "101_1")[1].count("s2/") == 1  # by SLURM's number
    assert not any(folder.path.exists() for folder in runs)  # looking makes nothing


def test_what_is_cancelled_before_its_start_stays_cancelled(
    tmp_path: Path, slurm: Path, command: Command
) -> None:
    file = chain.write(tmp_path, sweep2=SWEEP).with_name("s2.yaml")
    command(str(file))
    root = tmp_path / "runs"
    assert command("cancel", "s2/lr=2e-5", "-y")[0] == 0
    assert (slurm / "cancelled").read_text().split() == ["101_1"]
    queue = (slurm / "queue").read_text().splitlines()
    (slurm / "queue").write_text("\n".join(line for line in queue if not line.startswith("101_1|")) + "\n")
    folder = RunFolder(root / "s2" / "lr=2e-5")
    assert [record["event"] for record in folder.journal] == ["submitting", "cancelled"]
    assert "cancelled" in command("status", "s2/lr=2e-5")[1]
    # Its folder removed, it is forgotten, though its batch is there; and may be asked for again.
    shutil.rmtree(folder.path)
    assert "no such run" in command("status", "s2/lr=2e-5")[1]
    assert "1 run(s)" in command(str(file))[1]
    assert [record["event"] for record in folder.journal] == ["submitting"]


def test_what_waits_for_what_failed_is_cancelled_as_an_array(
    tmp_path: Path, slurm: Path, command: Command
) -> None:
    """Element by element SLURM 22.05 would forget the array, and start what waits for that."""
    file = chain.write(tmp_path, sweep2=SWEEP, sweep3=SWEEP)
    command(str(file))
    (slurm / "queue").write_text("".join(f"102_{i}|PENDING|DependencyNeverSatisfied||x\n" for i in range(3)))
    code, said = command(str(file))
    assert (code, said.count("submitted")) == (0, 3), said
    assert (slurm / "cancelled").read_text().split() == ["102"]


def test_another_run_may_take_the_place_of_one_that_never_will_be(
    tmp_path: Path, slurm: Path, command: Command
) -> None:
    file = chain.write(tmp_path, sweep2=SWEEP).with_name("s2.yaml")
    command(str(file))
    code, said = command(str(file), "train.steps=7")
    assert code == 2
    assert "s2/lr=1e-5 will hold another run: train.steps was 5, is 7" in said
    assert "or cancel that one (runs.py cancel s2/lr=1e-5)" in said
    (slurm / "queue").write_text("100_0|PENDING|Priority||x\n")
    code, said = command(str(file), "train.steps=7")
    assert (code, "3 run(s) after afterok:100_0" in said) == (0, True), said
    folder = RunFolder(tmp_path / "runs" / "s2" / "lr=1e-5")
    assert folder.spec["train"]["steps"] == 7
    # A job of the first, should there be one after all, does not train the second's.
    first, second = sorted(
        tmp_path.glob("runs/batches/s2*"), key=lambda path: (read_json(path / "batch.json") or {})["job"]
    )
    assert of_element(first, "0") == of_element(second, "0") == folder
    folder.make(entry_of(str(second), "0"))
    assert of_element(second, "0").journal[-1]["batch"] == str(second)
    with pytest.raises(LookupError, match="holds another run than the one that this job was submitted for"):
        of_element(first, "0")


def entries(tmp_path: Path) -> Path:
    """A batch of one run that waits."""
    root = tmp_path / "runs"
    batch = root / "batches" / "t-0"
    whole = {"run": {"id": "x", "name": "e/run", "stage": "align", "parent": None}, "spec": {"steps": 5}}
    batch.mkdir(parents=True)
    (batch / "plan.json").write_text(
        batches.text("/code", 1.0, str(root), {"0": str(root / "e" / "run")}, whole, {"0": []})
    )
    write_json(batch / "batch.json", {"state": "submitted", "token": "t-0", "job": "7"})
    return batch


def whole(folder: RunFolder) -> bool:
    return (
        read_json(folder.run_file) == {"id": "x", "name": "e/run", "stage": "align", "parent": None}
        and read_json(folder.spec_file) == {"steps": 5}
        and [record["event"] for record in folder.journal] == ["submitting"]
    )


def test_a_folder_is_made_once_by_all_who_try_and_by_the_next_where_one_was_killed(tmp_path: Path) -> None:
    batch = entries(tmp_path)
    folder = of_element(batch, "0")
    died, n = True, 0
    while died:
        n += 1
        status, _, where = run_and_kill(lambda: int(not folder.make(entry_of(str(batch), "0"))), n)
        died = os.WIFSIGNALED(status)
        assert folder.made or find_runs(tmp_path / "runs") == [folder], where
        assert folder.run["id"] == "x"
        folder.make(entry_of(str(batch), "0"))
        assert whole(folder), where
        shutil.rmtree(tmp_path / "runs" / "e")
        shutil.rmtree(batch / "made", ignore_errors=True)
    assert n > 8
    # What was left of an earlier submission's attempt at it does not count.
    write_json(folder.spec_file, {"steps": 4})
    folder.journal_file.write_text('{"event": "submitting", "batch": "other", "index": 3, "time": 0.5}\n')
    folder.make(entry_of(str(batch), "0"))
    assert [record["batch"] for record in folder.journal] == ["other", str(batch)]
    assert folder.spec == {"steps": 5}
    shutil.rmtree(tmp_path / "runs" / "e")
    code = "import sys; from pathlib import Path; from launch.batches import entry_of; from launch.record import *\n"
    code += "sys.stdin.read(); f = of_element(Path(sys.argv[1]), '0'); f.make(entry_of(sys.argv[1], '0'))\n"
    code += "f.note('launched')"
    racers = [
        subprocess.Popen([sys.executable, "-c", code, str(batch)], cwd=ROOT, stdin=subprocess.PIPE)
        for _ in range(6)
    ]
    for racer in racers:
        assert racer.stdin
        racer.stdin.close()
    assert [racer.wait(30) for racer in racers] == [0] * 6
    assert [record["event"] for record in folder.journal] == ["submitting"] + ["launched"] * 6
    assert sorted(path.name for path in folder.path.iterdir()) == ["attempts.jsonl", "run.json", "spec.json"]


def test_a_batch_without_an_intent_was_never_sent_and_a_moved_folder_is_found(tmp_path: Path) -> None:
    batch = entries(tmp_path)
    assert Batches().entry(str(tmp_path / "runs" / "e" / "run"))
    (tmp_path / "elsewhere").symlink_to(tmp_path / "runs")
    assert [folder.run["id"] for folder in find_runs(tmp_path / "elsewhere")] == ["x"]
    torn = batch.with_name("t-1")
    write_json(torn / "batch.json", {"state": "intent"})
    (torn / "plan.json").write_text("{")
    assert len(find_runs(tmp_path / "runs")) == 1
    (batch / "batch.json").unlink()
    assert find_runs(tmp_path / "runs") == []
