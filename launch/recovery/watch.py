"""The watch over an attempt: finds ranks that never start or stand still, has all stacks written, and ends the attempt.

`python -m launch.recovery.watch BATCH &`, started by the batch script before srun: outside the ranks, for a rank
that stands still cannot say so, and those that wait for it know nothing. What is too long is learned from the run: ten
times its slowest step of late, and never under `cluster.hang_after`. Time in which the watch itself did not run (a
suspended job, a file system that hung) does not count.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launch import cluster
from launch.batches import entry_of
from launch.files import write_json
from launch.operating.status import children
from launch.record import RunFolder, of_element
from launch.recovery import lifeline, limbo, successor
from launch.recovery.pulse import Beat, beats
from launch.spec import Duration

FACTOR = 10  # times the slowest step of late
DUMP = signal.SIGQUIT  # on which ranks write their stacks (launch.job); no library we use takes it
DUMP_SECONDS = 3.0  # for that
STARTED = 600.0  # seconds in which srun must have started its ranks: they write before they load anything


@dataclass(frozen=True)
class Limits:
    """How long a rank may be silent, in seconds; 0: for ever."""

    step: float  # at least, in a step
    load: float  # until its first step, in a save and in an evaluation

    @classmethod
    def of(cls, spec: Mapping[str, object]) -> Limits:
        """From a run's spec.json."""
        from launch.spec import ClusterSpec

        given = spec.get("cluster")
        texts = given if isinstance(given, dict) else {}
        found = [
            Duration.parse(str(texts[key])) if key in texts else getattr(ClusterSpec, key)
            for key in ("hang_after", "load_within")
        ]
        return cls(*map(float, found))

    @property
    def every(self) -> float:
        """Seconds between two looks, and between a rank's words."""
        return min(10.0, max(0.2, min(self.step or 600.0, self.load or 600.0) / 8))


@dataclass(frozen=True)
class Silence:
    """An attempt that does not get on."""

    kind: str  # hang, or infrastructure where ranks never started
    message: str
    ranks: tuple[int, ...] = ()  # that the others wait for; empty where none stands out
    nodes: tuple[str, ...] = ()


@dataclass
class Watch:
    """What was seen of the ranks so far; `look` says when it is enough."""

    limits: Limits
    world: int
    clock: float = 0.0  # seconds that this watch has run
    moved: dict[int, tuple[int, float]] = field(default_factory=dict)  # rank: (count of phases, since when)
    alive: dict[int, tuple[int, float]] = field(default_factory=dict)  # rank: (count of writes, since when)

    def look(self, seen: Mapping[int, Beat], elapsed: float) -> Silence | None:
        """Take in what the ranks wrote, `elapsed` s after the last look; what is wrong, if anything is."""
        self.clock += min(elapsed, 2 * self.limits.every)
        for rank, beat in seen.items():
            for known, value in ((self.moved, beat.count), (self.alive, beat.alive)):
                if rank not in known or known[rank][0] != value:
                    known[rank] = (value, self.clock)
        missing = [rank for rank in range(self.world) if rank not in seen]
        if missing:
            if self.limits.load and self.clock > min(self.limits.load, STARTED):
                which = "no rank" if len(missing) == self.world else f"{_ranks(missing)} not"
                return Silence("infrastructure", f"{which} started within {self.clock:.0f} s of srun")
            return None
        slowest = max(beat.slowest for beat in seen.values())
        stepping = (
            max(self.limits.step, FACTOR * slowest) if slowest else max(self.limits.step, self.limits.load)
        )
        for rank, beat in seen.items():
            inside = beat.phase in ("data", "step", "agree")
            limit = stepping if inside else max(self.limits.load, self.limits.step)
            off = not (self.limits.step if inside else self.limits.load)
            if not off and self.clock - self.moved[rank][1] > limit:
                return self._hang(seen, limit)
        return None

    def _hang(self, seen: Mapping[int, Beat], limit: float) -> Silence:
        newest = max(since for _, since in self.alive.values())
        stale = max(4 * self.limits.every, 2.0)
        frozen = [rank for rank in seen if newest - self.alive[rank][1] > stale]
        behind = min(seen[rank].place for rank in (frozen or seen))
        late = [rank for rank in (frozen or seen) if seen[rank].place == behind]
        quiet = self.clock - min(self.moved[rank][1] for rank in late)
        step, phase = seen[late[0]].step, seen[late[0]].phase
        doing = {"data": "waiting for its data", "step": "computing", "agree": "after its computing"}
        last = "last heard of " if frozen else ""  # some seconds before it stood still, perhaps
        what = f"silent for {quiet:.0f} s, {last}in step {step} ({doing.get(phase, phase)})"
        if len(late) == len(seen) > 1:
            return Silence("hang", f"all {len(seen)} ranks are {what}; none stands out")
        nodes = tuple(dict.fromkeys(seen[rank].node for rank in late))
        still = ": its process stands still" if frozen else ""
        waiting = f"; the other {len(seen) - len(late)} wait for it" if len(seen) > len(late) else ""
        verb = "was" if len(late) == 1 else "were"
        words = f"{_ranks(late)} on {', '.join(nodes)} {verb} {what}{still}{waiting} (limit {limit:.0f} s)"
        return Silence("hang", words, tuple(late), nodes)


def _ranks(ranks: list[int]) -> str:
    some = ", ".join(map(str, ranks[:8])) + ", ..." * (len(ranks) > 8)
    return f"rank{'s' * (len(ranks) > 1)} {some}"


def note(folder: RunFolder, attempt: str, silence: Silence) -> None:
    """Leave it for the verdict; a full disk, on which ranks stand still as well, keeps none from being ended."""
    facts = {"kind": silence.kind, "message": silence.message, "ranks": silence.ranks, "nodes": silence.nodes}
    with contextlib.suppress(OSError):
        write_json(folder.logs(attempt) / "hang.json", {**facts, "time": time.time()})


def main(arguments: list[str]) -> int:
    """Watch this job's attempt until it hangs, or until the batch script ends this process."""
    from launch.recovery.late import late

    batch = Path(arguments[0])
    try:
        folder = of_element(batch, os.environ["SLURM_ARRAY_TASK_ID"])
    except LookupError:
        return 1  # the ranks will say so
    with contextlib.suppress(OSError):
        folder.make(entry_of(str(batch), os.environ["SLURM_ARRAY_TASK_ID"]))  # before they look for it
    element = cluster.element_id()
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    attempt = f"{element}-{restarts}"
    root = batch.parent.parent
    spec = folder.spec
    with contextlib.suppress(OSError):  # a full disk: it watches all the same
        if (spec.get("cluster") or {}).get("spare"):
            successor.prepare(batch, folder, element)
        late(root, folder, element, restarts)
    watch = Watch(Limits.of(spec), int(os.environ.get("SLURM_NTASKS", "1")))
    script = os.getppid()
    fresh = not restarts
    at = time.monotonic()
    while True:
        time.sleep(watch.limits.every)
        if os.getppid() != script:
            return 0
        seen = beats(folder.logs(attempt))
        before, at = at, time.monotonic()
        silence = watch.look(seen, at - before)
        if silence and not any(folder.logs(attempt).glob("failure_*.json")):
            break
        limbo.look(root)
        if watch.clock > lifeline.wait_of(spec) / lifeline.SHARE and (
            refused := lifeline.put_off(batch, spec, time.time())
        ):
            with contextlib.suppress(OSError):
                folder.note("refused", attempt=attempt, what="a lifeline", reason=refused)
        if not fresh and len(seen) == watch.world:
            fresh = True
            if words := limbo.leave(folder, element, attempt):
                with contextlib.suppress(OSError):
                    os.write(1, f"watch: {words}\n".encode())
    with contextlib.suppress(OSError):
        os.write(1, f"watch: {silence.message}; ending the attempt\n".encode())
    note(folder, attempt, silence)
    if seen:
        _signal(element, DUMP)
        time.sleep(DUMP_SECONDS)
    _end(element, script)
    return 0


def _signal(element: str, number: signal.Signals, steps: tuple[str, ...] = ()) -> None:
    with contextlib.suppress(cluster.SlurmError):
        cluster.call(
            "scancel", f"--signal={number.name.removeprefix('SIG')}", *(steps or (element,)), timeout=30
        )


def _end(element: str, script: int) -> None:
    """End the ranks, whatever they are stuck in, then srun; the job runs on, and its verdict follows."""
    steps: tuple[str, ...] = ()
    with contextlib.suppress(cluster.SlurmError):
        found = cluster.call("squeue", "-h", "-s", "-j", element, "-o", "%i", timeout=30).split()
        steps = tuple(step for step in found if step.rpartition(".")[2].isdigit())
    if steps:  # the job itself, signalled with KILL, would be cancelled
        _signal(element, signal.SIGKILL, steps)
    for wait, number in ((10.0 if steps else 0.0, signal.SIGTERM), (5.0, signal.SIGKILL)):
        end = time.monotonic() + wait
        while time.monotonic() < end and _sruns(script):
            time.sleep(0.2)
        for pid in _sruns(script):
            with contextlib.suppress(OSError):
                os.kill(pid, number)


def _sruns(script: int) -> list[int]:
    """The sruns of the batch script that are left."""
    found = []
    for pid in children(script):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == "srun":
                found.append(pid)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
