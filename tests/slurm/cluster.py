"""A private, real SLURM for tests: what a test asks of it and does to it. The daemons are daemons.py's.

The attempt after a requeue starts only two minutes later, when SLURM is let be: `wait(..., nudge=True)`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from tests.slurm import config, jobs
from tests.slurm.daemons import Daemons, SlurmError, missing, tagged
from tests.slurm.jobs import Job

T = TypeVar("T")

__all__ = ["PrivateSlurm", "SlurmError", "missing", "tagged"]


class PrivateSlurm(Daemons):
    """A SLURM cluster that lives as long as its `with` block; takes the fields of `Options` by keyword.

    Raises SlurmError when it cannot start; nothing of it stays then.
    """

    def __enter__(self) -> PrivateSlurm:
        self._take_slot()
        try:
            config.write(self.place, self.options)
            if self.options.isolation == "net":
                self._make_bridge()
            self._start_munge()
            if self.options.accounting == "dbd":
                self._start_database()
            self.start_controller()
            for node in self.nodes:
                self.start_node(node)
            self.wait_idle()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def sbatch(self, script: str, *options: str, cwd: Path | None = None) -> str:
        """Submit the text of a batch script; its job id, an array's without an index."""
        return (
            self.run(["sbatch", "--parsable", *options], input=script, cwd=cwd).stdout.strip().split(";")[0]
        )

    def jobs(self) -> dict[str, Job]:
        """All jobs slurmctld knows, by id (`7`, `8_0`), array elements one by one."""
        return {job.id: job for job in jobs.parse(self.run(["scontrol", "-o", "show", "job"]).stdout)}

    def job(self, id: str) -> Job:
        found = self.jobs()
        if id not in found:
            raise SlurmError(f"no job {id}; slurmctld knows {', '.join(found) or 'none'}")
        return found[id]

    def states(self) -> dict[str, str]:
        """Each node's state, as sinfo says it."""
        lines = self.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%N %T"]).stdout.splitlines()
        return dict(line.split(maxsplit=1) for line in lines)

    def wait(
        self, predicate: Callable[[], T], timeout: float = 30, *, nudge: bool = False, every: float = 0.0
    ) -> T:
        """Ask until the answer is true and return it; after `timeout` s a SlurmError shows queue and logs.

        With `nudge`, requeued jobs do not wait out their two minutes meanwhile. Without `every` it asks less and less
        often, from 20 to 3 times a second: each answer takes SLURM's commands some of the ranks' time.
        """
        began = time.monotonic()
        end = began + timeout
        while True:
            if answer := predicate():
                return answer
            if time.monotonic() > end:
                raise SlurmError(f"not so after {timeout} s\n{self.describe()}")
            if nudge:
                self.nudge()
            time.sleep(every or min(max(0.05, (time.monotonic() - began) / 20), 0.3))

    def wait_state(self, id: str, *states: str, timeout: float = 30, nudge: bool = False) -> Job:
        """Wait until a job is in one of the states and return it."""
        self.wait(lambda: self.job(id).state in states, timeout, nudge=nudge)
        return self.job(id)

    def wait_idle(self, timeout: float = 30) -> None:
        """Wait until every node is up and free."""

        def idle() -> bool:
            for name, process in self._processes.items():
                if (code := process.poll()) is not None:
                    raise SlurmError(f"{name} ended with {code}\n{self.describe()}")
            if not self._answers((self.place.controller, self.place.port)):
                return False  # a client would wait for message_timeout
            answer = self.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], check=False, timeout=120)
            return answer.stdout.split() == ["idle"] * len(self.nodes)

        self.wait(idle, timeout)

    def nudge(self, *ids: str) -> None:
        """Let requeued jobs, all or those named, start in 2 s; SLURM has them wait for cred_expire, 2 min.

        Sooner than in 2 s a node may still hold the old credential for revoked, which ends the job. A job
        that is due within 3 s is left alone, or each call would put it off again.
        """
        soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 3))
        for job in self.jobs().values():
            waits = (
                job.state in ("PENDING", "REQUEUE_HOLD") and job.reason == "BeginTime" and job.restarts > 0
            )
            if waits and job.fields["EligibleTime"] > soon and (job.id in ids or not ids):
                self.run(["scontrol", "update", f"jobid={job.id}", "StartTime=now+2"], check=False)

    def clear(self) -> None:
        """End all jobs and bring all nodes back, for the next test."""
        for node in self.nodes:
            self.start_node(node)

        def over() -> bool:  # asked again and again, for a job may requeue itself while it is being cancelled
            self.run(["scancel", "--user=root"], check=False)
            return all(job.over for job in self.jobs().values())

        self.wait(over, self.options.kill_wait + 20, every=0.2)
        self.wait_idle(60)

    # ------------------------------------------------------------------------------------ faults

    def node_fails(self, node: str) -> None:
        """Power lost for a moment, and noticed at once: SLURM requeues the node's jobs, the node comes back.

        To set a node down whose slurmd lives would be quicker, but then its late word that the old attempt is
        over may reach SLURM after nudge() has started the next one, whose srun then waits for ever (1 in 36).
        """
        self.kill_node(node)
        self.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=test"])
        self.start_node(node)

    def kill_node(self, node: str) -> None:
        """Power off: every process of the node is gone; SLURM notices after slurmd_timeout and more."""
        self._end(node)
        self._end(f"{node}-slurmd")

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL slurmd alone; the node's tasks run on."""
        for pid in self.processes(node):
            self.kill(pid, "slurmd")

    def kill(self, pid: int, name: str, number: int = signal.SIGKILL) -> bool:
        """Signal one process, this host's number, if it still is what it was taken for; whether it was."""
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(pid)  # from here on the number cannot come to mean another process
            try:
                if self._is(pid, name):
                    signal.pidfd_send_signal(handle, number)
                    return True
            finally:
                os.close(handle)
        return False

    def cut(self, node: str) -> None:
        """Pull the node's network cable (isolation="net"); its tasks run on."""
        self._ip("link", "set", self._cable(node), "down")

    def join(self, node: str) -> None:
        """Put the cable back; the node returns ~20 s later."""
        self._ip("link", "set", self._cable(node), "up")

    def kill_controller(self) -> None:
        """SIGKILL slurmctld; jobs run on, clients hang and fail after message_timeout and more.

        It saves what it knows every 5 s: what came after that is lost, a job that started waits again.
        """
        self._end("slurmctld")

    def restart_controller(self) -> None:
        """Stop slurmctld as an administrator does and start it again; returns when it answers."""
        process = self._processes["slurmctld"]
        process.terminate()
        process.wait(30)
        self.start_controller()
        self.wait(lambda: self.run(["scontrol", "ping"], check=False).stdout.find("UP") >= 0)
