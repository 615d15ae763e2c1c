"""What a cluster says of itself: scontrol, sinfo and sacctmgr, read into values; SLURM 22.05 and newer.

Newer versions move and rename settings. What is asked for here is looked up under every name it has had.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from launch import cluster

UNSET = ("", "(null)", "N/A", "none", "NONE")


@dataclass(frozen=True)
class Nodes:
    """The nodes of one shape in a partition."""

    count: int
    idle: int
    gpus: int  # a node
    gpu_type: str
    cpus: int
    mem_mb: int


@dataclass(frozen=True)
class Partition:
    """One partition; times in seconds, 0 for no limit."""

    name: str
    default: bool
    up: bool
    grace: int
    preempt_mode: str
    max_time: int
    accounts: tuple[str, ...]  # that may use it; empty: all
    nodes: tuple[Nodes, ...] = ()

    @property
    def best(self) -> Nodes | None:
        """The shape with the most GPUs over all its nodes, else the one with most nodes."""
        return max(self.nodes, key=lambda shape: (shape.gpus * shape.count, shape.count), default=None)

    @property
    def gpus(self) -> int:
        return sum(shape.gpus * shape.count for shape in self.nodes)


@dataclass(frozen=True)
class Site:
    """A cluster as it describes itself."""

    config: Mapping[str, str]
    partitions: tuple[Partition, ...]
    qos: tuple[Mapping[str, str], ...] = ()
    associations: tuple[Mapping[str, str], ...] = ()  # this user's
    user: str = ""
    accounting: str = field(default="")  # why there is none; empty where there is

    def get(self, key: str) -> str:
        """A setting, empty where it is not set or this version has none of that name."""
        value = self.config.get(key, "")
        return "" if value in UNSET else value

    def number(self, key: str, otherwise: int = 0) -> int:
        """A setting's leading number."""
        match = re.match(r"\d+", self.get(key))
        return int(match[0]) if match else otherwise

    def parameters(self) -> dict[str, str]:
        """The words of all ...Parameters lists, and AuthInfo's, with their values; newer versions move them."""
        found: dict[str, str] = {}
        for key, value in self.config.items():
            if (key.endswith("Parameters") or key == "AuthInfo") and value not in UNSET:
                for word in value.split(","):
                    name, _, text = word.strip().partition("=")
                    found[name.lower()] = text
        return found

    @property
    def version(self) -> tuple[int, int]:
        match = re.match(r"(\d+)\.(\d+)", self.get("SLURM_VERSION"))
        return (int(match[1]), int(match[2])) if match else (0, 0)


QOS = (
    "Name",
    "Preempt",
    "PreemptMode",
    "GraceTime",
    "MaxWall",
    "MaxJobsPU",
    "MaxSubmitJobsPU",
    "MaxTRESPU",
    "GrpTRES",
)
ASSOCIATION = (
    "Cluster",
    "Account",
    "Partition",
    "QOS",
    "DefaultQOS",
    "MaxJobs",
    "MaxSubmit",
    "GrpTRES",
    "MaxWall",
)


def read() -> Site:
    """Ask the cluster; raises SlurmError where it does not answer."""
    config = parse_config(cluster.call("scontrol", "show", "config"))
    shapes = parse_nodes(cluster.call("sinfo", "-h", "-N", "-o", "%R|%N|%T|%c|%m|%G"))
    partitions = parse_partitions(cluster.call("scontrol", "-o", "show", "partition"), shapes)
    user = getpass.getuser()
    if config.get("AccountingStorageType", "") in (*UNSET, "accounting_storage/none"):
        return Site(config, partitions, user=user, accounting="SLURM keeps none")
    try:
        qos = cluster.call("sacctmgr", "-n", "-P", "show", "qos", f"format={','.join(QOS)}")
        rows = cluster.call(
            "sacctmgr", "-n", "-P", "show", "assoc", f"user={user}", f"format={','.join(ASSOCIATION)}"
        )
    except cluster.SlurmError as error:
        return Site(config, partitions, user=user, accounting=f"sacctmgr: {str(error).splitlines()[0]}")
    mine = [row for row in parse_rows(rows, ASSOCIATION) if row["Cluster"] in ("", config.get("ClusterName"))]
    return Site(config, partitions, parse_rows(qos, QOS), tuple(mine), user)


def parse_config(text: str) -> dict[str, str]:
    """`scontrol show config` as a mapping; units and what follows the table are left as they are."""
    found = {}
    for line in text.splitlines():
        key, separator, value = line.partition("=")
        if separator and (name := key.strip()) and " " not in name:
            found[name] = value.strip()
    return found


def parse_rows(text: str, names: tuple[str, ...]) -> tuple[Mapping[str, str], ...]:
    """sacctmgr's -P rows by the names they were asked for."""
    return tuple(dict(zip(names, line.split("|"), strict=False)) for line in text.splitlines() if "|" in line)


def parse_nodes(text: str) -> dict[str, tuple[Nodes, ...]]:
    """sinfo's lines, a node and partition each, as shapes by partition."""
    found: dict[str, dict[tuple[int, str, int, int], list[int]]] = {}
    for line in text.splitlines():
        partition, _, state, cpus, memory, gres = (*line.split("|", 5), "", "", "", "", "")[:6]
        gpus, kind = parse_gres(gres)
        shape = (gpus, kind, _int(cpus), _int(memory))
        counts = found.setdefault(partition, {}).setdefault(shape, [0, 0])
        counts[0] += 1
        counts[1] += state.rstrip("*~#!%$@^-+") == "idle"
    return {
        partition: tuple(
            Nodes(count, idle, gpus, kind, cpus, memory)
            for (gpus, kind, cpus, memory), (count, idle) in shapes.items()
        )
        for partition, shapes in found.items()
    }


def parse_gres(text: str) -> tuple[int, str]:
    """(GPUs, type) of `gpu:h100:8(S:0-1),gpu:1,shard:16`: all GPUs, and the type of most of them."""
    types: dict[str, int] = {}
    for part in re.sub(r"\([^)]*\)", "", text).split(","):
        words = part.strip().split(":")
        if words[0] == "gpu" and words[-1].isdigit():
            kind = words[1] if len(words) > 2 else ""
            types[kind] = types.get(kind, 0) + int(words[-1])
    return sum(types.values()), max(types, key=lambda kind: types[kind], default="")


def parse_partitions(text: str, shapes: Mapping[str, tuple[Nodes, ...]]) -> tuple[Partition, ...]:
    """`scontrol -o show partition`."""
    found = []
    for line in text.splitlines():
        facts = cluster.fields(line)
        if "PartitionName" not in facts:
            continue
        accounts = facts.get("AllowAccounts", "ALL")
        found.append(
            Partition(
                name=facts["PartitionName"],
                default=facts.get("Default") == "YES",
                up=facts.get("State", "UP") == "UP" and facts.get("RootOnly", "NO") == "NO",
                grace=_int(facts.get("GraceTime", "0")),
                preempt_mode=facts.get("PreemptMode", ""),
                max_time=seconds(facts.get("MaxTime", "")),
                accounts=() if accounts == "ALL" else tuple(accounts.split(",")),
                nodes=shapes.get(facts["PartitionName"], ()),
            )
        )
    return tuple(found)


def seconds(text: str) -> int:
    """SLURM's [D-]HH:MM:SS, MM:SS or minutes in seconds; 0 for UNLIMITED and anything else."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match:
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + rest
    return int(text) * 60 if text.strip().isdigit() else 0


def _int(text: str) -> int:
    match = re.match(r"\d+", text.strip())
    return int(match[0]) if match else 0
