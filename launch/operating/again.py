"""resubmit: runs that ended without finishing, as new arrays over the same run folders.

It goes through the same transaction as submit.py. What is submitted is what the run folders say, not what a
YAML has become since; the code is this checkout's, because that is where a bug was fixed, or with
--same-code the run's own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch import cluster, snapshot
from launch.exits import FAILED, NO_SLURM, OK, USAGE
from launch.operating.act import agreed
from launch.operating.logs import complain
from launch.operating.show import Line, look
from launch.operating.status import BROKEN
from launch.record import RunFolder, find_runs, make_all

if TYPE_CHECKING:
    from launch.origin import Origin
    from launch.plan import Plan, Run

BY_SLURM = "cancelled by SLURM because"


class NotThis(Exception):
    """A run cannot be submitted from its folder; the text says why and what to do."""


def resubmit(chosen: Sequence[RunFolder], options: argparse.Namespace) -> int:
    """Submit them; the runs that SLURM cancelled because of them go with them."""
    seen = look(find_runs(options.runs), options.runs)
    if seen.why:
        print(f"error: SLURM: {seen.why}; nothing was submitted", file=sys.stderr)
        return NO_SLURM
    paths = {folder.path for folder in chosen}
    lines = [line for line in seen.lines if line.folder.path in paths and _wanted(line, options.only)]
    if not lines:
        print("nothing to resubmit: none of these runs has failed or stopped", file=sys.stderr)
        return OK
    lines = [*lines, *_children(lines, seen.lines)]
    by_path = {str(line.folder.path): line for line in seen.lines}
    for line in lines:
        above = by_path.get(line.facts.parent)
        if above and above.state.name in BROKEN and above not in lines:
            return complain(
                f"{line.short} starts from {above.short}, which is {above.state.name}: "
                f"runs.py resubmit {above.short} {line.short}"
            )
    if not (yes := agreed(lines, "resubmitted", options)):
        return USAGE if yes is None else OK
    return _submit(lines, options)


def _wanted(line: Line, only: str) -> bool:
    if only:
        return line.state.name == only
    return line.state.name in ("failed", "stopped", "blocked") or line.state.reason.startswith(BY_SLURM)


def _children(lines: Sequence[Line], every: Sequence[Line]) -> list[Line]:
    """The runs below, at any depth, that were submitted and could not start because of these."""
    found: list[Line] = []
    parents = {str(line.folder.path) for line in lines}
    while True:
        more = [
            line
            for line in every
            if line.facts.parent in parents
            and str(line.folder.path) not in parents
            and (line.state.name == "blocked" or line.state.reason.startswith(BY_SLURM))
        ]
        if not more:
            return found
        found += more
        parents |= {str(line.folder.path) for line in more}


def _submit(lines: Sequence[Line], options: argparse.Namespace) -> int:
    from launch import submission  # submitit's half second, where something is submitted

    sent = []
    try:
        plan = recorded([line.folder for line in lines], options.runs)
        code = _code([line.folder for line in lines], options)
        for batch, job in submission.submit(plan, code):
            sent.append(
                {"job": job, "runs": [run.name for run in batch.runs], "dependency": batch.dependency}
            )
            if not options.json:
                after = f" after {batch.dependency}" if batch.dependency else ""
                what = f"{batch.stage.experiment.name}: job {job}, {len(batch.runs)} run(s)"
                print(f"submitted {what}{after}", flush=True)
    except NotThis as error:
        return complain(str(error))
    except cluster.SlurmError as error:
        print(f"error: SLURM: {error}", file=sys.stderr)
        print("  what was submitted before stays; repeat the command to go on from there", file=sys.stderr)
        return NO_SLURM
    except submission.NoLockError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"error: {error.filename or 'a file'} cannot be written: {error.strerror}", file=sys.stderr)
        return FAILED
    if options.json:
        print(json.dumps({"resubmit": sent}))
    return OK


def _code(folders: Sequence[RunFolder], options: argparse.Namespace) -> Path:
    """The snapshot that the new attempts run."""
    root: Path = options.runs
    before = {str(folder.run.get("code", "")) for folder in folders}
    if not options.same_code:
        code = snapshot.take(root)
        if changed := before - {code.name}:
            print(f"code: {code.name} instead of {', '.join(sorted(changed))}", file=sys.stderr)
        return code
    if len(before) > 1:
        names = ", ".join(sorted(before))
        raise NotThis(f"these runs were submitted with different code ({names}); resubmit them apart")
    code = root / "code" / before.pop()
    if not code.is_dir():
        raise NotThis(f"{code} is gone: without --same-code the runs go on with this checkout's code")
    return code


def recorded(folders: Sequence[RunFolder], root: Path) -> Plan:
    """The plan that run folders alone hold: their runs, those above first; raises NotThis."""
    from launch.identity import plain
    from launch.plan import Experiment, Plan, StagePlan
    from launch.reader import Layers

    runs: dict[Path, Run] = {}
    make_all(folders)  # what is submitted again has begun, to be told by its journal
    wanted = {folder.path for folder in folders}
    for folder in folders:
        _read(folder, root, runs)
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs.values(), key=lambda run: (_depth(run), run.name)):
        # One array has one shape, and one run at each index.
        shape = json.dumps(
            [run.experiment, run.folder.path in wanted, run.spec.gpus, plain(run.spec.cluster)]
        )
        copy = 0
        while any(other.index == run.index for other in groups.get(f"{shape}{copy}", ())):
            copy += 1
        groups.setdefault(f"{shape}{copy}", []).append(run)
    stages: list[StagePlan] = []
    earlier: list[StagePlan] = []
    for members in groups.values():
        first = members[0]
        points = tuple((run.point, run.spec) for run in members)
        layers = Layers.read(first.folder.spec_file)
        stage = StagePlan(
            Experiment(first.experiment, first.folder.spec_file, layers, points), tuple(members)
        )
        (stages if first.folder.path in wanted else earlier).append(stage)
    return Plan(tuple(stages), tuple(earlier))


def _read(folder: RunFolder, root: Path, runs: dict[Path, Run]) -> Run:
    """The run of a folder, and those above it."""
    from launch.origin import Origin
    from launch.plan import Run
    from launch.reader import Layers, SpecError
    from launch.spec import ExperimentSpec

    if folder.path in runs:
        return runs[folder.path]
    folder.make()
    record = folder.run
    try:
        spec = Layers.read(folder.spec_file).build(ExperimentSpec)
    except SpecError as error:
        raise NotThis(f"{folder.spec_file} is not a spec that this code reads: {error}") from None
    if spec.cluster.executor == "local":
        raise NotThis(
            f"{record.get('name')} runs on this machine: submit.py with its experiment goes on with it"
        )
    above: Run | Origin | None = None
    if "origin" in record:
        above = Origin.of(record["origin"])
    elif record.get("parent"):
        above = _read(RunFolder(Path(record["parent"])), root, runs)
    run = Run(
        experiment=str(record["experiment"]),
        point=str(record["point"]),
        index=int(record["index"]),
        spec=replace(spec, runs=str(root)),
        folder=folder,
        parent=above,
    )
    if run.identity != record.get("identity"):
        raise NotThis(
            f"{run.name} would not be the same run with this code (identity {run.identity[:12]}, "
            f"was {str(record.get('identity'))[:12]}): submit its experiment by a new name, or use its code"
        )
    runs[folder.path] = run
    return run


def _depth(run: Run | Origin) -> int:
    return _depth(run.parent) + 1 if run.parent else 0
