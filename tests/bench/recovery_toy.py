"""A toy trainer of two ranks in lockstep, with four ways to deal with a cluster that takes its nodes.

`submitit`: its `checkpoint()`, the state in the pickle. `lightning`: save and requeue within the handler of USR1,
SIGTERM bypassed, resumed from such a save alone. `lingua`: USR2 sets a flag on each rank, saved and requeued between
steps, saves every so many steps too. `ours`: launch.preemption's flag, agreed on by the ranks, and launch.verdict
after srun. As their documentation says what they do; each in its own few lines here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from launch.files import read_json, write_json
from launch.preemption import Preemption
from launch.record import RunFolder

STEPS, STEP, EVERY, RANKS = 240, 0.2, 20, 2


class Toy:
    """One rank: a step takes STEP seconds and waits for the other rank's; every step is noted."""

    def __init__(self, folder: Path, rank: int, attempt: str) -> None:
        self.folder, self.rank, self.attempt = folder, rank, attempt
        self.events = os.open(folder / "events", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, what: str, step: int) -> None:
        os.write(self.events, f"{time.time()} {self.attempt} {self.rank} {what} {step}\n".encode())

    def meet(self, what: str, value: int = 0) -> int:
        """Wait until all ranks have come here; the largest of their values. For ever, as collectives do."""
        mine = self.folder / f"{self.attempt}_{what}_{self.rank}"
        mine.with_suffix(".tmp").write_text(str(value))
        os.rename(mine.with_suffix(".tmp"), mine)
        others = [self.folder / f"{self.attempt}_{what}_{rank}" for rank in range(RANKS)]
        while not all(other.exists() for other in others):
            time.sleep(0.005)
        return max(int(other.read_text()) for other in others)

    def step(self, number: int, value: int = 0) -> int:
        """Compute a step; the largest value that a rank has brought along."""
        time.sleep(STEP)
        found = self.meet(f"s{number}", value)
        self.note("step", number)
        return found

    def save(self, step: int, name: str = "last") -> None:
        """All ranks, at the same step."""
        self.meet(f"save{step}_{name}")
        if self.rank == 0:
            write_json(self.folder / f"{name}.json", {"step": step})
        self.meet(f"saved{step}_{name}")

    def saved(self, name: str = "last") -> int:
        return int((read_json(self.folder / f"{name}.json") or {"step": 0})["step"])


class BySubmitit:
    """What submitit calls and asks for a checkpoint."""

    def __init__(self, folder: str) -> None:
        self.folder, self.done = folder, 0

    def __call__(self) -> None:
        import submitit

        place = submitit.JobEnvironment()
        attempt = f"{place.job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        toy = Toy(Path(self.folder), place.global_rank, attempt)
        while self.done < STEPS:
            toy.step(self.done + 1)
            self.done += 1
        toy.note("done", STEPS)

    def checkpoint(self) -> object:
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def requeue(id: str) -> None:
    subprocess.run(["scontrol", "requeue", id], check=False)


def lightning(toy: Toy) -> None:
    at = toy.saved("hpc_ckpt_1")

    def warned(number: int, frame: FrameType | None) -> None:
        toy.save(at, "hpc_ckpt_1")
        if toy.rank == 0:
            requeue(os.environ["SLURM_JOB_ID"])

    signal.signal(signal.SIGUSR1, warned)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    while at < STEPS:
        toy.step(at + 1)
        at += 1


def lingua(toy: Toy) -> None:
    flag = False

    def warned(number: int, frame: FrameType | None) -> None:
        nonlocal flag
        flag = True

    signal.signal(signal.SIGUSR2, warned)
    at = toy.saved()
    while at < STEPS:
        at += 1
        toy.step(at)
        if flag:
            toy.save(at)
            if toy.rank == 0:
                requeue(os.environ["SLURM_JOB_ID"])
            sys.exit(0)
        if at % EVERY == 0:
            toy.save(at)


def ours(toy: Toy, warned: Callable[[], bool]) -> None:
    folder = RunFolder(toy.folder)
    at = toy.saved()
    number = sum(record["event"] == "start" for record in folder.journal)
    if toy.rank == 0:
        folder.note("launched", attempt=toy.attempt)
        folder.note("start", attempt=toy.attempt, number=number, step=at, last=0, world=RANKS)
    outcome = "finished"
    while at < STEPS:
        at += 1
        stop = toy.step(at, int(warned()))
        if stop or at % EVERY == 0 or at == STEPS:
            toy.save(at)
            if toy.rank == 0:
                folder.note("saved", attempt=toy.attempt, step=at)
        if stop and at < STEPS:
            outcome = "preempted"
            break
    if outcome == "finished":
        toy.note("done", STEPS)
    if toy.rank == 0:
        folder.note("ended", attempt=toy.attempt, outcome=outcome, reason=getattr(warned, "warned", ""))


def main(style: str, place: str) -> None:
    """One rank of a step that srun started."""
    warned = Preemption() if style == "ours" else None
    folder = Path(place)
    element = os.environ["SLURM_JOB_ID"]
    if style == "ours":  # given the batch, as launch.job is
        from launch.cluster import element_id

        folder, element = Path(json.loads((folder / "plan.json").read_text())["runs"]["0"]), element_id()
    toy = Toy(
        folder, int(os.environ["SLURM_PROCID"]), f"{element}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    )
    if warned is not None:
        ours(toy, warned)
    else:
        {"lightning": lightning, "lingua": lingua}[style](toy)
        toy.note("done", STEPS)


if __name__ == "__main__":
    main(*sys.argv[1:])
