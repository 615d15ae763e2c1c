"""Twenty secrets where users have them, and none in scripts, plans, records, logs or what W&B is sent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from launch import submit  # noqa: F401  only to have it checked that importing the door changes nothing
from launch.job import Place, StageJob
from launch.operating.verbs import main as operate
from launch.plan import make
from launch.reader import SpecError
from launch.record import RunFolder
from launch.redact import environment_secrets, planted
from launch.tracking import trackers
from tests.launch import tracked
from tests.launch.chain import fake_slurm, path_with, write
from tests.wandb_server import WandbServer

server = tracked.server
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "HF_TOKEN": "hf_QRSTUVWXYZabcdefghij",
    "HUGGING_FACE_HUB_TOKEN": "hub-token-with-no-shape",
    "AWS_ACCESS_KEY_ID": "AKIAQQQQWWWWEEEERRRR",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCY",
    "OPENAI_API_KEY": "sk-proj-0123456789abcdefghij",
    "GITHUB_TOKEN": "ghp_0123456789abcdefghijABCDEFGHIJ",
    "DATABASE_URL": "postgres://me:dbpassword99@db.example.org/x",
    "SLURM_JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJtZSJ9.c2lnbmF0dXJl",
    "SLURM_JOB_COMMENT": "use glpat-abcdefghij0123456789 please",
    "MY_PASSWORD": "correct-horse-battery",
    "SITE_CREDENTIALS": "plain-but-named-so",
    "WANDB_API_KEY": "5e1f" * 10,
}
FILES = {
    ".netrc": "machine api.wandb.ai login user password netrc-password-1234567890\n",
    ".ssh/id_ed25519": "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktplanted\n-----END",
    ".aws/credentials": "[default]\naws_secret_access_key = from-the-aws-file-0123456789\n",
    ".cache/huggingface/token": "hf_fromthecachedtokenfile00\n",
    ".env": "STRIPE_KEY=from-the-dotenv-file-123\n",
    ".git/config": '[remote "origin"]\n\turl = https://me:gitremotepassword@git.example.org/x.git\n',
    ".config/wandb/settings": "[default]\napi_key = from-the-wandb-settings-000\n",
    ".my.cnf": "[client]\npassword=from-the-mysql-file-77\n",
}
NEEDLES = [
    *(
        "hf_QRSTUVWXYZ",
        "hub-token-with-no-shape",
        "AKIAQQQQ",
        "wJalrXUtn",
        "sk-proj-0123",
        "ghp_01234",
        "dbpassword99",
    ),
    *("eyJhbGciOiJIUzI1NiJ9", "glpat-abcdefghij", "correct-horse-battery", "plain-but-named-so", "5e1f" * 10),
    *(
        "netrc-password-123",
        "b3BlbnNzaC1rZXktplanted",
        "from-the-aws-file",
        "hf_fromthecached",
        "from-the-dotenv",
    ),
    *("gitremotepassword", "from-the-wandb-settings", "from-the-mysql-file"),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user keeps secrets, and the environment they are in."""
    for name, text in FILES.items():
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def leaks(*texts: bytes) -> list[str]:
    return [needle for needle in NEEDLES for text in texts if needle.encode() in text]


def contents(*folders: Path) -> list[bytes]:
    return [path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()]


def test_there_are_twenty_of_them(home: Path) -> None:
    assert len(NEEDLES) == len(ENVIRONMENT) + len(FILES) == 20
    told = [json.dumps(dict(os.environ)).encode(), *contents(home)]
    assert set(leaks(*told)) == set(NEEDLES)


def test_none_is_in_scripts_plans_and_what_sbatch_is_given(home: Path, tmp_path: Path) -> None:
    slurm = fake_slurm(tmp_path / "slurm")
    spec = write(tmp_path)
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), str(spec)]
    environment = {**os.environ, "PATH": path_with(slurm)}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    sent = sorted(slurm.glob("sent_*"))
    assert len(sent) == 3
    assert any(b"SLURM" in path.read_bytes() or b"PATH" in path.read_bytes() for path in sent)
    records = contents(tmp_path / "runs", slurm)
    assert any(b"sbatch" in text or b"#SBATCH" in text for text in records)
    assert leaks(done.stdout, done.stderr, *records) == []


def test_none_is_in_logs_and_records_of_an_attempt_that_fails(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    (folder.path / "logs").mkdir(parents=True)
    place = Place(rank=0, local_rank=0, world=1, node="n1", attempt="1_0-0")
    secrets = "; ".join((*(f"{name}={value}" for name, value in ENVIRONMENT.items()), *FILES.values()))
    try:
        raise ValueError(f"cannot open https://me:dbpassword99@example.org with {secrets}")
    except ValueError as error:
        traceback.clear_frames(error.__traceback__)
        StageJob._fail(folder, place, error)
    said = capfd.readouterr()
    failure = folder.logs("1_0-0") / "failure_0.json"
    told = json.loads(failure.read_text())
    assert told["message"].startswith("ValueError: cannot open https://")
    # What has no shape and no name around it cannot be known for a secret.
    unknowable = {"b3BlbnNzaC1rZXktplanted", "netrc-password-123"}
    assert set(leaks(failure.read_bytes(), said.out.encode(), said.err.encode())) <= unknowable


def test_none_is_sent_to_wandb_or_kept_for_it(server: WandbServer, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = {"note": " ".join(ENVIRONMENT.values()), "env": ENVIRONMENT, "remote": FILES[".git/config"]}
    tracker = trackers(folder, tracked.RUN, config, tracked.WandbSpec(), rank=0, attempt=1, start_step=0)
    tracked.log(tracker, 1, 3)
    tracker.summary({"environment": ENVIRONMENT})
    tracker.table("answers", ["question"], [[f"is it {value}?"] for value in ENVIRONMENT.values()])
    tracker.finish("finished")
    assert server.runs["demo-align"].steps == [1, 2, 3]
    assert leaks(*server.payloads, *contents(folder)) == []


@pytest.mark.parametrize(
    ("setting", "path"),
    [
        ("cluster.env={HF_TOKEN: abcdef123456}", "cluster.env.HF_TOKEN"),
        ("cluster.setup=[export WANDB_API_KEY=0123456789abcdef]", "cluster.setup"),
        ("cluster.setup=[curl https://me:pa55word@example.org]", "cluster.setup"),
        ("wandb.tags=[hf_QRSTUVWXYZabcdefghij]", "wandb.tags"),
        ("cluster.sbatch={export: AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMIK7}", "cluster.sbatch.export"),
        ("data.root=s3://AKIAIOSFODNN7EXAMPLE:xyz@bucket", "data.root"),
    ],
)
def test_a_secret_in_a_spec_is_refused_and_not_repeated(tmp_path: Path, setting: str, path: str) -> None:
    with pytest.raises(SpecError) as told:
        make(write(tmp_path), [setting])
    words = str(told.value)
    assert f"{path} holds a secret" in words
    assert "let cluster.setup source that" in words
    for secret in ("abcdef123456", "0123456789abcdef", "pa55word", "hf_QRST", "wJalr", "AKIAIOS"):
        assert secret not in words


@pytest.mark.parametrize(
    "value",
    [
        {"env": {"HF_TOKEN": "$HF_TOKEN", "SSL_KEY": "/etc/ssl/key.pem", "NCCL_DEBUG": "INFO", "AUTH": ""}},
        {"setup": ["source ~/.secrets", "export HF_TOKEN=$(cat ~/.token)", "module load cuda/12.4"]},
        {"tokenizer": "train:560", "max_tokens": 512},
    ],
)
def test_where_a_secret_lies_is_no_secret(value: dict[str, object]) -> None:
    assert list(planted(value)) == []


def test_where_a_process_stands_is_no_secret() -> None:
    """A shell exports it, and it is half of every traceback."""
    assert environment_secrets({"PWD": "/home/someone/project", "DB_PWD": "correct horse"}) == (
        "correct horse",
    )


def test_the_report_of_runs_hides_what_settings_hold(tmp_path: Path) -> None:
    from tests.launch.told import experiments

    root = experiments(tmp_path)
    for point in ("top_k=1", "top_k=2"):  # as an older version may have left it
        file = RunFolder(root / "s3" / point).spec_file
        spec = json.loads(file.read_text())
        spec["cluster"]["env"]["HF_TOKEN"] = "hf_QRSTUVWXYZabcdefghij"
        spec["cluster"]["setup"] = [f"curl https://me:dbpassword99@{point[-1]}.example.org"]
        file.write_text(json.dumps(spec))
    assert operate(["--runs", str(root), "report", "s3"]) == 0
    page = (root / "s3" / "report.html").read_bytes()
    assert leaks(page) == []
    assert b"[hidden]" in page
