"""What the chaos happens to: the demo's three stages, a sweep at the third, on a private SLURM and a small disk.

The run folders lie on a small tmpfs, so that a full disk is a real one. Steps are told to take longer than they
would, by a sitecustomize.py that only the ranks see: a fault should find them training, and two cores should have
time for the restarts.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launch.cluster import Job as Queued
from launch.cluster import SlurmError as Unreachable
from launch.cluster import jobs as queue_of
from launch.files import read_json, read_lines
from launch.operating.status import State, state_of
from launch.record import RunFolder
from tests.slurm.cluster import PrivateSlurm
from tests.wandb_server import WandbServer

ROOT = Path(__file__).resolve().parents[2]
SPEC = ROOT / "experiments" / "demo" / "stage3_moe.yaml"

PAUSE = '''\
"""Each training step takes longer."""
import importlib.abc, importlib.util, os, sys, time


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "moe.engine":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            step = module.Engine.train_step

            def slow(*args):
                time.sleep(float(os.environ["STEP_PAUSE"]))
                return step(*args)

            module.Engine.train_step = slow

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
'''


@dataclass(frozen=True)
class Shape:
    """How much there is to disturb."""

    steps: tuple[int, int, int] = (20, 40, 500)  # of each stage
    points: int = 4  # of the third stage
    save_every: int = 10
    pause: float = 0.25  # seconds added to each step
    ranks: int = 2  # of a run
    until: str = "moe"  # the last stage

    @property
    def stages(self) -> int:
        return ("align", "instruct", "moe").index(self.until) + 1

    @property
    def runs(self) -> tuple[tuple[str, int], ...]:
        """Each run's name and its steps."""
        rates = [f"lr={rate}" for rate in self.rates]
        names = [
            ("demo/stage1_align", ["run"]),
            ("demo/stage2_instruct", ["run"]),
            ("demo/stage3_moe", rates),
        ]
        names = names[: self.stages]
        names[-1] = (names[-1][0], rates)
        return tuple(
            (f"{name}/{point}", steps)
            for (name, points), steps in zip(names, self.steps, strict=False)
            for point in points
        )

    @property
    def rates(self) -> list[str]:
        return [f"{i + 1}e-3" for i in range(self.points)]

    @property
    def total(self) -> int:
        return sum(steps for _, steps in self.runs)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A folder that holds so much and no more; needs root. Mount it before the nodes start, they keep what they saw."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        for _ in range(50):  # the nodes' last processes may still be ending
            if subprocess.run(["umount", folder], capture_output=True).returncode == 0:
                break
            time.sleep(0.2)
        else:
            subprocess.run(["umount", "--lazy", folder], check=True)


@dataclass
class World:
    """A cluster, a W&B server, a folder of runs, and the one command that submits them."""

    slurm: PrivateSlurm
    shape: Shape
    runs: Path
    data: Path
    scratch: Path
    wandb: WandbServer | None = None
    more: tuple[str, ...] = ()  # further settings
    seen: dict[str, int] = field(default_factory=dict)

    def settings(self) -> list[str]:
        shape = self.shape
        site = self.scratch / "site"
        site.mkdir(parents=True, exist_ok=True)
        (site / "sitecustomize.py").write_text(PAUSE)
        env = {"PYTHONPATH": site, "STEP_PAUSE": shape.pause, "WANDB_ERROR_REPORTING": "false"}
        for name in ("CACHE", "DATA", "ARTIFACT"):
            env[f"WANDB_{name}_DIR"] = self.scratch / "wandb" / name.lower()
        stages = ("stage1_align:", "stage2_instruct:", "")[: shape.stages]
        stages = (*stages[:-1], "")
        sweep = f"sweep={{train.optim.lr: [{', '.join(shape.rates)}]}}"
        return [
            "cluster.executor=slurm",
            "cluster.partition=main",
            f"cluster.gpus_per_node={shape.ranks}",
            "cluster.cpus_per_gpu=1",
            "cluster.walltime=40m",
            "cluster.grace=30s",
            "cluster.lifeline=1m",
            "cluster.sbatch={gres: 'gpu:h100:8'}",  # a node each
            f"cluster.env={{{', '.join(f'{key}: {value!s:}' for key, value in env.items())}}}",
            f"gpus={shape.ranks}",
            f"wandb.mode={'online' if self.wandb else 'disabled'}",
            f"runs={self.runs}",
            sweep,
            *(f"{stage}train.steps={n}" for stage, n in zip(stages, shape.steps, strict=False)),
            *(f"{stage}train.save_every={shape.save_every}" for stage in stages),
            *(f"{stage}train.micro_batch=2" for stage in stages),
            *(f"{stage}train.global_batch={4 * shape.ranks}" for stage in stages),
            *self.more,
        ]

    def environment(self) -> dict[str, str]:
        found = {"DATA_ROOT": str(self.data), "OMP_NUM_THREADS": "1"}
        if self.wandb:
            key = self.scratch / "netrc"
            host = self.wandb.url.removeprefix("http://")
            key.write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")
            key.chmod(0o600)
            found |= {"WANDB_BASE_URL": self.wandb.url, "NETRC": str(key)}
            found |= {"WANDB_CONFIG_DIR": str(self.scratch / "wandb" / "config")}
        return found

    def command(self) -> list[str]:
        spec = {1: "stage1_align", 2: "stage2_instruct", 3: "stage3_moe"}[self.shape.stages]
        return [
            sys.executable,
            str(ROOT / "launch" / "submit.py"),
            str(SPEC.with_stem(spec)),
            *self.settings(),
        ]

    def submit(self) -> subprocess.CompletedProcess[str]:
        """The command, to its end."""
        return self.slurm.run(
            self.command(), cwd=self.scratch, env=self.environment(), timeout=180, check=False
        )

    def submit_and_die(self, after: float) -> None:
        """The command, killed after so many seconds."""
        env = self.slurm.env(**self.environment())
        with open(os.devnull, "w") as nothing:
            process = subprocess.Popen(
                self.command(), cwd=self.scratch, env=env, stdout=nothing, stderr=nothing
            )
        time.sleep(after)
        process.kill()
        process.wait()

    @property
    def folders(self) -> dict[str, RunFolder]:
        return {name: RunFolder(self.runs / name) for name, _ in self.shape.runs}

    def runs_of(self, name: str) -> RunFolder:
        """The folder of the run of that name."""
        return RunFolder(self.runs / name)

    def reached(self) -> dict[str, int]:
        """The highest step each run has ever logged."""
        for name, folder in self.folders.items():
            self.seen[name] = max(self.seen.get(name, 0), int(folder.last_metrics().get("step", 0)))
        return self.seen

    def queue(self) -> Mapping[str, Queued] | None:
        """What SLURM says; None where it does not."""
        try:
            return queue_of()
        except Unreachable:
            return None

    def states(self, queue: Mapping[str, Queued] | None) -> dict[str, State]:
        return {name: state_of(folder, queue) for name, folder in self.folders.items()}


def outcome(folder: RunFolder) -> dict[str, object]:
    """What two runs of one spec must have in common to the bit: weights, handoff, the numbers of every step."""
    handoff = read_json(folder.handoff_file) or {}
    same = ("identity", "stage", "step", "digest", "shards", "tokenizer", "parent", "code")
    numbers = ("step", "loss", "ce", "aux", "lr", "grad_norm", "tokens", "samples", "padding")
    rows = [
        {key: value for key, value in row.items() if key in numbers}
        for row in read_lines(folder.metrics_file)
    ]
    return {
        "handoff": {key: handoff.get(key) for key in same},
        "history": rows,
        "eval": read_json(folder.eval_file),
    }
