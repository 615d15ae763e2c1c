"""Slips on the command line of submit.py: told in words, with what to do, before SLURM is asked for anything."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from launch.operating import verbs
from launch.snapshot import REPOSITORY

from . import chain

STAGE3 = str(REPOSITORY / "experiments" / "stage3_moe.yaml")
DEMO = str(REPOSITORY / "experiments" / "demo" / "stage1_align.yaml")


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code, and what is said of it."""
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = int(str(end.code))
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("name an experiment", "stage3_moe.yaml")),
        (["stage3_mo"], ("stage3_mo: no such experiment", "did you mean experiments/stage3_moe.yaml?")),
        (["experiments"], ("experiments: is a folder", "experiments/ has stage1_align.yaml")),
        (["x" * 300], ("no such experiment", "experiments/ has")),
        ([STAGE3, "--dryrun"], ("--dryrun: no such option", "did you mean --dry-run?")),
        ([STAGE3, "--max-gpu-hours", "nan"], ("--max-gpu-hours: expected a number above 0, got 'nan'",)),
        (
            [STAGE3, "gpus", "train.x=1", "seed=x"],
            ("1:1: error: expected key=value", "2:1: error: train.x", "3:6:"),
        ),
        ([STAGE3, STAGE3], ("expected key=value", "one experiment at a time")),
        ([STAGE3, "seed=1", "foo:seed=2"], ("<command line>:2:1: error: foo: no experiment", "foo:seed=2")),
        (
            [STAGE3, "seed=1", "stage2_instruct:train.steps=x"],
            (
                "<command line>:2:29: error: train.steps: expected a whole number",
                "    2 | stage2_instruct:train",
            ),
        ),
        ([STAGE3, "sweep={moe.top_k: []}"], ("write moe.top_k: [...]",)),
    ],
)
def test_a_slip_is_told_with_its_place_and_a_way_out(
    arguments: list[str],
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(REPOSITORY)
    code, said = told(capsys, *arguments)
    assert code == 2
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("root", "words"),
    [
        (None, "data.root is $DATA_ROOT, and that variable is not set"),
        ("data", "data.root is 'data': ranks start in another folder, it must be absolute"),
        ("HERE", "data.mix: HERE: there is no llava_image_.json"),
    ],
)
def test_data_that_no_rank_would_find_are_told_before_slurm_is_asked(
    root: str | None,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("DATA_ROOT", raising=False)
    if root:
        monkeypatch.setenv("DATA_ROOT", root.replace("HERE", str(tmp_path)))
    monkeypatch.setenv("PATH", "")
    code, said = told(capsys, STAGE3, "--until", "align", f"runs={tmp_path / 'runs'}")
    assert (code, words.replace("HERE", str(tmp_path)) in said) == (2, True)
    assert cli.main([STAGE3, "--until", "align", "--dry-run", f"runs={tmp_path / 'runs'}"]) == 0


def test_a_folder_that_only_the_nodes_may_have_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCRATCH", "/not/here")
    monkeypatch.setenv("PATH", "")
    code, said = told(capsys, STAGE3, "data.root=$SCRATCH", f"runs={tmp_path / 'runs'}")
    assert code == 3
    assert "note: data.root is $SCRATCH: jobs do not take that variable over from this shell" in said
    assert "note: data.root: there is no folder /not/here on this machine; the nodes must have it" in said
    assert "submit from a login node" in said


@pytest.mark.parametrize(
    ("python", "executor", "refused"),
    [
        ("/not/here", "local", True),
        ("bin/sh", "local", True),
        ("/bin/sh", "local", False),
        ("/not/here", "slurm", False),
    ],
)
def test_an_interpreter_that_this_machine_would_need_and_lacks_is_told(
    python: str, executor: str, refused: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"cluster.python={python}", f"cluster.executor={executor}", f"data.root={tmp_path}"]
    said = told(capsys, STAGE3, *settings, "--dry-run", f"runs={tmp_path / 'runs'}")[1]
    assert (f"cluster.python: there is no program {python} on this machine" in said) is refused


def test_a_dry_run_says_what_is_over_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = chain.write(tmp_path)
    code, said = told(capsys, str(file), "--dry-run", "--max-gpu-hours", "3")
    assert (code, "may use 12.0 GPU-hours, and the limit is 3.0" in said) == (4, True)
    assert told(capsys, str(file), "--dry-run", "--max-gpu-hours", "3", "-y")[0] == 0


def test_a_file_that_is_no_specification_is_not_read_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "big.yaml").write_text("stage: align\n" + "a: 1\n" * 300_000)
    assert "big.yaml: error: is over 1 MB: no specification" in told(capsys, str(tmp_path / "big.yaml"))[1]
    (tmp_path / "wide.yaml").write_text(f"# {'x' * 900}\nstage: {'x' * 900} #\n")
    said = told(capsys, str(tmp_path / "wide.yaml"))[1]
    assert max(map(len, said.splitlines())) < 300


def test_a_file_whose_name_cannot_be_the_experiments_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain.write(tmp_path)
    file = (tmp_path / "s1.yaml").rename(tmp_path / "s|1.yaml")  # squeue's answer is split at |
    code, said = told(capsys, str(file), "--dry-run")
    assert (code, "s|1.yaml: error: 's|1' cannot name a folder of runs" in said) == (2, True)
    assert told(capsys, str(file), "name=s1", "--dry-run")[0] == 0


def test_ctrl_c_ends_it_in_words(tmp_path: Path) -> None:
    slurm = chain.fake_slurm(tmp_path / "bin")
    (slurm / "sbatch").write_text("#!/bin/sh\nkill -INT $PPID\nsleep 5\n")
    door = [sys.executable, str(REPOSITORY / "launch" / "submit.py"), str(chain.write(tmp_path))]
    env = {"PATH": chain.path_with(slurm), "DATA_ROOT": "/data"}
    done = subprocess.run(door, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGINT
    assert "stopped; the same command goes on from here" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["statsu"], ("'statsu' is none of list, status", "did you mean 'status'?")),
        (["status", "--wacht"], ("--wacht: no such option", "did you mean --watch?")),
        (["status", "--every", "0"], ("--every: expected a number above 0, got '0'",)),
        (["explain"], ("run is missing", "runs.py explain --help")),
    ],
)
def test_a_slip_in_a_verb_is_told(
    arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        verbs.main(arguments)
    said = capsys.readouterr().err
    for word in words:
        assert word in said


def test_the_folder_of_runs_may_stand_before_or_after_the_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--runs", str(tmp_path), "list", "x"], ["list", "x", "--runs", str(tmp_path)]):
        assert verbs.main(arguments) == 2
        assert f"x: no such run in {tmp_path}" in capsys.readouterr().err


def test_a_full_disk_is_told_by_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a copy, Python names what was read first."""
    error = OSError(errno.ENOSPC, "No space left on device", "launch/cli.py", None, "/full/cli.py")
    assert cli._disk(error) == 1
    assert (
        "error: /full/cli.py cannot be written: No space left on device\n  make room"
        in capsys.readouterr().err
    )
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "runs").write_text("")
    code, said = told(
        capsys,
        DEMO,
        f"runs={tmp_path / 'runs'}",
        f"data.root={tmp_path}",
        "data.mix=a.json",
        "data.held_out=",
    )
    assert (code, "say runs=FOLDER with one that you may write to" in said) == (1, True)
