"""A cluster's preset from what the cluster says of itself: experiments/clusters/NAME.yaml, which plans as
it is.
"""

from __future__ import annotations

from launch.operating.settings import Partition, Site
from launch.spec import DAY, TEN_MINUTES, Duration


class NoPartition(LookupError):
    """No partition to make a preset for; the text says which there are."""


def choose(site: Site, name: str = "") -> Partition:
    """The partition named, else the one with the most GPUs that is open; raises NoPartition."""
    usable = [p for p in site.partitions if p.nodes]
    if name:
        named = [partition for partition in usable if partition.name == name]
        if not named:
            names = ", ".join(partition.name for partition in usable)
            raise NoPartition(
                f"{name}: no partition with nodes that you may see; there are {names or 'none'}"
            )
        return named[0]
    if not usable:
        raise NoPartition("sinfo shows no partition with nodes; ask the administrators which is yours")
    return max(usable, key=lambda p: (p.up, p.gpus, p.default, len(p.nodes)))


def write(site: Site, partition: Partition) -> str:
    """The preset's text."""
    shape = partition.best
    assert shape is not None  # choose() takes no partition without nodes
    per_node = shape.gpus or max(1, min(8, shape.cpus // 2))
    walltime = Duration(min(partition.max_time or DAY, DAY))
    grace = Duration(min(TEN_MINUTES, max(60, walltime // 4)))
    kind = f" of {shape.gpu_type}" if shape.gpu_type else ""
    what = f"{shape.gpus} GPUs{kind}" if shape.gpus else "no GPUs"
    name = site.get("ClusterName") or "the cluster"
    lines = [
        f"# Partition {partition.name} of {name}: {shape.count} nodes with {what}, {shape.cpus} CPUs and "
        f"{shape.mem_mb // 1024} GB.",
        f"# Written by `runs.py doctor` from what SLURM {site.get('SLURM_VERSION')} says; correct it where you can.",
    ]
    if not shape.gpus:
        lines += ["device: cpu                   # the partition has no GPUs", "gres: false"]
    lines += [f"gpus_per_node: {per_node}", f"partition: {partition.name}"]
    if len({other.gpu_type for other in partition.nodes if other.gpus}) > 1:
        lines.append(f"gpu_type: {shape.gpu_type}            # the partition has several types")
    lines += _account(site, partition)
    lines.append(f"cpus_per_gpu: {max(1, shape.cpus // per_node)}")
    if memory := int(shape.mem_mb * 0.95 / per_node / 1024):
        lines.append(f"mem_gb_per_gpu: {memory}")
    most = f"the partition allows {Duration(partition.max_time)}" if partition.max_time else "no limit here"
    lines.append(
        f"walltime: {walltime}                 # {most}; a run that needs longer saves and requeues itself"
    )
    lines.append(f"grace: {grace}                    # warning before the walltime: one step and one save")
    lines += [
        "# setup: [module load cuda]   # shell lines before the ranks start",
        "# python: /shared/venv/bin/python    # where the nodes do not see the one that submits",
        '# env: {HF_HUB_OFFLINE: "1"}  # where nodes have no network',
    ]
    return "\n".join(lines) + "\n"


def _account(site: Site, partition: Partition) -> list[str]:
    """The account and QOS lines: set where the partition wants one of the user's, else told as a comment."""
    mine = list(dict.fromkeys(row["Account"] for row in site.associations if row.get("Account")))
    allowed = [account for account in mine if account in partition.accounts]
    lines = []
    if partition.accounts and allowed:
        lines.append(
            f"account: {allowed[0]}              # the partition is for {', '.join(partition.accounts)}"
        )
    elif len(mine) > 1:
        lines.append(f"# account: {mine[0]}            # yours are {', '.join(mine)}; SLURM has a default")
    qos = sorted({name for row in site.associations for name in row.get("QOS", "").split(",") if name})
    if len(qos) > 1:
        lines.append(f"# qos: {qos[0]}                # yours are {', '.join(qos)}; SLURM has a default")
    return lines
