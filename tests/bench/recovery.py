"""Four ways to survive the same faults: python -m tests.bench.recovery [--out FILE]

One toy trainer (tests.bench.recovery_toy) of two ranks, on one private SLURM as SLURM's defaults have it, all four
at once, a node each. Each run meets, at the same steps: preemption without grace, the warning before the walltime, a
rank's SIGKILL, the loss of its node, preemption in its last steps. A run that stands still or is gone is helped as a
person would, and that is counted. What SLURM makes a requeued job wait is spared to all, and not in these seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import submitit

from launch import plan, script
from launch.files import write_json
from tests.bench.recovery_toy import EVERY, STEP, STEPS, BySubmitit
from tests.launch import chain
from tests.slurm.cluster import PrivateSlurm, SlurmError

ROOT = Path(__file__).resolve().parents[2]
FAULTS = {30: "preempted", 80: "warned", 130: "rank killed", 180: "node lost", STEPS - 3: "preempted"}
STILL = 45.0  # seconds without a step until a person looks
SCRIPT = """#!/bin/bash
#SBATCH --requeue --open-mode=append --ntasks=2 --cpus-per-task=1 --gres=gpu:h100:8 --time=60 --signal={signal}@30
#SBATCH --output={folder}/log
cd {root}
srun {python} -m tests.bench.recovery_toy {style} {folder}
"""


@dataclass
class Contender:
    """One of the four, and what was seen of it."""

    style: str
    warning: str
    submit: Callable[[Path], str]
    folder: Path
    job: str = ""
    left: dict[int, str] = field(default_factory=lambda: dict(FAULTS))
    allocated: float = 0.0
    stranded: float = 0.0
    manual: int = 0
    moved: float = 0.0
    rows: int = 0
    over: float = 0.0

    def events(self) -> list[tuple[float, str, int, str, int]]:
        file = self.folder / "events"
        lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return [(float(t), attempt, int(rank), what, int(step)) for t, attempt, rank, what, step in lines]

    def result(self) -> dict[str, object]:
        """What it came to."""
        found = self.events()
        steps = [(attempt, step) for _, attempt, rank, what, step in found if rank == 0 and what == "step"]
        ends = [time for time, *_, rank, what, _ in found if rank == 0 and what == "done"]
        late = [
            time
            for time, _, rank, what, _ in found
            if rank == 0 and what == "step" and ends and time > ends[0]
        ]
        before = len(steps) - len(late)
        return {
            "steps lost": before - max((step for _, step in steps), default=0),
            "steps trained again after the end": len(late),
            "stranded seconds": round(self.stranded, 1),
            "manual actions": self.manual,
            "attempts": len({attempt for attempt, _ in steps}),
            "allocated seconds": round(self.allocated, 1),
            "goodput": round(STEPS * STEP / self.allocated, 3) if self.allocated else 0.0,
            "finished": bool(ends),
        }


def by_hand(slurm: PrivateSlurm, style: str, warning: str) -> Callable[[Path], str]:
    """A plain sbatch."""

    def submit(folder: Path) -> str:
        text = SCRIPT.format(signal=warning, folder=folder, root=ROOT, python=sys.executable, style=style)
        return slurm.sbatch(text)

    return submit


def by_submitit(folder: Path) -> str:
    """submitit's executor, as its documentation has it."""
    os.chdir(ROOT)
    executor = submitit.SlurmExecutor(folder=folder / "submitit")
    executor.update_parameters(
        time=60, nodes=1, ntasks_per_node=2, signal_delay_s=30, additional_parameters={"gres": "gpu:h100:8"}
    )
    return str(executor.submit(BySubmitit(str(folder))).job_id)


def by_us(slurm: PrivateSlurm) -> Callable[[Path], str]:
    """This project's own script and verdict, with the toy for launch.job."""

    def submit(folder: Path) -> str:
        chain.write(folder)
        settings = [f"cluster.python={sys.executable}", "cluster.sbatch={gres: 'gpu:h100:8'}", "gpus=2"]
        settings += [
            "cluster.setup=[]",
            "cluster.device=cpu",
            "cluster.cpus_per_gpu=1",
            "cluster.mem_gb_per_gpu=1",
        ]
        [stage] = plan.make(folder / "s1.yaml", settings).stages
        batch = folder / "batches" / "toy"
        (batch / "slurm").mkdir(parents=True, exist_ok=True)
        write_json(batch / "plan.json", {"version": 1, "code": str(ROOT), "runs": {"0": str(folder)}})
        text = script.script(stage.spec, "toy", [0], batch, ROOT, "toy")
        text = text.replace(" -m launch.job ", " -m tests.bench.recovery_toy ours ")
        return slurm.sbatch(text) + "_0"

    return submit


def strike(slurm: PrivateSlurm, one: Contender, fault: str) -> bool:
    """Do it; False when the run is not there to be hit."""
    job = slurm.job(one.job)
    if job.state != "RUNNING" or not job.nodes:
        return False
    [node] = job.nodes
    if fault == "preempted":
        options = ["--partition=urgent", "-N1", f"--nodelist={node}", "--exclusive", "-o/dev/null", "-t1"]
        slurm.sbatch("#!/bin/sh\nsleep 1\n", *options)
    elif fault == "warned":
        slurm.run(["scancel", f"--signal={one.warning}", one.job])
    elif fault == "node lost":
        slurm.node_fails(node)
    else:
        for pid, words in sorted(slurm.processes(node).items(), reverse=True):
            python = words.startswith(sys.executable) and ("recovery_toy" in words or "submitit" in words)
            if python:
                return slurm.kill(pid, Path(f"/proc/{pid}/comm").read_text().strip())
        return False
    return True


def tend(slurm: PrivateSlurm, one: Contender, seconds: float) -> None:
    """Look at it once: count, strike, help."""
    job = slurm.job(one.job)
    found = one.events()
    rows = [step for _, _, rank, what, step in found if rank == 0 and what == "step"]
    done = any(what == "done" for *_, what, _ in found)
    now = time.monotonic()
    if job.state in ("RUNNING", "COMPLETING"):
        one.allocated += seconds
        if now - one.moved > 5 and one.rows and len(rows) == one.rows and not done:
            one.stranded += seconds
    if len(rows) != one.rows or job.state == "PENDING":
        one.rows, one.moved = len(rows), now
    if one.left and rows and rows[-1] >= min(one.left) and strike(slurm, one, one.left[min(one.left)]):
        del one.left[min(one.left)]
    gone = job.over and not done
    if not done and ((gone and now - one.moved > 5) or now - one.moved > STILL):
        one.manual += 1
        print(f"{one.style}: helped at step {rows[-1:]}: {job.state} {job.reason}", file=sys.stderr)
        slurm.run(["scancel", one.job], check=False)
        one.job, one.moved = one.submit(one.folder), now
    one.over = (one.over or now) if job.over and done else 0.0


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path)
    options.add_argument("--seconds", type=float, default=420)
    options.add_argument("--only", default="", help="the one whose name begins so")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary, PrivateSlurm(kill_wait=5, nodes=5) as slurm:
        os.environ.update(slurm.env())
        ways: dict[str, tuple[str, Callable[[Path], str]]] = {
            "submitit checkpoint()": ("USR2", by_submitit),
            "handler saves, as Lightning": ("USR1", by_hand(slurm, "lightning", "USR1")),
            "flag on each rank, as lingua": ("USR2", by_hand(slurm, "lingua", "USR2")),
            "ours": ("USR2", by_us(slurm)),
        }
        all_of_them = []
        ways = {style: way for style, way in ways.items() if style.startswith(chosen.only)}
        for number, (style, (warning, submit)) in enumerate(ways.items()):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            one = Contender(style, warning, submit, folder, moved=time.monotonic())
            one.job = submit(folder)
            all_of_them.append(one)
        end, last = time.monotonic() + chosen.seconds, time.monotonic()
        # A job that is over stays so for a while: SLURM may yet start it anew.
        while time.monotonic() < end and not all(
            one.over and time.monotonic() - one.over > 15 for one in all_of_them
        ):
            now = time.monotonic()
            try:
                slurm.nudge()
                for one in all_of_them:
                    tend(slurm, one, now - last)
            except SlurmError as error:
                print(f"slurm: {str(error).splitlines()[0]}", file=sys.stderr)
            last = now
            time.sleep(0.2)
        results = {one.style: one.result() for one in all_of_them}
    print(f"{STEPS} steps of {STEP} s, saved every {EVERY} where at all; faults at {FAULTS}")
    for style, result in results.items():
        print(f"{style:30}" + "  ".join(f"{key} {value}" for key, value in result.items()))
    print(f"load {os.getloadavg()[1]:.1f} of {os.cpu_count()} cores")
    if chosen.out:
        chosen.out.write_text(json.dumps({"load": os.getloadavg()[1], **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
