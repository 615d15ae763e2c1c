"""What stands in a plan's way on disk: folders that hold other runs, and handoffs that nothing may start from."""

from __future__ import annotations

import json
from collections.abc import Iterator

from launch.faults import Fault
from launch.handoff import HandoffError, check, read
from launch.identity import identity_of
from launch.plan import Plan, Run
from launch.record import read_json


def clashes(plan: Plan) -> Iterator[Fault]:
    """Runs whose folder holds another run: same name, other identity."""
    for stage in plan.stages:
        for run in stage.runs:
            found = run.folder.run
            if not found or found.get("identity") == run.identity:
                continue
            before = identity_of(read_json(run.folder.spec_file) or {"stage": run.spec.stage})
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
            yield Fault(
                place,
                f"{run.folder.path} holds another run: {why}",
                f"give this one a name of its own (name={run.experiment}_2), or remove the folder",
            )


def unfit(plan: Plan) -> Iterator[Fault]:
    """Handoffs that runs of the plan would start from and their ranks would refuse; contents are read there alone."""
    seen = set()
    for stage in plan.stages:
        for run in stage.runs:
            parent = run.parent
            if not isinstance(parent, Run) or parent.name in seen or run.folder.handoff_file.exists():
                continue
            if not parent.folder.handoff_file.exists():
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
