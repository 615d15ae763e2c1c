"""The doctor on what newer versions of SLURM print: every fact with its consequence, presets that plan as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.operating import settings
from launch.plan import make
from launch.reader import Layers
from launch.spec import ClusterSpec
from tests.launch import chain

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "goldens" / "doctor"
ANSWERS = """\
#!/bin/sh
case "$(basename $0) $*" in
  "scontrol show config") cat {0}/config.txt;;
  "scontrol -o show partition") cat {0}/partitions.txt;;
  sinfo*) cat {0}/sinfo.txt;;
  *"show qos"*) cat {0}/qos.txt;;
  *"show assoc"*) cat {0}/assoc.txt;;
  *) echo "not asked for: $*" >&2; exit 1;;
esac
"""


def doctor(tmp_path: Path, version: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    binary = tmp_path / "bin"
    binary.mkdir(exist_ok=True)
    for name in ("scontrol", "sinfo", "sacctmgr"):
        (binary / name).write_text(ANSWERS.format(RECORDED / version))
        (binary / name).chmod(0o755)
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "runs.py"), "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PATH": f"{binary}{os.pathsep}{os.environ['PATH']}"},
    )


Facts = dict[str, tuple[str, str, str]]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Facts]:
    """What the doctor says of each recorded version."""
    found = {}
    for version in ("24.05", "25.11"):
        done = doctor(tmp_path_factory.mktemp("doctor"), version, "--json")
        assert done.returncode == 0, done.stderr
        found[version] = {
            f["name"]: (f["value"], f["level"], f["means"]) for f in json.loads(done.stdout)["facts"]
        }
    return found


@pytest.mark.parametrize(
    ("version", "name", "value", "level", "words"),
    [
        ("24.05", "version", "24.05.2", "ok", ""),
        ("24.05", "PreemptType", "preempt/qos", "ok", "a higher QOS may take"),
        ("24.05", "PreemptMode", "REQUEUE", "ok", "goes on from its last save"),
        ("24.05", "GraceTime", "0 s", "note", "KillWait (30 s) is all the time"),
        ("24.05", "send_user_signal", "yes", "ok", "USR2 first"),
        ("24.05", "PreemptExemptTime", "15m00s", "ok", "before it has run so long"),
        ("24.05", "RequeueExit", "1-5,42", "warn", "it may come back for ever"),
        ("24.05", "RequeueExitHold", "none", "ok", "are not in it"),
        ("24.05", "requeue delay", "300 s", "note", "waits 300 s"),
        ("24.05", "kill_invalid_depend", "yes", "ok", "jobs ask for that themselves"),
        ("24.05", "max_depend_depth", "2", "warn", "three stages"),
        ("24.05", "MaxArraySize", "10001", "ok", "up to 10000"),
        ("24.05", "default_queue_depth", "500", "ok", "each run of a sweep is a job of its own"),
        ("24.05", "bf_max_job_array_resv", "20", "ok", "name the longest first"),
        ("24.05", "MaxSubmit of vision", "500", "note", "every run of a sweep is one"),
        ("24.05", "MaxJobs of vision", "20", "note", "20 jobs running"),
        ("24.05", "GrpTRES of vision", "gres/gpu=64", "note", "AssocGrp"),
        ("24.05", "QOS normal", "MaxTRESPU=gres/gpu=32", "note", "limits of the QOS normal"),
        ("24.05", "MaxTime", "12h", "ok", "requeues itself"),
        ("24.05", "EnforcePartLimits", "NO", "note", "waits for ever"),
        ("24.05", "accounting", "slurmdbd", "ok", "sacct knows"),
        ("24.05", "accounts", "shared, vision", "ok", "your default account"),
        ("24.05", "ProctrackType", "cgroup", "ok", "end with it"),
        ("24.05", "SlurmdTimeout", "900 s", "note", "15m00s"),
        ("24.05", "JobSubmitPlugins", "lua", "note", "may change or refuse"),
        ("24.05", "GPUs", "88 in gpu, cons_tres", "ok", "--gres=gpu"),
        ("25.11", "PreemptMode", "CANCEL", "warn", "cancels a preempted run"),
        ("25.11", "KillWait", "10 s", "warn", "this is short"),
        ("25.11", "send_user_signal", "no", "ok", "SIGTERM alone"),
        ("25.11", "JobRequeue", "0", "ok", "say --requeue themselves"),
        ("25.11", "RequeueExitHold", "1", "warn", "runs.py requeue lets it go"),
        ("25.11", "requeue delay", "30 s", "ok", "--requeue=expedite"),
        ("25.11", "accounting", "SLURM keeps none", "note", "journals"),
        ("25.11", "MaxTime", "40m", "note", "loading is a large part"),
    ],
)
def test_each_fact_is_told_with_its_consequence(
    facts: dict[str, Facts], version: str, name: str, value: str, level: str, words: str
) -> None:
    found = facts[version]
    assert name in found, sorted(found)
    assert found[name][:2] == (value, level)
    assert words in found[name][2]


def test_what_is_another_clusters_or_another_qos_is_left_out(facts: dict[str, Facts]) -> None:
    found = facts["24.05"]
    assert "QOS gpu" not in found
    assert found["MaxJobs of vision"][0] == "20"  # 1 on another cluster
    assert "accounts" not in facts["25.11"]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (
            "24.05",
            {
                "gpus_per_node": 4,
                "gpu_type": "a100",
                "partition": "gpu",
                "account": "vision",
                "cpus_per_gpu": 32,
                "mem_gb_per_gpu": 237,
                "walltime": 12 * 3600,
                "grace": 600,
                "device": "cuda",
            },
        ),
        ("25.11", {"gpus_per_node": 8, "partition": "spot", "walltime": 2400, "grace": 600, "gpu_type": ""}),
    ],
)
def test_the_preset_plans_as_it_is(tmp_path: Path, version: str, expected: dict[str, object]) -> None:
    path = tmp_path / "mine.yaml"
    done = doctor(tmp_path, version, "--write", str(path))
    assert done.returncode == 0, done.stderr
    assert f"wrote {path}: submit with cluster=mine" in done.stdout
    spec = Layers.read(path).build(ClusterSpec)
    assert {key: getattr(spec, key) for key in expected} == expected
    file = chain.write(tmp_path)
    base = tmp_path / "base.yaml"
    preset = "".join(f"  {line}\n" for line in path.read_text().splitlines())
    base.write_text(f"cluster:\n{preset}{chain.BASE}runs: {tmp_path / 'runs'}\n")
    assert make(file).stages[2].spec.cluster.partition == expected["partition"]
    again = doctor(tmp_path, version, "--write", str(path))
    assert (again.returncode, "is there already: --force replaces it" in again.stderr) == (2, True)
    assert doctor(tmp_path, version, "--write", str(path), "--force").returncode == 0


def test_a_partition_without_gpus_gets_a_preset_for_processors(tmp_path: Path) -> None:
    path = tmp_path / "cpus.yaml"
    assert doctor(tmp_path, "24.05", "--partition", "cpu", "--write", str(path)).returncode == 0
    spec = Layers.read(path).build(ClusterSpec)
    assert (spec.device, spec.gres, spec.gpus_per_node, spec.cpus_per_gpu) == ("cpu", False, 8, 16)


def test_the_report_is_for_reading(tmp_path: Path) -> None:
    text = doctor(tmp_path, "24.05").stdout
    assert text.startswith("alder: SLURM 24.05.2\n")
    assert " * gpu: 16 nodes (2 idle) of 4 a100, 128 CPUs, 1000 GB; 4 nodes (0 idle) of 6 a30" in text
    assert "   old: 40 nodes (0 idle) of 8 v100, 40 CPUs, 375 GB; walltime 1d00h; closed" in text
    assert "\n ! RequeueExit" in text
    assert max(map(len, text.splitlines())) <= 140


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--partition", "nope"], "nope: no partition with nodes that you may see; there are cpu, gpu, old"),
        (["--write", "a b"], "'a b' cannot name a preset"),
        (["--write", "h100"], "h100.yaml is there already"),
    ],
)
def test_what_a_wrong_command_says(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = doctor(tmp_path, "24.05", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_without_slurm_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "runs.py"), "doctor"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": str(tmp_path)},
    )
    assert done.returncode == 3
    assert "scontrol: not found; is this a SLURM login node?" in done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(null)", (0, "")),
        ("gpu:8", (8, "")),
        ("gpu:h100:8(S:0-1)", (8, "h100")),
        ("gpu:a100:4(S:0,2),gpu:a30:2(S:1),shard:24", (6, "a100")),
        ("gpu:a100_3g.20gb:2,craynetwork:4", (2, "a100_3g.20gb")),
    ],
)
def test_gres_as_sinfo_prints_it(text: str, expected: tuple[int, str]) -> None:
    assert settings.parse_gres(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("UNLIMITED", 0), ("12:00:00", 43200), ("7-00:00:00", 604800), ("30:00", 1800), ("60", 3600), ("", 0)],
)
def test_times_as_scontrol_prints_them(text: str, expected: int) -> None:
    assert settings.seconds(text) == expected
