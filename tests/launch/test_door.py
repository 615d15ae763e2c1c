"""What ends a command before, or outside of, what it does: told in words, with an exit code, never by a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import door

ROOT = Path(__file__).resolve().parents[2]
DOORS = ("launch/submit.py", "launch/runs.py", "data/prepare.py", "data/demo.py", "moe/generate.py")
SPEC = str(ROOT / "experiments/stage1_align.yaml")


def run(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    if not options.keys() & {"stdout"}:
        options["stdout"] = subprocess.PIPE
    return subprocess.run(
        [sys.executable, *command],
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize(
    ("file", "words", "lacks"),
    [
        ("launch/submit.py", [SPEC], "yaml"),
        ("data/demo.py", ["nowhere"], "PIL"),
        ("moe/generate.py", ["nowhere"], "torch"),
    ],
)
def test_a_python_without_the_packages_is_told_which_one_to_take(
    file: str, words: list[str], lacks: str, tmp_path: Path
) -> None:
    done = run("-S", str(ROOT / file), *words, cwd=tmp_path)  # without site-packages
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {sys.executable} has no package {lacks}\n"
        "  hint: source .venv/bin/activate, or install as README.md says\n"
    )


@pytest.mark.parametrize("file", DOORS)
def test_every_command_is_entered_by_the_door(file: str) -> None:
    done = run(str(ROOT / file), "--help")
    assert done.returncode == 0
    assert f"python {file}" in done.stdout
    assert "door" in (ROOT / file).read_text().split("__main__")[1]


def test_an_old_python_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(door, "OLDEST", (99, 0))
    with pytest.raises(SystemExit) as end:
        door.enter("launch.cli")
    assert end.value.code == 2
    assert f"{sys.executable} is Python 3.{sys.version_info[1]}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[SPEC, "--dry-run"], [SPEC, "--explain"], ["--help"]], ids=lambda w: w[-1])
def test_an_output_that_nobody_reads_ends_it_in_silence(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(str(ROOT / "launch/submit.py"), *words, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr.replace(notes(done.stderr), "")) == (0, "")


def test_check_ends_in_silence_too(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(str(ROOT / "data/prepare.py"), "plan", "llava-ft", "--root", str(tmp_path), stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_under_the_output_is_told() -> None:
    with open("/dev/full", "w") as full:
        done = run(str(ROOT / "launch/submit.py"), SPEC, "--explain", stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the output cannot be written: No space left on device\n  hint: ")


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"rmdir '{gone}' && exec '{sys.executable}' '{ROOT}/launch/submit.py' '{SPEC}' --dry-run"
    done = subprocess.run(["sh", "-c", command], cwd=gone, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: the folder that this shell is in is gone\n  hint: cd to one that is there\n"


def test_letters_that_the_shell_lacks_are_told_where_they_must_be_written_and_escaped_where_shown(
    tmp_path: Path,
) -> None:
    spec = tmp_path / "a.yaml"
    spec.write_text(f"inherits: {SPEC}\nname: größe\n", encoding="utf-8")
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    shown = run(str(ROOT / "launch/submit.py"), str(spec), "--explain", env=ascii_only)
    assert shown.returncode == 0, shown.stderr
    assert r"gr\xf6\xdfe" in shown.stdout
    planned = run(str(ROOT / "launch/submit.py"), str(spec), "--dry-run", env=ascii_only)
    assert planned.returncode == 2
    assert planned.stderr == (
        "error: this shell's encoding, ascii, lacks '\\xf6\\xdf'\n  hint: export PYTHONUTF8=1\n"
    )


def notes(text: str) -> str:
    """The lines about data that are not here."""
    return "".join(line for line in text.splitlines(keepends=True) if line.startswith("note: ")) or "\0"
