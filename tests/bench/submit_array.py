"""What submitting a sweep costs: python -m tests.bench.submit_array [--sizes 10 100 1000] [--rounds 5] [--out FILE]

On a private SLURM, side by side and in turns: a bare `sbatch --array`, submitit's `map_array`, and this project's own
transaction (launch.submission: plan, script, intent, sbatch, record, all flushed to the disk). RPCs are those that
slurmctld counts (sdiag), files are those below the folder of the contender. What comes before the transaction is told
apart: reading the YAML and checking every point (`plan`), the digests that name the runs (`names`), whether the code is
kept already (`code`), and what the start of Python and the imports take; last the whole command, `submit.py` in a
process of its own. CPU is this process's. The jobs wait for an hour that does not come.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import submitit

from launch import plan, snapshot, submission
from tests.launch import chain
from tests.slurm.cluster import PrivateSlurm

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "#!/bin/sh\n#SBATCH --begin=now+1hour\n#SBATCH -n1\n#SBATCH --output=/dev/null\nsleep 1\n"


def bare(folder: Path, size: int) -> None:
    """One sbatch of one small script."""
    (folder / "script").write_text(SCRIPT)
    command = ["sbatch", "--parsable", f"--array=0-{size - 1}", str(folder / "script")]
    subprocess.run(command, check=True, capture_output=True)


def by_submitit(folder: Path, size: int) -> None:
    """submitit's own array of one function's calls."""
    executor = submitit.SlurmExecutor(folder=folder)
    executor.update_parameters(time=60, additional_parameters={"begin": "now+1hour"}, array_parallelism=size)
    executor.map_array(abs, range(size))


def ours(folder: Path, size: int) -> None:
    """A sweep, planned and submitted; the snapshot of the code is there, as after the first submission."""
    [code] = (folder / "runs" / "code").iterdir()
    [batch] = submission.submit(prepared(folder, size), code)
    assert len(batch[0].runs) == size


def prepared(folder: Path, size: int) -> plan.Plan:
    """The plan of a first stage with so many points."""
    if not (folder / "s1.yaml").exists():
        chain.write(folder)
        rates = ", ".join(f"{i + 1}e-6" for i in range(size))
        with open(folder / "s1.yaml", "a") as file:
            file.write(f"sweep: {{train.optim.lr: [{rates}]}}\n")
    if folder not in PLANS:
        PLANS[folder] = plan.make(folder / "s1.yaml", LATER)
    return PLANS[folder]


LATER = ("cluster.sbatch={begin: 'now+1hour'}",)
PLANS: dict[Path, plan.Plan] = {}
CONTENDERS: dict[str, Callable[[Path, int], None]] = {
    "bare sbatch": bare,
    "submitit": by_submitit,
    "ours": ours,
}


def rpcs(slurm: PrivateSlurm) -> int:
    """How many requests slurmctld has served, sdiag's own and the nodes' left out."""
    text = slurm.run(["sdiag"]).stdout.partition("by message type")[2].partition("by user")[0]
    counts = re.findall(r"^\s+(\w+)\s.*?count:(\d+)", text, re.MULTILINE)
    left_out = ("STATS", "NODE_REGISTRATION", "PING", "EPILOG", "ASSOC")
    return sum(int(n) for name, n in counts if not any(word in name for word in left_out))


def files(folder: Path) -> int:
    """Regular files below the folder."""
    return sum(path.is_file() for path in folder.rglob("*"))


def once(slurm: PrivateSlurm, name: str, size: int, folder: Path) -> dict[str, float]:
    """One submission, measured, and cancelled."""
    folder.mkdir(parents=True)
    planning = naming = coding = 0.0
    if name == "ours":
        began = time.perf_counter()
        planned = prepared(folder, size)
        planning = time.perf_counter() - began
        assert len({run.identity for stage in planned.stages for run in stage.runs}) == size
        naming = time.perf_counter() - began - planning
        snapshot.take(folder / "runs")
        began = time.perf_counter()
        snapshot.take(folder / "runs")
        coding = time.perf_counter() - began
    before, there = rpcs(slurm), files(folder)
    began, cpu = time.perf_counter(), time.process_time()
    CONTENDERS[name](folder, size)
    seconds = time.perf_counter() - began
    found = {
        "seconds": seconds,
        "cpu": time.process_time() - cpu,
        "rpcs": rpcs(slurm) - before,
        "files": files(folder) - there,
        "plan": planning,
        "names": naming,
        "code": coding,
    }
    if name == "ours":
        (folder / "runs").rename(folder / "before")
        slurm.run(["scancel", "--user=root"])
        command = [sys.executable, str(ROOT / "launch" / "submit.py"), str(folder / "s1.yaml"), *LATER]
        (folder / "runs").mkdir()
        (folder / "before" / "code").rename(folder / "runs" / "code")
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        found["command"] = time.perf_counter() - began
    slurm.run(["scancel", "--user=root"])
    shutil.rmtree(folder)
    return found


def start(words: str) -> float:
    """Seconds of a Python that does no more than this."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", words], check=True, cwd=ROOT)
    return time.perf_counter() - began


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--out", type=Path)
    chosen = options.parse_args()
    table: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary, PrivateSlurm(nodes=2) as slurm:
        os.environ.update(slurm.env())
        for size in chosen.sizes:
            rows: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
            for turn in range(chosen.rounds):
                names = list(CONTENDERS)
                for name in names[turn % 3 :] + names[: turn % 3]:
                    rows[name].append(
                        once(slurm, name, size, Path(temporary) / f"{size}_{turn}_{name.split()[0]}")
                    )
            for name, found in rows.items():
                middle = {key: statistics.median(row[key] for row in found) for key in found[0]}
                pairs = zip(found, rows["bare sbatch"], strict=True)
                middle["over bare"] = statistics.median(
                    row["seconds"] - base["seconds"] for row, base in pairs
                )
                table[f"{name} {size}"] = middle
                print(
                    f"{size:5} elements  {name:12}  {middle['seconds'] * 1000:7.1f} ms"
                    f" ({middle['cpu'] * 1000:.0f} of CPU)"
                    f"  (bare {middle['over bare'] * 1000:+7.1f} ms)  {middle['rpcs']:4.0f} RPCs"
                    f"  {middle['files']:5.0f} files"
                    + (
                        f"  (before it: plan {middle['plan'] * 1000:.0f} ms, names {middle['names'] * 1000:.0f} ms,"
                        f" code {middle['code'] * 1000:.0f} ms;"
                        f" the whole command {middle['command'] * 1000:.0f} ms)"
                        if name == "ours"
                        else ""
                    ),
                    flush=True,
                )
    for words in ("import launch.cli", "import launch.cli, launch.submission", "import submitit"):
        table[words] = {"seconds": statistics.median(start(words) for _ in range(chosen.rounds))}
        print(f"python -c '{words}': {table[words]['seconds'] * 1000:.0f} ms")
    print(f"load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores")
    if chosen.out:
        chosen.out.write_text(json.dumps({"load": os.getloadavg()[0], **table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
