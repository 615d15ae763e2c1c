"""A job that writes down what reaches it: signals at its ranks and batch script, and what SLURM then says.

Two nodes, two ranks each. A rank that is told to stop takes `save` seconds for it and leaves with 0.
After srun the batch script asks SLURM about its own job (the verdict), runs `after`, and exits with
srun's code. Only the first attempt lasts; later ones end at once, so that whoever counts the attempts
does not wait.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.slurm import jobs
from tests.slurm.cluster import PrivateSlurm
from tests.slurm.jobs import Job

RANK = """
import os, signal, sys, time
folder, seconds, save = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
events = os.open(folder + "/events", os.O_APPEND | os.O_WRONLY | os.O_CREAT)
told = []

def note(what):
    os.write(events, f"{time.time()} {attempt} rank{os.environ['SLURM_PROCID']} {what}\\n".encode())

def tell(number, frame):
    note(signal.Signals(number).name)
    told.append(number)

for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, tell)
note("start")
end = time.monotonic() + (seconds if attempt == 0 else 0.2)
while time.monotonic() < end and not told:
    time.sleep(0.02)
end = time.monotonic() + (save if told else 0)
while time.monotonic() < end:
    time.sleep(0.02)
note("saved" if told else "finished")
"""

# Nothing here starts a process in a trap: SLURM signals all processes of the batch script, its children too.
BATCH = """#!/bin/bash
cd {folder}
note() {{ echo "$EPOCHREALTIME ${{SLURM_RESTART_COUNT:-0}} batch $*" >> events; }}
me=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}; me=${{me:-$SLURM_JOB_ID}}
first=$([ ${{SLURM_RESTART_COUNT:-0}} = 0 ] && echo yes)
trap 'note SIGTERM' TERM
trap 'note SIGUSR1' USR1
note start
srun {python} rank.py {folder} {seconds} {save}
rc=$?
note srun=$rc
(trap '' TERM USR1; sleep {think}; exec scontrol -o show job $me > verdict.${{SLURM_RESTART_COUNT:-0}})
note verdict=$?
{after}
note end
exit $rc
"""


@dataclass(frozen=True)
class Event:
    """Something that happened to one rank (`rank0`) or to the batch script (`batch`)."""

    at: float  # seconds since the epoch
    attempt: int
    who: str
    what: str


@dataclass
class Probe:
    """One such job, submitted."""

    cluster: PrivateSlurm
    folder: Path
    id: str = field(init=False)

    def submit(
        self,
        *options: str,
        nodes: str = "n1,n2",
        seconds: float = 120,
        save: float = 0.7,
        think: float = 0,
        after: str = "",
    ) -> Probe:
        """Submit it as a one-element array, and wait until its ranks run; `think`: seconds from srun to the verdict."""
        self.folder.mkdir()
        (self.folder / "rank.py").write_text(RANK)
        shown = {"python": sys.executable, "seconds": seconds, "save": save, "think": think, "after": after}
        script = BATCH.format(folder=self.folder, **shown)
        shape = ["-N2", "--ntasks-per-node=2", "--array=0", f"--nodelist={nodes}", "--open-mode=append"]
        self.id = self.cluster.sbatch(script, *shape, f"--output={self.folder}/log", *options) + "_0"
        self.cluster.wait(lambda: len(self.when("rank", "start")) == 4)
        return self

    @property
    def job(self) -> Job:
        return self.cluster.job(self.id)

    def events(self) -> list[Event]:
        file = self.folder / "events"
        parts = [line.split(" ", 3) for line in file.read_text().splitlines()] if file.exists() else []
        return [Event(float(at), int(attempt), who, what) for at, attempt, who, what in parts]

    def when(self, who: str, what: str, attempt: int = 0) -> list[float]:
        """When it happened, once for each time, to the batch script or to any rank."""
        return [
            e.at for e in self.events() if (e.attempt, e.what) == (attempt, what) and e.who.startswith(who)
        ]

    def verdict(self, attempt: int = 0) -> Job | None:
        """What SLURM said to the batch script after srun; None when it did not live to ask."""
        file = self.folder / f"verdict.{attempt}"
        found = jobs.parse(file.read_text()) if file.exists() else []
        return found[0] if found else None

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def finish(self) -> Job:
        """Wait until it completes, requeues and all."""
        return self.cluster.wait_state(self.id, "COMPLETED", timeout=60, nudge=True)

    @property
    def attempts(self) -> list[int]:
        """The attempts whose batch script started, in order."""
        return [e.attempt for e in self.events() if (e.who, e.what) == ("batch", "start")]


def preempt(cluster: PrivateSlurm, nodes: str) -> str:
    """Submit a short urgent job that needs these nodes whole, and return its id."""
    count = nodes.count(",") + 1
    script = "#!/bin/bash\nsleep 0.5\n"
    return cluster.sbatch(
        script, "--partition=urgent", "--exclusive", f"-N{count}", f"--nodelist={nodes}", "-o/dev/null"
    )
