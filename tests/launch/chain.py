"""A chain of three small experiments on a made-up cluster, for tests that plan and submit but do not train."""

from __future__ import annotations

import os
import stat
from pathlib import Path

CLUSTER = """\
cluster: {executor: slurm, device: cuda, gpus_per_node: 2, gpu_type: h100, partition: main, account: vision,
  cpus_per_gpu: 4, mem_gb_per_gpu: 10, walltime: 1h, grace: 2m, python: python, setup: [module load cuda],
  env: {NCCL_DEBUG: WARN}}
"""
BASE = """\
gpus: 4
model: {random: true, tokenizer: "train:300"}
train: {steps: 5, global_batch: 8, micro_batch: 2}
data: {mix: some.json}
"""


def write(folder: Path, *, sweep2: str = "", sweep3: str = "") -> Path:
    """Write s1, s2 and s3 into the folder, runs beside them; returns s3's path."""
    (folder / "base.yaml").write_text(f"{CLUSTER}{BASE}runs: {folder / 'runs'}\n")
    (folder / "s1.yaml").write_text("inherits: base.yaml\nstage: align\ndata: {template: plain}\n")
    (folder / "s2.yaml").write_text(f"inherits: base.yaml\nstage: instruct\ninit_from: s1\n{sweep2}")
    (folder / "s3.yaml").write_text(
        f"inherits: base.yaml\nstage: moe\ninit_from: s2\nmoe: {{expert_parallel: 2}}\n{sweep3}"
    )
    return folder / "s3.yaml"


SBATCH = """\
#!/usr/bin/env python3
import json, os, pathlib, sys
here = pathlib.Path(__file__).parent
mode = (here / "mode").read_text() if (here / "mode").exists() else ""
count = len(list(here.glob("sent_*")))
if mode == "late":
    sys.exit("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
if mode == "refuse":
    sys.exit("sbatch: error: invalid partition specified: main")
(here / f"sent_{count}").write_text(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ)}))
script = pathlib.Path(sys.argv[-1]).read_text()
comment = next(line.split("=", 1)[1] for line in script.splitlines() if line.startswith("#SBATCH --comment="))
array = next(line.split("=", 1)[1] for line in script.splitlines() if line.startswith("#SBATCH --array="))
spans = [part.partition("-") for part in array.partition("%")[0].split(",")]
if mode.startswith("most "):
    there = len((here / "queue").read_text().splitlines()) if (here / "queue").exists() else 0
    if there + sum(int(last or first) + 1 - int(first) for first, _, last in spans) > int(mode.split()[1]):
        (here / f"sent_{count}").rename(here / f"refused_{count}_{os.getpid()}")
        sys.exit("sbatch: error: AssocMaxSubmitJobLimit\\nsbatch: error: Batch job submission failed: "
                 "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)")
with open(here / "queue", "a") as queue:
    for index in (i for first, _, last in spans for i in range(int(first), int(last or first) + 1)):
        queue.write(f"{100 + count}_{index}|PENDING|Priority||{comment}\\n")
if mode == "timeout":
    sys.exit("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
if mode == "kill":
    os.kill(os.getppid(), 9)
print(100 + count)
"""
SQUEUE = """\
#!/usr/bin/env python3
import pathlib
import sys
if "-s" in sys.argv:
    sys.exit(print(sys.argv[sys.argv.index("-j") + 1] + ".0"))
queue = pathlib.Path(__file__).parent / "queue"
print(queue.read_text() if queue.exists() else "", end="")
"""


def fake_slurm(folder: Path) -> Path:
    """An sbatch that answers as the real one and a squeue that shows what it took; put the folder first on PATH.

    `mode` in the folder makes it refuse, lose its answer after taking the job, or with it (`late`), kill the
    submitter, or take no more than so many elements (`most N`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        path = folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def path_with(folder: Path) -> str:
    """PATH with the folder first."""
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
