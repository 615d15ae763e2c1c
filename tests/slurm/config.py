"""What a private SLURM is told: its options, and the text of slurm.conf, gres.conf and slurmdbd.conf.

Lines with a reason a reader could not guess carry it. Written for SLURM 22.05 (Debian 12); keys that say
what is the default anyway are left out, because newer versions drop some of them.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Options:
    """How a private SLURM differs from the plain one. Times are seconds."""

    nodes: int = 4
    isolation: Literal["ns", "net"] = (
        "ns"  # net: an address of its own for each node, so that it can be cut off
    )
    accounting: Literal["none", "dbd"] = "none"
    gpus: int = 8  # fake ones, of type h100; 0: the nodes have none
    cpus: int = 64  # a node says it has; nothing is bound to them
    mem_mb: int = 500_000
    grace: int = 20  # of partition `grace`; SLURM looks only every 30 s whether it is over
    user_signal: bool = False  # preemption sends the job's --signal first
    preempt: Literal["REQUEUE", "CANCEL"] = "REQUEUE"
    requeue: bool = True  # JobRequeue: what holds for a job that does not say
    kill_wait: int = 5  # from SIGTERM to SIGKILL; SLURM's default is 30
    slurmd_timeout: int = 300  # 3: a dead node is noticed after ~13 s; 5: ~25 s
    message_timeout: int = 10  # how long a client waits for a slurmctld that is away, about
    cred_expire: int = (
        120  # also how long a requeued job waits; below 5 is ignored, 5 fails jobs under load: use nudge()
    )
    max_array: int = 1001
    min_job_age: int = 3600  # how long `scontrol show job` knows a job that ended
    extra: tuple[str, ...] = ()  # further lines of slurm.conf

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"n{i}" for i in range(1, self.nodes + 1))


@dataclass(frozen=True)
class Place:
    """Where a private SLURM lives: its folder, and the ports and addresses that its slot gives it."""

    folder: Path
    slot: int
    isolation: Literal["ns", "net"]

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def munge(self) -> Path:
        return self.folder / "run" / "munge.sock"

    @property
    def mysql(self) -> Path:
        return self.folder / "run" / "mysql.sock"

    @property
    def port(self) -> int:
        """slurmctld's; +2 is slurmdbd's, +11 and on the nodes'. Below 15000, where ranks look for theirs."""
        return 10_000 + 100 * self.slot

    @property
    def bridge(self) -> str:
        return f"pslurm{self.slot}"

    def address(self, node: int) -> str:
        """A node's; 254 is slurmctld's. 198.18/15 is for tests (RFC 2544), so it hides no real route."""
        return f"198.18.{self.slot}.{node}" if self.isolation == "net" else "127.0.0.1"

    @property
    def controller(self) -> str:
        return self.address(254)


def ports(place: Place, options: Options) -> list[int]:
    return [place.port, place.port + 2, *(place.port + 10 + i for i in range(1, options.nodes + 1))]


def write(place: Place, options: Options) -> None:
    """Write every file the daemons read below the place's folder."""
    folder = place.folder
    for name in ("run", "log", "state", "dev", *(f"spool/{n}" for n in options.names)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    key = folder / "run" / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    (folder / "hosts").write_text(
        Path("/etc/hosts").read_text().rstrip("\n")
        + "".join(f"\n{place.address(i)} {name}" for i, name in enumerate(options.names, 1))
        + "\n"
    )
    # slurmd wants a character device a GPU and takes a link to one; Count= without File= gives no GPU at all.
    for i in range(options.gpus):
        (folder / "dev" / f"nvidia{i}").symlink_to("/dev/null")
    gres = [f"Name=gpu Type=h100 File={folder}/dev/nvidia{i}" for i in range(options.gpus)]
    (folder / "gres.conf").write_text("\n".join(["AutoDetect=off", *gres, ""]) if gres else "")
    place.conf.write_text("\n".join([*_slurm_conf(place, options), ""]))
    if options.accounting == "dbd":
        dbd = folder / "slurmdbd.conf"
        dbd.touch(mode=0o600)  # slurmdbd refuses any other mode, and any other place than beside slurm.conf
        dbd.write_text("\n".join([*_slurmdbd_conf(place), ""]))


def _slurm_conf(place: Place, options: Options) -> list[str]:
    folder = place.folder
    lines = [
        f"ClusterName=private{place.slot}",
        f"SlurmctldHost={socket.gethostname().split('.')[0]}({place.controller})",
        f"SlurmctldPort={place.port}",
        "SlurmUser=root",
        f"AuthInfo=socket={place.munge},cred_expire={options.cred_expire}",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/run/slurmctld.pid",
        f"SlurmdPidFile={folder}/run/slurmd.%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/slurmd.%n.log",
        "MailProg=/bin/true",
        "ProctrackType=proctrack/linuxproc",  # the default wants cgroups
        "TaskPlugin=task/none",
        "PropagateResourceLimits=NONE",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "DefMemPerCPU=100",  # without it a job that names no memory takes the node's: one job a node
        "SlurmdParameters=config_overrides",  # nodes may claim CPUs and memory that the machine has not
        "EnforcePartLimits=ALL",  # without it a job of too many nodes pends for ever instead of being refused
        "ReturnToService=2",
        "SchedulerType=sched/backfill",
        "PriorityType=priority/basic",
        # sched_interval: else a requeued job waits up to a minute more, for nothing wakes the scheduler.
        "SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1",
        f"SlurmdTimeout={options.slurmd_timeout}",
        f"KillWait={options.kill_wait}",
        f"MinJobAge={options.min_job_age}",
        f"MaxArraySize={options.max_array}",
        "MaxJobCount=20000",
        f"MessageTimeout={options.message_timeout}",
        "UnkillableStepTimeout=600",  # else one lost message under load drains the node
        f"JobRequeue={int(options.requeue)}",
        "PreemptType=preempt/partition_prio",
        f"PreemptMode={options.preempt}",
    ]
    if options.user_signal:
        lines.append("SlurmctldParameters=preempt_send_user_signal")
    if options.accounting == "dbd":
        lines += [
            "AccountingStorageType=accounting_storage/slurmdbd",
            "AccountingStorageHost=127.0.0.1",
            f"AccountingStoragePort={place.port + 2}",
            f"AccountingStoragePass={place.munge}",  # this connection does not look at AuthInfo
            "AccountingStorageTRES=gres/gpu",
        ]
    machine = f"CPUs={options.cpus} Sockets=1 CoresPerSocket={options.cpus} RealMemory={options.mem_mb}"
    if options.gpus:
        lines.append("GresTypes=gpu")
        machine += f" Gres=gpu:h100:{options.gpus}"
    for i, name in enumerate(options.names, 1):
        lines.append(f"NodeName={name} NodeAddr={place.address(i)} Port={place.port + 10 + i} {machine}")
    every = "Nodes=ALL State=UP MaxTime=INFINITE DefaultTime=60"
    lines += [
        f"PartitionName=main {every} Default=YES PriorityTier=1 GraceTime=0",
        f"PartitionName=grace {every} PriorityTier=1 GraceTime={options.grace}",
        f"PartitionName=urgent {every} PriorityTier=10 PreemptMode=OFF",
        *options.extra,
    ]
    return lines


def _slurmdbd_conf(place: Place) -> list[str]:
    return [
        f"AuthInfo=socket={place.munge}",
        "DbdHost=localhost",
        "DbdAddr=127.0.0.1",
        f"DbdPort={place.port + 2}",
        "SlurmUser=root",
        f"LogFile={place.folder}/log/slurmdbd.log",
        f"PidFile={place.folder}/run/slurmdbd.pid",
        "StorageType=accounting_storage/mysql",
        "StorageHost=localhost",
        "StorageUser=root",
        "StorageLoc=slurm",
    ]
