"""doctor: what a cluster's settings mean for these runs, a sentence a setting, and a preset that plans as
it is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

from launch.cluster import SlurmError
from launch.exits import NO_SLURM, OK
from launch.files import write_text
from launch.operating import preset, settings
from launch.operating.consequences import Fact, facts
from launch.operating.ledger import brief
from launch.operating.logs import complain
from launch.operating.settings import Partition, Site
from launch.recovery.margins import saves
from launch.snapshot import REPOSITORY

CLUSTERS = REPOSITORY / "experiments" / "clusters"


def main(options: argparse.Namespace) -> int:
    """Read, print, and write the preset when asked."""
    try:
        site = settings.read()
    except SlurmError as error:
        print(f"error: SLURM: {error}\n  hint: ask on a login node of the cluster", file=sys.stderr)
        return NO_SLURM
    try:
        partition = preset.choose(site, options.partition)
    except preset.NoPartition as error:
        return complain(str(error))
    measured = (Fact(*row) for row in saves(site, partition, getattr(options, "runs", None)))
    found = [*facts(site, partition), *measured]
    if options.json:
        print(json.dumps({"partition": partition.name, "facts": [asdict(fact) for fact in found]}, indent=1))
    else:
        print(render(site, partition, found))
    return _write(site, partition, options) if options.write else OK


def render(site: Site, partition: Partition, found: list[Fact]) -> str:
    """The report: partitions, then facts with their consequences."""
    lines = [f"{site.get('ClusterName')}: SLURM {site.get('SLURM_VERSION')}", "", "partitions:"]
    for one in site.partitions:
        mark = "*" if one.name == partition.name else " "
        most = brief(one.max_time) if one.max_time else "no limit"
        shapes = "; ".join(
            f"{s.count} nodes ({s.idle} idle) of {s.gpus} {s.gpu_type or 'GPUs'}, {s.cpus} CPUs, {s.mem_mb // 1024} GB"
            for s in one.nodes
        )
        lines.append(
            f" {mark} {one.name}: {shapes or 'no nodes'}; walltime {most}; {'up' if one.up else 'closed'}"
        )
    lines += ["", f"what it means for runs on {partition.name}:"]
    width = max(len(fact.name) for fact in found) + 2
    for fact in found:
        head = f" {'!' if fact.level == 'warn' else ' '} {fact.name:{width}}{fact.value}"
        lines.append(head)
        lines += textwrap.wrap(fact.means, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _write(site: Site, partition: Partition, options: argparse.Namespace) -> int:
    """Write the preset; one that is there is kept unless --force says otherwise."""
    name = options.write.removesuffix(".yaml")
    path = Path(f"{name}.yaml") if "/" in name else CLUSTERS / f"{name}.yaml"
    if not re.fullmatch(r"\w[\w.-]*", path.stem):
        return complain(f"{options.write!r} cannot name a preset: use letters, digits and _ . -")
    if path.exists() and not options.force:
        return complain(f"{path} is there already: --force replaces it")
    try:
        write_text(path, preset.write(site, partition))
    except OSError as error:
        return complain(f"{path} cannot be written: {error.strerror}")
    print(f"\nwrote {path}: submit with cluster={path.stem}", file=sys.stderr if options.json else sys.stdout)
    return OK
