"""What was measured of the runs here beside what the cluster gives them: whether a save fits into a preemption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launch.operating.settings import Partition, Site
from launch.record import find_runs
from launch.recovery.deadline import MARGIN, save_seconds


def saves(site: Site, partition: Partition, root: Path | None) -> Iterator[tuple[str, str, str, str]]:
    """Whether what the runs here measured of their saves fits into what a preemption leaves them."""
    took = (
        [(max(save_seconds(folder.journal), default=0.0), folder) for folder in find_runs(root)]
        if root
        else []
    )
    slowest, folder = max(took, key=lambda pair: pair[0], default=(0.0, None))
    if not folder or not slowest:
        return
    left, what = (
        (partition.grace, "GraceTime") if partition.grace else (site.number("KillWait", 30), "KillWait")
    )
    name = str(folder.run.get("name", folder.path.name)).removesuffix("/run")
    yield (
        "slowest save",
        f"{slowest:.0f} s ({name})",
        "ok" if slowest * MARGIN < left else "warn",
        f"it fits into the {left} s of {what} that a preempted run has; before a walltime runs leave early enough"
        if slowest * MARGIN < left
        else f"a preempted run has {left} s ({what}): it may not be saved in time, and then computes up to "
        "train.save_every steps again; lower that, or set train.save_async. Before a walltime it leaves early enough",
    )
