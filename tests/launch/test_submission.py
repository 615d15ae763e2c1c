"""Submission against an sbatch of our own that answers as the real one, and lies, refuses and kills on demand."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import chain

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "goldens" / "launch"


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    return chain.fake_slurm(tmp_path / "bin")


def submit(
    file: Path, *arguments: str, slurm: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **env}
    if slurm:
        variables["PATH"] = chain.path_with(slurm)
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "submit.py"), str(file), *arguments],
        capture_output=True,
        text=True,
        env=variables,
        timeout=60,
        cwd=file.parent,
    )


def sent(slurm: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(slurm.glob("sent_*"))]


def test_dry_run_prints_the_golden_scripts(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    file = chain.write(tmp_path, sweep3="sweep: {train.optim.lr: [1e-5, 2e-5]}\n")
    first, second = (
        submit(file, "--dry-run"),
        submit(file, "--dry-run", SLURM_JOB_ID="7", SBATCH_PARTITION="high"),
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert not (tmp_path / "runs").exists()
    code = first.stdout.split("/code/")[1][:16]
    text = first.stdout.replace(str(tmp_path), "/here").replace(code, "0123456789abcdef")
    text = re.sub(r"\b(s\d)-[0-9a-f]{10}-0\b", r"\1-0123456789-0", text)  # follows every setting there is
    golden = GOLDEN / "dry_run.txt"
    if request.config.getoption("--update-golden"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


def test_the_scripts_are_sound_shell(tmp_path: Path) -> None:
    text = submit(chain.write(tmp_path), "--dry-run").stdout
    scripts = text.split("#!/bin/bash")[1:]
    assert len(scripts) == 3
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_one_array_a_stage_chained_and_never_twice(tmp_path: Path, slurm: Path) -> None:
    file = chain.write(tmp_path, sweep3="sweep: {train.optim.lr: [1e-5, 2e-5]}\n")
    first = submit(file, slurm=slurm)
    assert first.returncode == 0, first.stderr
    dependencies = [[word for word in call["argv"] if "dependency" in word] for call in sent(slurm)]  # type: ignore[attr-defined]
    assert dependencies == [[], ["--dependency=afterok:100_0"], ["--dependency=afterok:101_0"]]
    second = submit(file, slurm=slurm)
    assert (second.returncode, len(sent(slurm))) == (0, 3)
    assert "nothing to do" in second.stdout


def test_of_an_answer_with_the_clusters_name_the_job_is_taken(tmp_path: Path, slurm: Path) -> None:
    sbatch = slurm / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("print(100 + count)", 'print(f"{100 + count};c1")'))
    (slurm / "squeue").write_text("#!/bin/sh\n")  # where it would find the job by its token
    assert submit(chain.write(tmp_path), slurm=slurm).returncode == 0
    assert sent(slurm)[1]["argv"][1] == "--dependency=afterok:100_0"  # type: ignore[index]


def test_equal_sweeps_are_chained_element_by_element(tmp_path: Path, slurm: Path) -> None:
    sweep = "sweep: {train.optim.lr: [1e-5, 2e-5]}\n"
    submit(chain.write(tmp_path, sweep2=sweep, sweep3=sweep), slurm=slurm)
    assert sent(slurm)[2]["argv"][1] == "--dependency=aftercorr:101"  # type: ignore[index]


def test_a_refusal_is_told_and_nothing_after_it_is_sent(tmp_path: Path, slurm: Path) -> None:
    file = chain.write(tmp_path)
    (slurm / "mode").write_text("refuse")
    refused = submit(file, slurm=slurm)
    assert refused.returncode == 3
    assert "invalid partition specified: main" in refused.stderr
    assert not sent(slurm)
    (slurm / "mode").unlink()
    assert submit(file, slurm=slurm).returncode == 0
    assert len(sent(slurm)) == 3


def test_a_lost_answer_is_looked_up_and_not_sent_again(tmp_path: Path, slurm: Path) -> None:
    (slurm / "mode").write_text("timeout")
    done = submit(chain.write(tmp_path), slurm=slurm)
    assert done.returncode == 0, done.stderr
    assert len(sent(slurm)) == 3
    assert "job 102" in done.stdout


def test_a_submitter_killed_after_sbatch_leaves_a_job_that_the_next_one_adopts(
    tmp_path: Path, slurm: Path
) -> None:
    file = chain.write(tmp_path)
    (slurm / "mode").write_text("kill")
    assert submit(file, slurm=slurm).returncode == -signal.SIGKILL
    (slurm / "mode").unlink()
    assert submit(file, slurm=slurm).returncode == 0
    assert len(sent(slurm)) == 3
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/batches/*/batch.json"))]
    assert [(record["job"], record.get("adopted", False)) for record in records] == [
        ("100", True),
        ("101", False),
        ("102", False),
    ]


def test_of_more_runs_than_an_account_may_submit_as_many_as_fit_are_and_the_rest_later(
    tmp_path: Path, slurm: Path
) -> None:
    rates = ", ".join(f"{n}e-5" for n in range(1, 12))
    file = chain.write(tmp_path, sweep3=f"sweep: {{train.optim.lr: [{rates}]}}\n")
    (slurm / "mode").write_text("most 9")
    full = submit(file, slurm=slurm)
    assert full.returncode == 3
    assert "AssocMaxSubmitJobLimit" in full.stderr
    assert "repeat the command to go on from there" in full.stderr
    assert len((slurm / "queue").read_text().splitlines()) == 9
    (slurm / "mode").unlink()
    assert submit(file, slurm=slurm).returncode == 0
    assert "nothing to do" in submit(file, slurm=slurm).stdout
    files = [
        {path.name for path in folder.iterdir() if path.is_file()}
        for folder in tmp_path.glob("runs/batches/*")
    ]
    assert files == [{"batch.json", "plan.json", "script.sbatch"}] * len(files)  # whatever the array's size
    plans = [
        json.loads((path.parent / "plan.json").read_text())["runs"]
        for path in tmp_path.glob("runs/batches/*/batch.json")
        if json.loads(path.read_text())["state"] == "submitted"
    ]
    assert sorted(Path(run).name for plan in plans for run in plan.values() if "/s3/" in run) == sorted(
        f"lr={n}e-5" for n in range(1, 12)
    )


def test_twenty_submitters_at_once_send_one_set_of_jobs(tmp_path: Path, slurm: Path) -> None:
    file = chain.write(tmp_path)
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), str(file)]
    env = {**os.environ, "PATH": chain.path_with(slurm)}
    racers = [
        subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(20)
    ]
    errors = [racer.communicate(timeout=120)[1] for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 20, errors
    assert len(sent(slurm)) == 3


def test_secrets_and_an_outer_jobs_variables_stay_in_the_shell(tmp_path: Path, slurm: Path) -> None:
    planted = {
        "WANDB_API_KEY": "canary-1",
        "HF_TOKEN": "canary-2",
        "AWS_SECRET_ACCESS_KEY": "canary-3",
        "SLURM_CPU_BIND": "canary-4",
        "SBATCH_PARTITION": "canary-5",
        "WANDB_SERVICE": "canary-6",
    }
    submit(chain.write(tmp_path), slurm=slurm, DATA_ROOT="/data", **planted)
    assert sent(slurm)[0]["env"]["DATA_ROOT"] == "/data"  # type: ignore[index]
    written = json.dumps(sent(slurm)) + "".join(
        path.read_text(errors="replace")
        for path in (tmp_path / "runs").rglob("*")
        if path.is_file() and "code" not in path.parts
    )
    assert "canary" not in written


def test_the_jobs_code_is_the_snapshot_of_what_was_submitted(tmp_path: Path, slurm: Path) -> None:
    submit(chain.write(tmp_path), slurm=slurm)
    [snapshot] = (tmp_path / "runs" / "code").iterdir()
    script = Path(sent(slurm)[0]["argv"][-1]).read_text()  # type: ignore[index]
    assert f"--chdir={snapshot}" in script
    for name in ("launch/job.py", "moe/spec.py", "data/spec.py"):
        assert (snapshot / name).read_bytes() == (ROOT / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train.optin.lr=3"], 2, "train.optin: no such setting"),
        (["train.steps"], 2, "expected key=value"),
        (["--only", "moe", "--from", "moe"], 2, "--only says both"),
        (["--only", "elsewhere"], 2, "elsewhere: no stage of this chain"),
        (["--from", "moe", "--until", "align"], 2, "nothing lies from moe until align"),
        (["--only", "moe"], 2, "starts from s2/run, which is new"),
        (["--wrong"], 2, "--wrong: no such option"),
    ],
)
def test_what_a_wrong_command_says(
    tmp_path: Path, slurm: Path, arguments: list[str], code: int, words: str
) -> None:
    done = submit(chain.write(tmp_path), *arguments, slurm=slurm)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not sent(slurm)


def test_a_misspelt_file_is_told_with_the_nearest(tmp_path: Path) -> None:
    chain.write(tmp_path)
    done = submit(tmp_path / "s33.yaml")
    assert done.returncode == 2
    assert "s33.yaml: no such experiment" in done.stderr
    assert "s3.yaml" in done.stderr


def test_without_slurm_it_says_so(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = submit(chain.write(tmp_path), PATH=str(empty))
    assert done.returncode == 3
    assert "sbatch: not found; is this a SLURM login node? cluster=local runs here" in done.stderr
    assert not list(tmp_path.glob("runs/batches/*"))


def test_a_plan_over_the_limit_of_gpu_hours_is_refused_unless_one_says_yes(
    tmp_path: Path, slurm: Path
) -> None:
    file = chain.write(tmp_path, sweep3="sweep: {train.optim.lr: [1e-5, 2e-5]}\n")
    refused = submit(file, "--max-gpu-hours", "15", slurm=slurm)
    assert refused.returncode == 4
    assert "the plan may use 16.0 GPU-hours, and the limit is 15.0" in refused.stderr
    assert "at most 16.0 GPU-hours: a walltime for each run" in refused.stdout
    assert not sent(slurm)
    assert submit(file, "--max-gpu-hours", "16", slurm=slurm).returncode == 0
    assert len(sent(slurm)) == 3


def test_yes_submits_over_the_limit(tmp_path: Path, slurm: Path) -> None:
    assert submit(chain.write(tmp_path), "--max-gpu-hours", "1", "-y", slurm=slurm).returncode == 0
    assert len(sent(slurm)) == 3
