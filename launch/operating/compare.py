"""diff: how a run differs from a spec or from another run, and what each difference would mean for it.

free: where it is computed and recorded; may change between attempts. resume-safe: how the same numbers are
computed; may change between attempts, last digits may differ. new run: anything else decides the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.exits import OK, USAGE
from launch.faults import Place, SpecError
from launch.identity import FREE, plain
from launch.operating.address import choose, name
from launch.operating.logs import complain
from launch.plan import Experiment, load
from launch.record import RunFolder
from moe.stages import STAGES

# Of FREE, what changes how a step is computed, though not what it is; the rest of FREE leaves it alone.
RESUME_SAFE = (
    "gpus",
    "model.attention",
    "moe.expert_parallel",
    "moe.dispatcher",
    "train.micro_batch",
    "train.zero",
    "train.offload",
    "train.recompute",
)
GROUPS = {
    "new run": "needs a new run (give it a name of its own: name=...)",
    "resume-safe": "resume-safe: the next attempt may have it; the same training, computed in another way",
    "free": "free: the next attempt may have it",
}


@dataclass(frozen=True)
class Difference:
    """One setting that differs."""

    key: str
    was: Any
    now: Any
    group: str  # of GROUPS
    place: str = ""  # the line that sets it now


def diff(chosen: Sequence[RunFolder], options: argparse.Namespace) -> int:
    """Print the differences by what they mean."""
    one = chosen[0]
    other = options.other
    try:
        if other.endswith((".yaml", ".yml")):
            found = list(with_spec(one, load(Path(other), options.overrides)))
        else:
            from launch.record import find_runs

            [second] = choose(find_runs(options.runs), options.runs, [other], parts=False)[:2]
            found = list(with_run(one, second))
            other = name(second, options.runs)
    except SpecError as error:
        print(error, file=sys.stderr)
        return USAGE
    except LookupError as error:
        return complain(str(error.args[0]))
    except ValueError:
        return complain(f"{other} means several runs; name one")
    if options.json:
        print(json.dumps([asdict(difference) for difference in found], indent=1))
        return OK
    title = name(one, options.runs).removesuffix("/run")
    if not found:
        print(f"{title} and {other} do not differ")
    for group, words in GROUPS.items():
        members = [difference for difference in found if difference.group == group]
        if members:
            print(f"{words}")
        for difference in members:
            at = f"    {difference.place}" if difference.place else ""
            print(f"  {difference.key}: {_text(difference.was)} -> {_text(difference.now)}{at}")
    return OK


def with_spec(folder: RunFolder, experiment: Experiment) -> Iterator[Difference]:
    """How the run differs from the point of the experiment that it is; LookupError where that is none."""
    points = dict(experiment.points)
    point = str(folder.run.get("point", ""))
    if point not in points and len(points) > 1:
        names = ", ".join(points)
        raise LookupError(
            f"{experiment.file} has the points {names}, and none is {point or 'without a sweep'}"
        )
    spec = points.get(point, experiment.spec)
    for difference in differences(folder.spec, plain(spec)):
        place: Place | None = experiment.layers.origin(difference.key)
        yield Difference(difference.key, difference.was, difference.now, difference.group, str(place or ""))


def with_run(one: RunFolder, other: RunFolder) -> Iterator[Difference]:
    """How two runs differ, the runs they start from included."""
    yield from differences(one.spec, other.spec)
    was, now = one.run, other.run
    if was.get("parent_identity") != now.get("parent_identity"):
        yield Difference("(the run it starts from)", was.get("parent"), now.get("parent"), "new run")
    if was.get("code") != now.get("code"):
        yield Difference("(the code)", was.get("code"), now.get("code"), "free")


def differences(was: dict[str, Any], now: dict[str, Any]) -> Iterator[Difference]:
    """The settings that differ between two plain specs, in the order of the spec."""
    before, after = dict(_flat(was)), dict(_flat(now))
    dense = not STAGES[now["stage"]].sparse if now.get("stage") in STAGES else False
    for key in dict.fromkeys((*before, *after)):
        if before.get(key) != after.get(key):
            yield Difference(key, before.get(key), after.get(key), _group(key, dense))


def _group(key: str, dense: bool) -> str:
    def among(paths: Sequence[str]) -> bool:
        return any(key == path or key.startswith(path + ".") for path in paths)

    if among(RESUME_SAFE):
        return "resume-safe"
    if among(FREE) or (dense and key.startswith("moe.")):  # a stage without experts does not read them
        return "free"
    return "new run"


def _flat(spec: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in spec.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value


def _text(value: Any) -> str:
    return "(none)" if value is None else json.dumps(value)
