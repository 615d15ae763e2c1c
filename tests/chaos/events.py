"""The kinds of fault: how each is done to one run or to all, how it is undone, and what a run may lose by it."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from launch.recovery import lifeline
from tests.chaos.world import World
from tests.slurm.daemons import SlurmError
from tests.slurm.jobs import Job


@dataclass
class Target:
    """The array element that is disturbed, and where it runs."""

    run: str
    element: str
    nodes: tuple[str, ...]


@dataclass
class Chaos:
    """The faults of one world. `later` has what is still to be done: when, or whenever it answers yes."""

    world: World
    dice: random.Random
    later: list[tuple[float, Callable[[], bool]]] = field(default_factory=list)
    away: set[str] = field(default_factory=set)  # nodes, slurmctld, disk, wandb: what is down at the moment

    def at(self, seconds: float, act: Callable[[], object]) -> None:
        """Do it once, in so many seconds."""
        self.later.append((time.monotonic() + seconds, lambda: act() is None or True))

    def when(self, done: Callable[[], bool]) -> None:
        """Try again and again until it says yes."""
        self.later.append((0.0, done))

    def tend(self) -> None:
        """Do what is due."""
        due, self.later = self.later, []
        for moment, act in due:
            try:
                kept = moment > time.monotonic() or not act()
            except (SlurmError, subprocess.TimeoutExpired):
                kept = True  # slurmctld is away
            if kept:
                self.later.append((moment, act))

    def settle(self) -> None:
        """Undo all that still lasts."""
        end = time.monotonic() + 120
        while self.later and time.monotonic() < end:
            self.later = [(0.0, act) for _, act in self.later]
            self.tend()
            time.sleep(0.2)

    # --- to one run, with a warning

    def preempt(self, target: Target, grace: int) -> str:
        """A job of a higher partition takes the run's nodes."""
        slurm = self.world.slurm
        slurm.run(["scontrol", "update", "PartitionName=main", f"GraceTime={grace}"])
        nodes = [f"-N{len(target.nodes)}", f"--nodelist={','.join(target.nodes)}", "--exclusive"]
        job = slurm.sbatch("#!/bin/sh\nsleep 1\n", "--partition=urgent", *nodes, "-o/dev/null", "-t1")
        self.at(90, lambda: slurm.run(["scancel", job], check=False))  # its node may have died under it
        time.sleep(1.5)  # the grace is read when the scheduler comes by
        return f"job {job} on {','.join(target.nodes)}"

    def preempt_without_grace(self, target: Target) -> str:
        return self.preempt(target, 0)

    def preempt_with_grace(self, target: Target) -> str:
        return self.preempt(target, 30)

    def timeout(self, target: Target) -> str:
        """The walltime comes near: it is made short."""
        slurm = self.world.slurm
        job = slurm.job(target.element)
        begun = time.mktime(time.strptime(job.fields["StartTime"], "%Y-%m-%dT%H:%M:%S"))
        minutes = int((time.time() - begun + 40) // 60 + 1)
        slurm.run(["scontrol", "update", f"JobId={target.element}", f"TimeLimit={minutes}"])

        def again() -> bool:  # the next attempt has its time anew
            now = slurm.job(target.element)
            if now.restarts > job.restarts or now.over:
                slurm.run(["scontrol", "update", f"JobId={target.element}", "TimeLimit=40"], check=False)
                return True
            return False

        self.when(again)
        return f"limit {minutes} min"

    # --- to one run, without

    def ranks(self, target: Target) -> list[int]:
        """The run's own processes on its nodes."""
        found = []
        for node in target.nodes:
            for pid, command in self.world.slurm.processes(node).items():
                if " -m launch.job " in command and "srun" not in command and "slurmstepd" not in command:
                    found.append(pid)
        return sorted(found)

    def rank_killed(self, target: Target) -> str:
        pids = self.ranks(target)
        if not pids:
            return ""
        pid = self.dice.choice(pids)
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            self.world.slurm.kill(pid, name)
        return f"one of {len(pids)} processes"

    def node_killed(self, target: Target) -> str:
        node = self.dice.choice(target.nodes)
        self.world.slurm.node_fails(node)
        return node

    def slurmd_killed(self, target: Target) -> str:
        """The node's daemon dies; its tasks run on. Where it is late back, SLURM has restarted the run."""
        node, seconds = self.dice.choice(target.nodes), self.dice.choice((2, 45))
        self.world.slurm.kill_slurmd(node)
        self.away.add(node)

        def back() -> None:
            self.world.slurm.start_node(node)
            self.away.discard(node)

        self.at(seconds, back)
        return f"{node} for {seconds} s"

    def node_cut_off(self, target: Target) -> str:
        """The node's cable is pulled; both copies of the run are there for a while."""
        node, seconds = self.dice.choice(target.nodes), 40
        self.world.slurm.cut(node)
        self.away.add(node)

        def back() -> None:
            self.world.slurm.join(node)
            self.away.discard(node)

        self.at(seconds, back)
        return f"{node} for {seconds} s"

    def quota(self, target: Target) -> str:
        """Files of this attempt may not grow beyond 100 kB: its next save cannot be written."""
        pids = self.ranks(target)
        for pid in pids:
            with contextlib.suppress(OSError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
        return f"{len(pids)} processes" if pids else ""

    # --- to all

    def disk_full(self) -> str:
        """The file system of all runs fills up, for a few seconds."""
        seconds = self.dice.choice((2, 8))
        room = os.statvfs(self.world.runs)
        ballast = self.world.runs / ".ballast"
        with open(ballast, "wb") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize)
        with open(ballast, "ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        self.away.add("disk")

        def back() -> None:
            ballast.unlink()
            self.away.discard("disk")

        self.at(seconds, back)
        return f"{seconds} s"

    def controller_restarted(self) -> str:
        self.world.slurm.restart_controller()
        return ""

    def controller_killed(self) -> str:
        """SIGKILL; what it had not yet written to its state is lost."""
        seconds = self.dice.choice((1, 15))
        self.world.slurm.kill_controller()
        self.away.add("slurmctld")

        def back() -> None:
            self.world.slurm.start_controller()
            self.away.discard("slurmctld")

        self.at(seconds, back)
        return f"{seconds} s"

    def wandb_down(self) -> str:
        server, seconds = self.world.wandb, self.dice.choice((5, 30))
        if server is None:
            return ""
        server.down = True

        def back() -> None:
            server.down = False

        self.at(seconds, back)
        return f"{seconds} s"

    def submitter_killed(self) -> str:
        """The command that submits is killed somewhere, and given again."""
        before = set(self.world.slurm.jobs())
        after = self.dice.uniform(0.05, 1.2)
        self.world.submit_and_die(after)
        done = self.world.submit()
        fresh = set(self.world.slurm.jobs()) - before
        fresh = {id for id in fresh if self._trains(self.world.slurm.job(id))}
        words = f"after {after:.2f} s; submitted {len(fresh)} new"
        return words if done.returncode == 0 else f"{words}; it said {done.stderr.strip()[-200:]}"

    @staticmethod
    def _trains(job: Job) -> bool:
        """Not what preempts, nor the job that a run's watch may submit meanwhile, for when none is left."""
        return job.partition == "main" and job.fields.get("Comment") != lifeline.NAME

    def kinds(self) -> Iterator[Kind]:
        """Every kind of fault that this world can have."""
        net = self.world.slurm.options.isolation == "net"
        yield Kind("preempted, grace 0", "signalled", 12, self.preempt_without_grace)
        yield Kind("preempted, grace 30", "signalled", 12, self.preempt_with_grace)
        yield Kind("walltime", "signalled", 8, self.timeout)
        yield Kind("rank SIGKILL", "unsignalled", 12, self.rank_killed)
        yield Kind("node lost", "unsignalled", 6, self.node_killed)
        yield Kind("slurmd SIGKILL", "unsignalled", 4, self.slurmd_killed, lonely=True)
        if net:
            yield Kind("node cut off", "unsignalled", 4, self.node_cut_off, lonely=True)
        yield Kind("file quota", "unsignalled", 6, self.quota)
        yield Kind("disk full", "unsignalled", 5, everyone=self.disk_full, lonely=True)
        yield Kind("slurmctld restart", "none", 6, everyone=self.controller_restarted, lonely=True)
        # What it had not written down is forgotten: a start, and the node ends what it finds there.
        yield Kind("slurmctld SIGKILL", "unsignalled", 5, everyone=self.controller_killed, lonely=True)
        if self.world.wandb:
            yield Kind("W&B down", "none", 7, everyone=self.wandb_down)
        yield Kind("submitter SIGKILL", "none", 8, everyone=self.submitter_killed)


@dataclass(frozen=True)
class Kind:
    """One kind of fault; `one` disturbs one run, `everyone` all. `lonely`: not while something else is away."""

    name: str
    warning: str  # signalled, unsignalled, none: what a run may lose by it
    weight: int
    one: Callable[[Target], str] | None = None
    everyone: Callable[[], str] | None = None
    lonely: bool = False
