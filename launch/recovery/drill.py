"""The verb `drill`: trains an experiment in a folder of its own, does to it once what clusters do, and keeps score.

Each kind of fault comes two steps after a save, and the next when the run trains again. What is scored is the run's own
journal: the verdict, the steps that were computed again, and the seconds until it trained on. At the end each step must
be there once, the handoff must be whole, and with --compare the weights those of a run that was left alone.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from launch import handoff
from launch.exits import FAILED, INTERRUPTED, OK, USAGE
from launch.files import read_lines
from launch.operating.logs import complain
from launch.plan import Plan, Run, make, runs_folder
from launch.reader import SpecError
from launch.record import RunFolder
from launch.recovery.hands import KINDS, Hands, Kind, LocalHands, SlurmHands
from launch.snapshot import REPOSITORY

PATIENCE = (
    900.0  # seconds until a run that does not come back is given up; SLURM alone makes it wait two minutes
)
HANG = 20  # seconds of a silent step, in a drill


@dataclass
class Score:
    """What one fault came to."""

    kind: str
    done: str  # what was done
    verdict: str = ""
    lost: int = 0
    bound: int = 0
    seconds: float = 0.0  # until it trained again
    passed: bool = False


class Drill:
    """One run under faults; `submit` is given again where it ends early, as a person would."""

    def __init__(self, run: Run, command: list[str], every: int, seed: int) -> None:
        self.run, self.command, self.every = run, command, every
        self.folder: RunFolder = run.folder
        self.local = run.spec.cluster.executor == "local"
        self.hands: Hands = (
            LocalHands(run.folder, random.Random(seed)) if self.local else SlurmHands(run.folder)
        )
        self.process: subprocess.Popen[bytes] | None = None

    def submit(self) -> None:
        """Start the command, on SLURM to its end."""
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if not self.local:
            self._ended(self.process.wait())

    def _ended(self, code: int) -> None:
        assert self.process is not None
        assert self.process.stderr is not None
        said = self.process.stderr.read().decode(errors="replace")
        self.process.stderr.close()
        self.process = None
        full = (self.folder.last("verdict") or {}).get(
            "verdict"
        ) == "full disk"  # after which a person makes room
        if code not in (OK, INTERRUPTED) and not (self.local and full):
            raise LookupError(f"the drill's run ended with {code}:\n{said.strip()[-2000:]}")

    def tend(self) -> None:
        """Give the command again where a warning ended it: on this machine TERM is Ctrl-C."""
        if self.process is not None and (code := self.process.poll()) is not None:
            self._ended(code)
            if not self.folder.handoff_file.exists():
                self.submit()

    def until(self, number: int, step: int) -> bool:
        """Wait until attempt `number` has logged that step; False when the run was over before."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            self.tend()
            start = self.folder.last("start")
            if start and start["number"] >= number and self.folder.last_metrics().get("step", 0) >= step:
                return True
            if self.folder.handoff_file.exists():
                return False
            time.sleep(0.05)
        raise LookupError(
            f"{self.run.name} does not come back: python launch/runs.py explain {self.run.name}"
        )

    def suffer(self, kind: Kind, at: int) -> Score | None:
        """Do it once the run has logged step `at`, and see what comes of it; None where it cannot be done here."""
        before = self.folder.last("start")
        number = int(before["number"]) if before else 0
        if not self.until(number, at):
            return None
        began = time.time()
        if not (done := kind.do(self.hands, self.folder)):
            return None
        bound = kind.bound * self.every if kind.bound else 1
        score = Score(kind.name, done, bound=bound)
        if not self.until(number + 1, 0):
            score.verdict = "the run ended before it struck"
            return score
        records = self.folder.journal
        start = next(r for r in reversed(records) if r["event"] == "start")
        verdicts = [r for r in records if r["event"] == "verdict" and r["time"] > began]
        score.verdict = (
            f"{verdicts[0]['verdict']}: {verdicts[0]['reason']}".strip(": ") if verdicts else "none spoken"
        )
        score.lost = int(start["last"]) - int(start["step"])
        score.seconds = float(start["time"]) - began
        score.passed = score.lost <= bound
        return score


def drill(options: argparse.Namespace) -> int:
    """Rehearse; exit code 1 when a run lost more than it may, or is not what it would have been."""
    if wrong := [name for name in options.kinds.split(",") if name and name not in KINDS]:
        return complain(f"{wrong[0]}: no such fault; there are {', '.join(KINDS)}")
    kinds = [KINDS[name] for name in options.kinds.split(",") if name] or list(KINDS.values())
    try:
        plan, command = planned(options, kinds, "drill")
    except SpecError as error:
        print(error, file=sys.stderr)
        return USAGE
    run = plan.stages[-1].runs[0]
    if run.folder.handoff_file.exists():
        return complain(
            f"{run.folder.path} has been drilled: remove {options.runs / 'drill'}, or choose another --runs"
        )
    one = Drill(run, command, options.save_every, options.seed)

    def say(text: str) -> None:
        if not options.json:
            print(text, flush=True)

    say(f"drill of {run.name} in {run.folder.path}: {', '.join(kind.name for kind in kinds)}")
    scores = []
    one.submit()
    for place, kind in enumerate(kinds):
        score = one.suffer(
            kind, (2 * place + 2) * options.save_every + 2
        )  # with two saves, for one to be torn
        if score:
            scores.append(score)
            say(line(score))
        else:
            say(f"{kind.name:16} not possible here")
    one.until(10**9, 0)
    if one.process is not None:
        one._ended(one.process.wait())
    faults = list(wrongs(run.folder))
    if options.compare and not faults:
        calm, again = planned(options, kinds, "calm")
        other = Drill(calm.stages[-1].runs[0], again, options.save_every, options.seed)
        other.submit()
        other.until(10**9, 0)
        if other.process is not None:
            other._ended(other.process.wait())
        mine, theirs = (handoff.read(folder)["digest"] for folder in (run.folder, other.folder))
        if mine != theirs:
            faults.append("its weights are not those of a run that was left alone")
    passed = not faults and all(score.passed for score in scores)
    if options.json:
        print(json.dumps({"passed": passed, "scores": [asdict(s) for s in scores], "faults": faults}))
    else:
        same = (
            "; its weights are those of a run that was left alone" if options.compare and not faults else ""
        )
        print("\n".join(faults) or f"every step is there once, and the handoff is whole{same}")
        print(f"{sum(s.passed for s in scores)} of {len(scores)} passed")
    return OK if passed else FAILED


def planned(options: argparse.Namespace, kinds: list[Kind], name: str) -> tuple[Plan, list[str]]:
    """The plan in a folder of its own, with as many steps as the faults need, and the command that submits it."""
    steps = 2 * options.save_every * (len(kinds) + 2)
    settings = [
        *options.overrides,
        f"train.steps={steps}",
        f"train.save_every={options.save_every}",
        "train.keep=3",
        f"runs={options.runs / name}",
    ]
    if make(options.spec, settings).stages[-1].spec.cluster.executor == "local":
        settings.append(f"cluster.hang_after={HANG}s")  # SLURM takes longer to end a step by itself
    command = [sys.executable, str(REPOSITORY / "launch" / "submit.py"), str(options.spec), *settings, "-y"]
    plan = make(options.spec, settings)
    runs_folder(plan.stages[-1].spec).mkdir(parents=True, exist_ok=True)
    return plan, command


def wrongs(folder: RunFolder) -> Iterator[str]:
    """What is not as it should be with a run that is over, in words."""
    steps = [int(row["step"]) for row in read_lines(folder.metrics_file)]
    if steps != list(range(1, (steps or [0])[-1] + 1)):
        yield f"{folder.metrics_file} has not every step once, in order"
    try:
        handoff.check(folder, handoff.read(folder), digests=True)
    except handoff.HandoffError as error:
        yield str(error)


def line(score: Score) -> str:
    """A line of the card."""
    mark = "passed" if score.passed else "FAILED"
    return (
        f"{score.kind:16} {mark}  lost {score.lost} of at most {score.bound} steps, trained again after "
        f"{score.seconds:.0f} s  ({score.done}; {score.verdict.splitlines()[0][:100]})"
    )
