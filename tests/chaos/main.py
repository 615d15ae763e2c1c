"""A hundred faults and more: python -m tests.chaos.main [--seed N] [--events N] [--out result.json]; `make chaos`.

It trains the demo's three stages twice on a private SLURM, in peace and with faults, and compares to the bit. Exit
code 1 when anything differs, more was lost than may be, or a person would have had to help.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.chaos import measure
from tests.chaos.drive import drive
from tests.chaos.world import ROOT, Shape, World, small_disk
from tests.slurm.cluster import PrivateSlurm
from tests.wandb_server import WandbServer


def main() -> int:
    """Run it; returns the exit code."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--events", type=int, default=150)
    options.add_argument("--steps", type=int, default=500, help="of each point of the third stage")
    options.add_argument("--pause", type=float, default=0.25, help="seconds added to each step")
    options.add_argument("--minutes", type=float, default=60, help="give up after so many")
    options.add_argument("--out", type=Path, default=Path("chaos.json"))
    chosen = options.parse_args()
    with contextlib.ExitStack() as stack:
        here = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        here.chmod(0o755)
        subprocess.run(
            [sys.executable, str(ROOT / "data" / "demo.py"), str(here / "data")],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        questions = here / "data" / "held_out.json"
        questions.write_text(json.dumps(json.loads(questions.read_text())[:12]))
        disk = stack.enter_context(small_disk(here / "runs", 600))
        slurm = stack.enter_context(PrivateSlurm(isolation="net", nodes=8, kill_wait=30, slurmd_timeout=10))
        server = stack.enter_context(WandbServer(slurm.place.controller))
        shape = Shape(steps=(20, 40, chosen.steps), pause=chosen.pause)
        calm = World(slurm, Shape(shape.steps, pause=0), here / "calm", here / "data", here / "calm_scratch")
        world = World(slurm, shape, disk, here / "data", here / "scratch", server)
        for folder in (calm.runs, calm.scratch, world.scratch):
            folder.mkdir()
        print("in peace", flush=True)
        began = time.time()
        peace = drive(calm, chosen.seed, 0, seconds=1200)
        print(
            f"in peace: {time.time() - began:.0f} s, done: {peace.done}\nwith faults, seed {chosen.seed}",
            flush=True,
        )
        story = drive(
            world,
            chosen.seed,
            chosen.events,
            seconds=60 * chosen.minutes,
            say=lambda words: print(words, flush=True),
        )
        slurm.run(
            [sys.executable, ROOT / "launch" / "runs.py", "--runs", world.runs, "sync"],
            env=world.environment(),
            check=False,
            timeout=300,
        )
        found = [b for name in world.folders for b in measure.breaks(name, world.runs_of(name), story.events)]
        result = judge(calm, world, story, found)
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")
        heavy = shutil.ignore_patterns("checkpoints", "code", "wandb")
        shutil.copytree(
            world.runs, chosen.out.with_suffix(""), ignore=heavy, dirs_exist_ok=True
        )  # to look into
        shutil.copytree(slurm.folder / "log", chosen.out.with_suffix("") / "slurm", dirs_exist_ok=True)
    return 1 if result["wrong"] else 0


def judge(calm: World, world: World, story: Any, found: list[measure.Break]) -> dict[str, Any]:
    """All that was measured, printed and as JSON."""
    rows = measure.losses(found, story.events)
    over = measure.over_the_bound(found, world.shape.save_every)
    differences = measure.differences(calm, world)
    result = {
        **story.plain(),
        "load": os.getloadavg()[1],
        "shape": asdict(world.shape),
        "losses": rows,
        "goodput": measure.goodput(world),
        "rates": measure.rates(world),
        "W&B": measure.tracked(world),
        "over the bound": [f"{b.run}: {b.lost} steps after {measure.blamed(b)}" for b in over],
        "differences": differences,
        "wrong": [*story.manual, *differences, *(f"{b.run} lost {b.lost}" for b in over)],
    }
    if not story.done:
        result["wrong"].append("not all runs are done")
    print(f"\n{measure.table(story, rows)}\n")
    print(
        f"{len(story.events)} faults in {story.seconds:.0f} s; manual actions {len(story.manual)}; "
        f"runs with a difference in any bit: {len({d.split(':')[0] for d in differences})} of {len(world.folders)}; "
        f"over the bound: {len(over)}"
    )
    print("\n".join(result["rates"]))
    for key in ("goodput", "W&B", "wrong"):
        print(f"{key}: {json.dumps(result[key])}")
    return result


if __name__ == "__main__":
    sys.exit(main())
