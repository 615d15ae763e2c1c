"""What stands in a plan's way on disk: folders that hold other runs, handoffs that nothing may start from, no data."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

from data.catalog import CatalogError, annotation_path, resolve
from launch.batches import Batches, Entry
from launch.cluster import Job, SlurmError, environment, jobs
from launch.faults import Fault
from launch.files import read_json
from launch.handoff import HandoffError, check, read
from launch.identity import identity_of
from launch.operating.status import OPEN, judge
from launch.operating.survey import Facts, there
from launch.plan import Plan, Run, StagePlan


def clashes(plan: Plan, jobs: Callable[[], Mapping[str, Job]] = jobs) -> Iterator[Fault]:
    """Runs whose folder holds another run, or will when its job starts: same name, other identity."""
    known, ask = Batches(), cache(jobs)
    present = there(str(run.folder.path) for stage in plan.stages for run in stage.runs)
    for stage in plan.stages:
        for run in stage.runs:
            path, entry = str(run.folder.path), None
            found = read_json(run.folder.run_file) if path in present else None
            if not found and (entry := known.entry(path)):
                found = entry.run
            if not found or found.get("identity") == run.identity or (entry and _over(entry, known, ask)):
                continue
            spec = entry.spec if entry else read_json(run.folder.spec_file)
            before = identity_of(spec or {"stage": run.spec.stage})
            now = identity_of(run.settings)
            changes = [
                f"{key} was {json.dumps(before.get(key))}, is {json.dumps(now.get(key))}"
                for key in sorted(before.keys() | now.keys())
                if before.get(key) != now.get(key)
            ]
            why = "; ".join(changes) or "the run it starts from is another"
            place = None
            if changes:
                key = min(key for key in now if before.get(key) != now.get(key)) if now else ""
                place = stage.experiment.layers.origin(key) if key else None
            other = f"cancel that one (runs.py cancel {run.name})" if entry else "remove the folder"
            yield Fault(
                place,
                f"{path} {'will hold' if entry else 'holds'} another run: {why}",
                f"give this one a name of its own (name={run.experiment}_2), or {other}",
            )


def _over(entry: Entry, known: Batches, ask: Callable[[], Mapping[str, Job]]) -> bool:
    """Whether a run without a folder will never start: a new one may take its place."""
    try:
        state = judge(Facts.waiting(entry), ask(), known)
    except SlurmError:
        return False
    return state.name not in (*OPEN, "held", "unknown")


def unfit(plan: Plan) -> Iterator[Fault]:
    """Handoffs that runs of the plan would start from and their ranks would refuse; contents are read there alone."""
    seen = set()
    for stage in plan.stages:
        for run in stage.runs:
            parent = run.parent
            if not isinstance(parent, Run) or parent.name in seen:
                continue
            if not parent.folder.handoff_file.exists():
                seen.add(parent.name)
                continue
            if run.folder.handoff_file.exists():
                continue
            seen.add(parent.name)
            try:
                found = read(parent.folder, identity=parent.identity, stage=parent.spec.stage)
                check(parent.folder, found, digests=False)
            except HandoffError as error:
                yield Fault(
                    stage.experiment.layers.origin("init_from"),
                    str(error),
                    f"or remove {parent.folder.handoff_file}, to train {parent.name} again from its newest checkpoint",
                )


def without_python(plan: Plan) -> Iterator[Fault]:
    """An interpreter that this machine, where the ranks are to start, does not have."""
    for stage in plan.stages:
        on = stage.spec.cluster
        elsewhere = os.sep in on.python and not os.path.isabs(on.python)  # ranks start in another folder
        if on.python and on.executor == "local" and (elsewhere or not shutil.which(on.python)):
            message = f"cluster.python: there is no program {on.python} on this machine"
            hint = "give its whole path, or leave it out for the one that runs this"
            yield Fault(stage.experiment.layers.origin("cluster.python"), message, hint)


def without_data(plan: Plan) -> tuple[list[Fault], list[Fault]]:
    """What is sure to end a run as it opens its data; and what only seems so from this machine."""
    faults: list[Fault] = []
    notes: list[Fault] = []
    for stage in plan.stages:
        if any(not run.folder.handoff_file.exists() for run in stage.runs):
            sure, unsure = _data_of(stage)
            faults += sure
            notes += unsure
    return list(dict.fromkeys(faults)), list(dict.fromkeys(notes))


def _data_of(stage: StagePlan) -> tuple[list[Fault], list[Fault]]:
    spec, layers = stage.spec, stage.experiment.layers
    here = spec.cluster.executor == "local"
    place, said = layers.origin("data.root"), spec.data.root
    root = os.path.expanduser(_expanded(said, {**os.environ, **spec.cluster.env}))
    if "$" in root:
        fault = Fault(
            place,
            f"data.root is {said}, and that variable is not set",
            "export it, or say data.root=FOLDER with the folder of the pictures and annotations",
        )
        return ([], [fault]) if spec.cluster.setup else ([fault], [])  # a setup line may set it
    if not os.path.isabs(root):
        hint = f"say data.root={os.path.abspath(root)}"
        return [
            Fault(place, f"data.root is {root!r}: ranks start in another folder, it must be absolute", hint)
        ], []
    notes = []
    if not here and "$" in _expanded(said, {**environment(), **spec.cluster.env}):
        hint = "say data.root=FOLDER, set it in cluster.env, or see that the nodes set it"
        notes.append(
            Fault(place, f"data.root is {said}: jobs do not take that variable over from this shell", hint)
        )
    if not os.path.isdir(root):
        fault = Fault(
            place, f"data.root: there is no folder {root} on this machine", "mend data.root or DATA_ROOT"
        )
        if here:
            return [fault], []
        return [], [*notes, Fault(place, fault.message, "the nodes must have it")]
    faults = []
    for data in {id(point.data): point.data for _, point in stage.experiment.points}.values():
        wanted = [("data.mix", dataset.annotation) for dataset, _ in resolve(data.mix)]
        for key, annotation in [*wanted, ("data.held_out", data.held_out)]:
            try:
                if annotation:
                    annotation_path(Path(root), annotation)
            except CatalogError as error:
                what, _, hint = str(error).partition("; ")
                faults.append(Fault(layers.origin(key), f"{key}: {what}", hint))
    return faults, notes


def _expanded(text: str, variables: dict[str, str]) -> str:
    """The text with what is known of its variables put in."""
    return re.sub(r"\$(\w+|\{[^}]*\})", lambda match: variables.get(match[1].strip("{}"), match[0]), text)
