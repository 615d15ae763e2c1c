"""The daemons of a private SLURM: slurmctld, munged and one slurmd a node, all children of this process.

Each node is a mount, UTS and pid namespace (with isolation="net" a network one too), so it has its own
name, sees the same files as everyone, and dies whole. Everything it writes is below one folder in /tmp,
because munged refuses a socket below folders that others may not enter, as pytest's are. A flock'ed slot
gives ports and folder, so clusters run side by side; a folder that a killed run left is removed when its slot
is taken again. Daemons carry a parent-death signal, and a pid namespace ends with its first process, so not
even SIGKILL of the test run leaves a process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tests.slurm import config
from tests.slurm.config import Options, Place

T = TypeVar("T")

BASE = Path("/tmp/private-slurm")
SBIN = "/usr/sbin"  # where the daemons are, not always on a user's PATH
SLOTS = 50
CLIENT_VARIABLES = (
    "SLURM_",
    "SBATCH_",
    "SRUN_",
    "SALLOC_",
    "SQUEUE_",
    "SACCT_",
    "SINFO_",
    "SCANCEL_",
    "SUBMITIT_",
)

# Said at every start, and of no consequence: the plugin for MPI is not installed, the nodes claim too much.
NOISE = re.compile(
    r"pmix|mpi/|MPI:|differs from hardware|FeaturesAvail|CPU frequency|credential|header: 0 of"
)


class SlurmError(RuntimeError):
    """The private SLURM did not do what was asked; the message says what, and what its logs say."""


def missing() -> str:
    """Why no private SLURM can be started here, in words; empty when it can."""
    if shutil.which("slurmctld", path=f"{SBIN}:{os.environ.get('PATH', '')}") is None:
        return "slurmctld is not installed (Debian: slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "a private SLURM needs root, to unshare namespaces for its nodes"
    return ""


class Daemons:
    """The processes of one private SLURM, and what they and clients need to find each other."""

    def __init__(self, **options: Any) -> None:
        self.options = replace(Options(), **options)
        self.nodes = self.options.names
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lock: int | None = None
        # A parent-death signal comes when the *thread* that forked ends, so one that lives long enough forks.
        self._spawner = ThreadPoolExecutor(1, thread_name_prefix="private-slurm")

    def close(self) -> None:
        """End every process and remove the folder; safe to call twice."""
        # They are reaped here and no earlier, so no number can have gone to another process.
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        self._processes.clear()
        self._sweep()
        if self.options.isolation == "net":
            subprocess.run(["ip", "link", "del", self.place.bridge], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self._spawner.shutdown()

    @property
    def folder(self) -> Path:
        return self.place.folder

    def env(self, **more: str) -> dict[str, str]:
        """The environment for a client of this cluster: nothing of an outer SLURM job, and SLURM_CONF."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(CLIENT_VARIABLES)}
        path = f"{clean.get('PATH', '')}:{SBIN}:/usr/bin:/sbin:/bin"
        return {**clean, "PATH": path, "SLURM_CONF": str(self.place.conf), **more}

    def run(
        self,
        command: Sequence[str | Path],
        *,
        check: bool = True,
        timeout: float = 60,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a client; SlurmError with its words when it fails, unless `check` is off."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.env(**(env or {})),
            cwd=cwd or self.folder,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise SlurmError(f"{done.args} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def describe(self) -> str:
        """The queue and the end of what each daemon said, for an error message."""
        parts = []
        with contextlib.suppress(SlurmError, subprocess.TimeoutExpired):
            parts.append(self.run(["squeue", "-t", "all", "-r"], timeout=20).stdout)
            parts.append(self.run(["sinfo", "-N", "-p", "main", "-o", "%N %T %E"], timeout=20).stdout)
        for log in sorted((self.folder / "log").glob("*.out")):
            lines = [line for line in log.read_text(errors="replace").splitlines() if not NOISE.search(line)]
            parts += [f"--- {log.stem}", *lines[-8:]] if lines else []
        return "\n".join(parts)

    def start_controller(self) -> None:
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", str(self.place.conf)])

    def start_node(self, node: str) -> None:
        """Start a node that is off, or the slurmd of one that lost it; nothing to do for one that is well."""
        slurmd = ["slurmd", "-D", "-N", node, "-f", str(self.place.conf)]
        if node in self._processes and self._processes[node].poll() is None:
            if not any(self._is(pid, "slurmd") for pid in self.processes(node)):
                init = self._children(self._processes[node].pid)[0]
                self._end(f"{node}-slurmd")
                enter = ["nsenter", f"--target={init}", "--mount", "--uts", "--pid", "--net", "--"]
                self._spawn(f"{node}-slurmd", [*enter, *slurmd])
            return
        net = self.options.isolation == "net"
        link = (
            "ip link set lo up; until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done; "
            f"ip addr add {self.place.address(self.nodes.index(node) + 1)}/24 dev eth0; ip link set eth0 up; "
        )
        # The first process of a pid namespace must reap, so it is a shell; like a machine it outlives slurmd.
        script = (
            f"hostname {node}; mount --bind {self.folder}/hosts /etc/hosts; {link if net else ''}"
            f"{' '.join(slurmd)} & while :; do sleep 3600 & wait $!; done"
        )
        unshare = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        process = self._spawn(node, [*unshare, *(["--net"] if net else []), "sh", "-c", script])
        if net:
            init = self._until(node, lambda: self._children(process.pid))[0]
            subprocess.run(["ip", "link", "del", self._cable(node)], capture_output=True)  # the last boot's
            self._ip(
                "link", "add", self._cable(node), "type", "veth", "peer", "name", "eth0", "netns", str(init)
            )
            self._ip("link", "set", self._cable(node), "master", self.place.bridge, "up")

    def processes(self, node: str) -> dict[int, str]:
        """The processes of a node, command line by this host's pid, to pick one to kill."""
        found: dict[int, str] = {}
        init = self._children(self._processes[node].pid)
        space = os.readlink(f"/proc/{init[0]}/ns/pid") if init else ""
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == space:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    found[int(entry.name)] = b" ".join(words).decode(errors="replace").strip()
        return found

    def _take_slot(self) -> None:
        BASE.mkdir(mode=0o755, exist_ok=True)
        if BASE.is_symlink() or BASE.stat().st_uid != os.geteuid() or BASE.stat().st_mode & 0o777 != 0o755:
            raise SlurmError(f"{BASE} must be a folder of root's with mode 755: remove what is there")
        for slot in range(SLOTS):
            lock = os.open(BASE / f"{slot}.lock", os.O_CREAT | os.O_RDWR, 0o600)
            place = Place(BASE / str(slot), slot, self.options.isolation)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for port in config.ports(place, self.options):
                    with socket.socket() as probe:
                        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        probe.bind(("0.0.0.0", port))
            except OSError:  # another cluster's, or some program has one of the ports
                os.close(lock)
                continue
            self.place, self._lock = place, lock
            self._sweep()  # what a killed run left: the slot is ours
            shutil.rmtree(place.folder, ignore_errors=True)
            place.folder.mkdir(mode=0o755)
            return
        raise SlurmError(f"all {SLOTS} slots below {BASE} are in use, or their ports (10000 to 14999) are")

    def _sweep(self) -> None:
        """Wait until every process of the slot is gone, and end those that the kernel did not.

        A node whose `unshare` died between its fork and its prctl lives on.
        """
        end = time.monotonic() + 30
        while found := list(tagged(self.folder)):
            for pid in found:
                with contextlib.suppress(OSError):
                    handle = os.pidfd_open(pid)  # from here on the number cannot come to mean another process
                    try:
                        if pid in tagged(self.folder, pid):
                            signal.pidfd_send_signal(handle, signal.SIGKILL)
                    finally:
                        os.close(handle)
            if time.monotonic() > end:
                raise SlurmError(f"the processes {found} of {self.folder} do not end")
            time.sleep(0.02)

    def _make_bridge(self) -> None:
        subprocess.run(
            ["ip", "link", "del", self.place.bridge], capture_output=True
        )  # a killed run's: the slot is ours
        self._ip("link", "add", self.place.bridge, "type", "bridge")
        self._ip("addr", "add", f"{self.place.controller}/24", "dev", self.place.bridge)
        self._ip("link", "set", self.place.bridge, "up")

    def _cable(self, node: str) -> str:
        if self.options.isolation != "net":
            raise SlurmError(f'{node} has no network of its own: start the cluster with isolation="net"')
        return f"{self.place.bridge}{node}"

    def _ip(self, *arguments: str) -> None:
        self.run(["ip", *arguments])

    def _start_munge(self) -> None:
        run, log = self.folder / "run", self.folder / "log"
        files = [
            f"--key-file={run}/munge.key",
            f"--pid-file={run}/munged.pid",
            f"--seed-file={run}/munged.seed",
        ]
        self._spawn(
            "munged", ["munged", "-F", f"--socket={self.place.munge}", f"--log-file={log}/munged.log", *files]
        )
        self._until("munged", lambda: self._answers(str(self.place.munge)))

    def _start_database(self) -> None:
        data, run = self.folder / "mysql", self.folder / "run"
        common = ["--no-defaults", f"--datadir={data}", "--user=root", "--innodb-log-file-size=4M"]
        self.run(
            ["mariadb-install-db", *common, "--skip-test-db", "--auth-root-authentication-method=normal"]
        )
        self._spawn(
            "mariadbd",
            [
                "mariadbd",
                *common,
                f"--socket={self.place.mysql}",
                f"--pid-file={run}/mariadbd.pid",
                "--skip-networking",
                "--skip-grant-tables",
                "--performance-schema=OFF",
                "--innodb-doublewrite=0",
                "--innodb-buffer-pool-size=32M",
                "--innodb-flush-log-at-trx-commit=0",
                "--innodb-lock-wait-timeout=900",  # slurmdbd complains of less
            ],
        )
        self._until("mariadbd", lambda: self._answers(str(self.place.mysql)))
        # slurmdbd.conf has no key for a socket's path; the MySQL library's variable is the only way.
        self._spawn("slurmdbd", ["slurmdbd", "-D"], MYSQL_UNIX_PORT=str(self.place.mysql))
        self._until("slurmdbd", lambda: self._answers(("127.0.0.1", self.place.port + 2)))

    def _until(self, name: str, ready: Callable[[], T]) -> T:
        """Wait until a daemon that was just started answers, and return the answer."""
        end = time.monotonic() + 60
        while not (answer := ready()):
            if (code := self._processes[name].poll()) is not None:
                raise SlurmError(f"{name} ended with {code}\n{self.describe()}")
            if time.monotonic() > end:
                raise SlurmError(f"{name} does not answer after 60 s\n{self.describe()}")
            time.sleep(0.02)
        return answer

    def _spawn(self, name: str, command: Sequence[str], **env: str) -> subprocess.Popen[bytes]:
        def start() -> subprocess.Popen[bytes]:
            with (self.folder / "log" / f"{name}.out").open("ab") as log:
                return subprocess.Popen(
                    ["setpriv", "--pdeathsig=KILL", "--", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for the tests; they end the daemons
                    cwd=self.folder,
                    env=self.env(PRIVATE_SLURM=str(self.folder), **env),
                )

        self._processes[name] = self._spawner.submit(start).result()
        return self._processes[name]

    def _end(self, name: str) -> None:
        if process := self._processes.pop(name, None):
            process.kill()
            process.wait()

    @staticmethod
    def _children(pid: int) -> list[int]:
        try:
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except OSError:
            return []

    @staticmethod
    def _is(pid: int, name: str) -> bool:
        try:
            return Path(f"/proc/{pid}/comm").read_text().strip() == name
        except OSError:
            return False

    @staticmethod
    def _answers(address: str | tuple[str, int]) -> bool:
        with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as probe:
            probe.settimeout(0.5)
            try:
                probe.connect(address)
            except OSError:
                return False
            return True


def tagged(folder: Path, *pids: int) -> Iterator[int]:
    """The living processes, of all or of these, that a cluster in this folder started.

    They are known by a variable that daemons hand on and clients never get; a zombie has none any more.
    """
    mark = f"PRIVATE_SLURM={folder}".encode()
    for name in map(str, pids) if pids else os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                yield int(name)
