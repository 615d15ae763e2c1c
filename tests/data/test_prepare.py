"""The third door: each command does what it says, in words, with exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from data.index import digest, open_index
from data.prepare import main
from data.tokenizer_file import TokenizerFile

from .places import mixed, record, write
from .support import CHATML, GOLDENS, chat_tokenizer, fresh_tokenizer, talk, tokenizer

LLAMA = str(GOLDENS / "tokenizers" / "llama_legacy")
DOOR = Path(__file__).parents[2] / "data" / "prepare.py"


def test_plan_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nlp_tune.json").write_text("[]")
    assert main(["plan", "--root", str(tmp_path), "llava-ft"]) == 1
    told = capsys.readouterr().out
    assert f"{tmp_path}/nlp_tune.json is there" in told
    assert "llava_image_tune_2.zip.001                 41.90 GB" in told
    assert "llava_image_tune_2.zip.002                 30.50 GB" in told
    assert "train_json/llava_image_tune_.json" in told
    assert "together                                   73.33 GB" in told
    assert "https://github.com/haotian-liu/LLaVA" in told
    card = "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K"
    assert f"licence not verified: look it up at {card} (says CC BY 4.0" in told
    assert "hf download LanguageBind/MoE-LLaVA" in told
    assert main(["plan", "--root", str(tmp_path), "nlp"]) == 0
    assert "all files are there; next: python data/prepare.py check" in capsys.readouterr().out


def test_plan_names_the_archive_of_a_tree_that_may_not_be_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lrv_tune").mkdir()
    main(["plan", "--root", str(tmp_path), "lrv-331k"])
    assert "lrv_tune is there; where it is not whole: lrv_tune.zip of" in capsys.readouterr().out


def test_unpack_fills_the_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(tmp_path / "lrv_tune.zip", "w") as archive:
        archive.writestr("lrv_tune/lrv-vg/1.jpg", b"one")
    arguments = ["unpack", "--root", str(tmp_path), "lrv-331k", "nlp"]
    assert main(arguments) == 0
    assert (tmp_path / "lrv_tune" / "lrv-vg" / "1.jpg").read_bytes() == b"one"
    assert "lrv-331k: 1 files written, 0 were there" in capsys.readouterr().out
    assert main([*arguments, "--delete"]) == 0
    assert "lrv-331k: 0 files written, 1 were there" in capsys.readouterr().out
    assert not (tmp_path / "lrv_tune.zip").exists()
    assert main(arguments) == 2
    assert "prepare: " in capsys.readouterr().err


def test_an_archive_without_a_file_is_told_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "lrv_tune.zip", "w") as archive:
        archive.mkdir("lrv_tune")
    assert main(["unpack", "--root", str(tmp_path), "lrv-331k", "--delete"]) == 1
    assert "lrv-331k: there is no file in lrv_tune.zip; download it again" in capsys.readouterr().out
    assert (tmp_path / "lrv_tune.zip").is_file()


def test_check_and_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = mixed(tmp_path, 12)
    arguments = ["check", "--root", str(tmp_path), "mixed.json", "--tokenizer", LLAMA, "--patches", "4"]
    assert main(arguments) == 0
    assert "nothing would be lost" in capsys.readouterr().out
    assert (tmp_path / "check" / "check.html").is_file()
    write(tmp_path, "mixed.json", [*records, record("Empty?", "")])
    assert main([*arguments, "--fix", "--out", str(tmp_path / "told")]) == 1
    told = capsys.readouterr().out
    assert "LOST  no-answer: there is no answer to learn from (1)" in told
    assert "mixed.fixed.json: 1 dropped, 12 written" in told
    assert json.loads((tmp_path / "told" / "check.json").read_text())["lost"] == 1
    assert main(["check", "--root", str(tmp_path), "mixed.fixed.json", "--no-pictures"]) == 0
    assert "without --tokenizer the lengths of samples are not looked at" in capsys.readouterr().out
    phi = str(GOLDENS / "tokenizers" / "phi2")
    assert main(["check", "--root", str(tmp_path), "mixed.fixed.json", "--tokenizer", phi]) == 1
    assert "LOST  tokenizer: the template ends turns with '</s>'" in capsys.readouterr().out


def test_a_torn_file_keeps_no_other_from_being_fixed(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text('[{"id": 1, "conversations": []}, {"id"')
    write(tmp_path, "spaces.json", [{**record("A?", " B. "), "id": "\ud800"}])
    arguments = ["check", "--root", str(tmp_path), "torn.json", "spaces.json", "--no-pictures", "--fix"]
    command = [sys.executable, str(DOOR), *arguments]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 2
    assert "spaces.json, record 0 (id \\ud800): turn 2" in told.stdout
    assert "spaces.fixed.json: 1 stripped an answer, 1 written" in told.stdout
    assert "torn.fixed.json is not written: " in told.stderr
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "spaces.fixed.json exists already; nothing is overwritten" in again.stderr


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_torn_tokenizer_is_told(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(LLAMA, tmp_path / "tok")
    (tmp_path / "tok" / name).write_text('{"a":')
    mixed(tmp_path, 3)
    assert main(["index", "--root", str(tmp_path), "mixed.json", "--tokenizer", str(tmp_path / "tok")]) == 2
    assert f"prepare: {tmp_path}/tok/{name}: not a " in capsys.readouterr().err


def test_index_is_the_one_that_training_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed(tmp_path, 12)
    arguments = ["index", "--root", str(tmp_path), "mixed.json", "--tokenizer", LLAMA]
    assert main(arguments) == 0
    assert "mixed.json: 12 records, " in capsys.readouterr().out
    built: list[int] = []
    index = open_index(
        tmp_path / "mixed.json", tokenizer("llama_legacy"), "v1", lambda *step: built.append(1)
    )
    assert (len(index), built) == (12, [])
    write(tmp_path, "mixed.json", [record("A?", "")])
    assert main(arguments) == 1
    assert "cannot be trained on: record 0: no answer to learn from" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["llama_legacy", "llama_nolegacy", "phi2", "qwen1_5", "stablelm2"])
def test_a_runs_tokenizer_folder_gives_the_same_index(folder: str, tmp_path: Path) -> None:
    from data.index import fingerprint

    tok = tokenizer(folder)
    tok.save_pretrained(tmp_path)
    read = TokenizerFile(tmp_path)
    assert fingerprint(read, "v1") == fingerprint(tok, "v1")
    for name in (
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ):
        assert getattr(read, name) == getattr(tok, name), name
    assert len(read) == len(tok)
    assert read("A text.") == {"input_ids": tok("A text.")["input_ids"]}
    assert set(tok.all_special_tokens) <= set(read.all_special_tokens)


def test_a_chat_template_reads_alike(tmp_path: Path) -> None:
    from data.conversation import encode
    from data.index import fingerprint

    tok = chat_tokenizer()
    tok.save_pretrained(tmp_path)
    read = TokenizerFile(tmp_path)
    assert read.chat_template == CHATML
    turns = talk("<image>\nWhat?", "A dog.", "Why?", "So.")
    assert encode(turns, read, "chat") == encode(turns, tok, "chat")
    assert fingerprint(read, "chat") == fingerprint(tok, "chat")
    assert fingerprint(read, "chat") != fingerprint(fresh_tokenizer("qwen1_5"), "chat")
    read.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match="refuses the conversation: no system"):
        encode(turns, read, "chat")


def test_convert_writes_the_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "mix.json"
    source.write_text(json.dumps([{**record("A? <image>", "b", image="a.jpg")}, record("C?", "d")]))
    out = ["--out", str(tmp_path / "out.json"), "--texts", str(tmp_path / "texts.json"), "--prefix", "tune"]
    assert main(["convert", "llava", str(source), *out]) == 0
    assert json.loads((tmp_path / "out.json").read_text())[0]["image"] == "tune/a.jpg"
    assert "1 records in" in capsys.readouterr().out
    assert main(["convert", "llava", str(source), *out]) == 2
    assert "exists already; nothing is overwritten" in capsys.readouterr().err
    assert main(["convert", "lrv", str(source), "--out", str(tmp_path / "x.json")]) == 2
    wrong = (
        "mix.json, record 0: there is no 'image_id', only 'id', 'image', 'conversations'; is this the file of"
    )
    assert wrong in capsys.readouterr().err
    assert main(["convert", "llava", "/no/such.json", "--out", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err == "prepare: /no/such.json: there is no such file or folder\n"
    source.write_text(json.dumps({"data": 3}))
    assert main(["convert", "mimic-it", str(source), "--out", str(tmp_path / "x.json")]) == 2
    assert "mix.json: not as mimic-it's publisher writes it" in capsys.readouterr().err
    source.write_text(json.dumps({"IMG": "AAAA", "BAD": "?"}))
    assert main(["convert", "mimic-it-pictures", str(source), "--out", str(tmp_path / "LA")]) == 1
    assert "BAD: not base64" in capsys.readouterr().out
    assert (tmp_path / "LA" / "IMG.jpg").is_file()


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("llava", '[{"conversations": []}, {"id": 1}]', "record 1: there is no 'conversations', only 'id'"),
        (
            "llava",
            '[{"conversations": []}, {"image": "a", "conversations": ["x"]}]',
            "record 1: not as llava's publisher",
        ),
        (
            "svit",
            '[{"image_id": 1, "question": "A?"}]',
            "record 0: there is no 'conversations', only 'image_id'",
        ),
        ("lrv", '[{"image_id": 1, "question": null, "answer": ""}]', "record 0: not as lrv's publisher"),
        ("mimic-it", '{"date": {}}', "there is no 'data', only 'date'; is this the file of another kind?"),
        ("mimic-it", '{"data": {"A_1": {"instruction": 5, "answer": ""}}}', "record A_1: not as mimic-it's"),
        ("mimic-it", '{"data": ' + "[" * 5000, "record 0: not valid JSON (nested too deeply)"),
        ("mimic-it", '{"data": ' + "9" * 5000 + "}", "record 0: not valid JSON (a number of thousands"),
    ],
)
def test_what_a_converter_cannot_read_is_told_with_its_place(
    kind: str, text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw.json").write_text(text)
    assert main(["convert", kind, str(tmp_path / "raw.json"), "--out", str(tmp_path / "out.json")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"prepare: {tmp_path}/raw.json")
    assert words in told
    assert [path.name for path in tmp_path.iterdir()] == ["raw.json"]


def test_two_outputs_need_two_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed(tmp_path, 3)
    out = str(tmp_path / "out.json")
    assert main(["convert", "llava", str(tmp_path / "mixed.json"), "--out", out, "--texts", out]) == 2
    assert "two files are to be written there" in capsys.readouterr().err
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "--root", "$NO_SUCH_ROOT", "nlp"], "that variable is not set: export it, or say --root"),
        (["check", "--root", "/no/such/root", "nlp"], "--root: there is no folder /no/such/root"),
        (["check", "--root", "ROOT", "nlq"], "the mix names 'nlq', which is not in the catalog"),
        (["check", "--root", "ROOT", "lava-ft"], "did you mean 'llava-ft'?"),
        (["check", "--root", "ROOT", "nlp", "--template", "v9"], "no template is called 'v9'; there are"),
        (
            ["index", "--root", "ROOT", "nlp", "--tokenizer", "ROOT"],
            "there is no tokenizer.json; name a run's",
        ),
        (["index", "--root", "ROOT", "nlp", "--tokenizer", LLAMA], "there is no nlp_tune.json"),
        (["unpack", "--root", "ROOT", "lrv-331k"], "there is no lrv_tune.zip"),
    ],
)
def test_what_cannot_be_done_is_told(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path) if word == "ROOT" else word for word in arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"), [("--max-length", "-5"), ("--workers", "0"), ("--patches", "x")]
)
def test_numbers_are_numbers(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["check", "nlp", option, value])
    assert f"argument {option}: {value!r} is no whole number from" in capsys.readouterr().err


def test_a_full_disk_is_told_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """/dev/full is a disk without room, whoever writes to it."""
    mixed(tmp_path, 9)
    index = ["index", "--root", str(tmp_path), "mixed.json", "--tokenizer", LLAMA]
    assert main(index) == 0
    (made,) = (tmp_path / ".index").glob("mixed-*/")
    want = {path.name: path.read_bytes() for path in made.iterdir()}
    shutil.rmtree(made)
    part = made.with_name(f"{made.name}.part")
    part.mkdir()
    full = part / f"mark.json.{os.getpid()}.tmp"
    full.symlink_to("/dev/full")
    capsys.readouterr()
    assert main(index) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"prepare: {tmp_path}/mixed.json: its index is not whole: the disk or quota of /")
    assert told.endswith("MB left): make room, then say the same again\n")
    assert not made.exists()
    assert not full.is_symlink()
    assert main(index) == 0
    assert {path.name: path.read_bytes() for path in made.iterdir()} == want

    out = tmp_path / "out.json"
    Path(f"{out}.{os.getpid()}.part").symlink_to("/dev/full")
    assert main(["convert", "llava", str(tmp_path / "mixed.json"), "--out", str(out)]) == 2
    assert "is full" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.glob("out*")) == []


@pytest.mark.parametrize("name", ["check.json", "check.html"])
def test_a_full_disk_leaves_the_report_that_was_there(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed(tmp_path, 9)
    check = ["check", "--root", str(tmp_path), "mixed.json", "--no-pictures"]
    assert main(check) == 0
    before = (tmp_path / "check" / name).read_bytes()
    write(tmp_path, "mixed.json", [record("Empty?", "")])
    (tmp_path / "check" / f"{name}.{os.getpid()}.tmp").symlink_to("/dev/full")
    assert main(check) == 2
    assert "is full" in capsys.readouterr().err
    assert (tmp_path / "check" / name).read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "check").iterdir()) == ["check.html", "check.json"]


def test_a_digest_that_finds_no_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path, "a.json", [record("A?", "b")])
    (tmp_path / ".index").mkdir()
    (tmp_path / ".index" / f"a.json.digest.{os.getpid()}.tmp").symlink_to("/dev/full")
    digest(path)
    assert list((tmp_path / ".index").iterdir()) == []


def test_ctrl_c_in_an_index_keeps_what_is_done(tmp_path: Path) -> None:
    write(tmp_path, "talks.json", [record(f"Tell {at}", "Yes." * 20) for at in range(20_000)])
    arguments = ["index", "--root", str(tmp_path), "talks.json", "--tokenizer", LLAMA]
    started = subprocess.Popen([sys.executable, str(DOOR), *arguments], stderr=subprocess.PIPE, text=True)
    place, end = tmp_path / ".index", time.monotonic() + 60
    while not list(place.glob("*.part/mark.json")) and time.monotonic() < end:
        time.sleep(0.01)
    started.send_signal(signal.SIGINT)
    _, told = started.communicate(timeout=60)
    assert started.returncode == 130, told
    assert "prepare: stopped, nothing is half written; the same command goes on from here" in told
    assert "Traceback" not in told
    assert not list(place.glob("*/meta.json"))
    (mark,) = (json.loads(file.read_text()) for file in place.glob("*.part/mark.json"))
    assert 0 < mark["records"] < 20_000


def test_an_unsuitable_tokenizer_builds_no_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed(tmp_path, 3)
    arguments = ["index", "--root", str(tmp_path), "mixed.json", "--tokenizer", LLAMA, "--template", "phi"]
    assert main(arguments) == 2
    assert "the tokenizer does not suit template phi: the template ends turns with" in capsys.readouterr().err


def test_it_runs_as_a_file_from_anywhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(DOOR), "plan", "--root", "here", "nlp"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "nlp_tune.json is missing" in done.stdout
    assert done.stderr == ""
