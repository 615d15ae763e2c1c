"""The plan on this machine: submitit's local executor, stage after stage, in the foreground.

The ranks run the same `launch.job` as on SLURM. The first Ctrl-C warns them as SLURM would: they save and leave, and
the same command goes on from there. A plan whose submitter died is found running, and followed.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import submitit
from submitit.local.local import start_controller

from launch.files import write_json
from launch.operating.status import alive, batch_of, children, started, state_of
from launch.plan import Plan, Run, StagePlan, runs_folder
from launch.progress import Progress
from launch.record import RunFolder
from launch.recovery.findings import Finding, comes_back, first_line, held, of_attempt
from launch.recovery.pulse import beats
from launch.recovery.watch import DUMP, Limits, Watch, note
from launch.submission import Batch, host, locked, prepare, token_of
from launch.verdict import speak

FULL = "make room, or lower train.keep; the same command goes on from the last saved step"


class LocalError(Exception):
    """A run on this machine ended without finishing; the text says how."""


class LocalExecutor(submitit.LocalExecutor):  # type: ignore[misc]
    """submitit's local executor, whose ranks run `launch.job` rather than a pickle."""

    def start(self, batch: Path, index: int, code: Path) -> int:
        """Start the ranks and return their controller's pid."""
        command = f"{self.python} -u -m launch.job {shlex.quote(str(batch))} {index}"
        here = os.getcwd()
        # The controller inherits both: the folder, so that the snapshot is what Python finds, and that SIGINT is
        # ignored, so that Ctrl-C reaches only this process and the ranks are warned rather than killed.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            os.chdir(code)
            return int(
                start_controller(
                    folder=self.folder,
                    command=command,
                    tasks_per_node=self.parameters["tasks_per_node"],
                    timeout_min=self.parameters["timeout_min"],
                    signal_delay_s=self.parameters["signal_delay_s"],
                    stderr_to_stdout=True,
                ).pid
            )
        finally:
            os.chdir(here)
            signal.signal(signal.SIGINT, before)


class Interrupts:
    """Ctrl-C, counted: the first has the ranks save and leave, the second gives up what is not saved."""

    def __init__(self) -> None:
        self.pressed = 0
        self.controller = 0  # of the ranks that train now
        self.starting = False  # they are being started, and must not be left alone
        self.warned = False

    @contextmanager
    def heard(self) -> Iterator[Interrupts]:
        """Count them for as long as this lasts; KeyboardInterrupt where there is nothing to wait for."""
        before = signal.signal(signal.SIGINT, self._press)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed += 1
        if self.pressed == 1:
            print(
                "\nstopping: the ranks save and leave (Ctrl-C again to give up what is not saved)", flush=True
            )
        if self.pressed > 1:
            for rank in children(self.controller) if self.controller else ():
                _kill(rank, signal.SIGKILL)
        if self.pressed > 1 or not (self.controller or self.starting):
            raise KeyboardInterrupt

    def forward(self, folder: RunFolder) -> None:
        """Warn ranks that train, once; those that still load have nothing to save, and are ended as they appear."""
        if not self.pressed or self.warned:
            return
        self.warned = started_training(folder, self.controller)
        for rank in children(self.controller):
            _kill(rank, signal.SIGTERM if self.warned else signal.SIGKILL)


def started_training(folder: RunFolder, controller: int) -> bool:
    """Whether the controller's ranks have come as far as their first step."""
    attempt = f"local-{controller}"
    return any(one["event"] == "start" and one.get("attempt") == attempt for one in folder.journal)


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def run(plan: Plan, code: Path) -> None:
    """Run what is missing, upstream first; raises LocalError, and KeyboardInterrupt after the ranks have saved."""
    with Interrupts().heard() as interrupts:
        for stage in plan.stages:
            for one in stage.runs:
                _finish(one, stage, code, interrupts)


def _finish(one: Run, stage: StagePlan, code: Path, interrupts: Interrupts) -> None:
    """Bring one run to its end: follow it where it runs, start it where it does not, as often as its verdict says."""
    folder = one.folder
    while state_of(folder, None).name != "done":
        root = runs_folder(one.spec)
        with locked(root):
            state = state_of(folder, None)
            if state.name == "running":
                pid = int(state.job)
            else:
                batch = Batch(stage, (one,), "", token_of([one], root))
                prepare(batch, code, [one.name] if one.folder.made else ())
                one.folder.make()
                executor = LocalExecutor(
                    folder=batch.folder / "slurm",
                    python=shlex.quote(one.spec.cluster.python or sys.executable),
                )
                executor.update_parameters(
                    tasks_per_node=one.spec.gpus,
                    timeout_min=int(one.spec.cluster.walltime) / 60,
                    signal_delay_s=int(one.spec.cluster.grace),
                )
                interrupts.starting = True
                pid = executor.start(batch.folder, one.index, code)
                write_json(
                    batch.folder / "batch.json",
                    {
                        "state": "submitted",
                        "token": batch.token,
                        "pid": pid,
                        "started": started(pid),
                        "host": host(),
                    },
                )
        interrupts.controller, interrupts.starting = pid, False
        follow(one, pid, interrupts)
        interrupts.controller = 0
        attempt = f"local-{pid}"
        found = of_attempt(folder, attempt, 0)
        if interrupts.pressed and not interrupts.warned and found.verdict != "finished":
            found = Finding("preempted", "SIGTERM")  # ended as it loaded
        interrupted = found.verdict == "preempted" and found.reason == "SIGTERM"
        done = found.verdict == "finished"
        # Nobody but this user makes room here, and who waits is told at once.
        full = found.verdict == "full disk"
        back = not done and not interrupted and not full and comes_back(folder, found.verdict)
        again = back and not interrupts.pressed
        stop = "" if done or back or interrupted else held(folder, found.verdict)
        speak(folder, attempt, found, again=again, held=stop)
        if interrupted or (interrupts.pressed and (done or back)):
            raise KeyboardInterrupt
        if not done and not again:
            log = f"{folder.logs(attempt)}/rank_{found.rank}.log"
            do = f"\n  {FULL}" if full else ""
            raise LocalError(f"{one.name}: {found.verdict}: {found.reason}{do}\n  log: {log}")
        if not done:
            print(f"{one.name}: {found.verdict} ({first_line(found.reason)}); starting again", flush=True)


def follow(one: Run, pid: int, interrupts: Interrupts) -> None:
    """Show the run's progress until its controller has ended."""
    batch = batch_of(one.folder)
    token = int(batch[0].get("started", 0)) if batch else 0
    logs = one.folder.logs(f"local-{pid}")
    watch = Watch(Limits.of(one.folder.spec), one.spec.gpus)
    looked = time.monotonic()
    with Progress(one) as progress:
        while alive(pid, token):
            interrupts.forward(one.folder)
            try:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    break
            except ChildProcessError:
                pass  # another submitter's
            failed = list(logs.glob("failure_*.json"))
            if not failed and (now := time.monotonic()) - looked > watch.limits.every:
                silence = watch.look(beats(logs), now - looked)
                looked = now
                if silence:
                    note(one.folder, f"local-{pid}", silence)
                    for number, wait in ((DUMP, 2.0), (signal.SIGKILL, 0.0)):
                        for rank in children(pid):
                            _kill(rank, number)
                        time.sleep(wait)
            if failed and time.time() - failed[0].stat().st_mtime > 10:
                for rank in children(pid):  # one rank has failed, and the others may wait for it without end
                    _kill(rank, signal.SIGKILL)
            progress.show()
            time.sleep(0.2)
        progress.show(last=True)
