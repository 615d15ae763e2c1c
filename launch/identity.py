"""What makes a run the run it is: the settings that decide its weights, and the digest over them and its parent's.

What only says where and how fast a run is computed is left out, so that it may move to another cluster or another
number of GPUs and still be the same run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from itertools import compress
from operator import attrgetter, is_not
from typing import Any

from data.spec import DataSpec
from launch.batches import differ
from launch.fields import types_of
from launch.once import once
from launch.spec import ExperimentSpec
from moe.spec import ModelSpec, MoESpec, TrainSpec
from moe.stages import STAGES

SCALARS = frozenset({str, int, float, bool, type(None)})
SECTIONS: dict[type, str] = {ModelSpec: "model", MoESpec: "moe", DataSpec: "data", TrainSpec: "train"}

# Settings of where a run is computed: given on the command line, they hold for every stage of the chain.
EVERYWHERE = ("cluster", "gpus", "runs", "wandb", "data.root")

# Settings that may change between attempts of one run. All others are its identity.
FREE = (
    *EVERYWHERE,
    "name",
    "init_from",
    "data.workers",
    "model.attention",
    "moe.expert_parallel",
    "moe.dispatcher",
    "moe.overlap",
    "train.micro_batch",
    "train.zero",
    "train.offload",
    "train.recompute",
    "train.save_every",
    "train.save_async",
    "train.keep",
    "train.log_every",
    "train.diverged_after",
)


def plain(spec: Any) -> Any:
    """A spec as JSON values; durations as they are written."""
    if type(spec) in SCALARS:
        return spec
    if hasattr(
        type(spec), "__dataclass_fields__"
    ):  # as dataclasses.is_dataclass, which takes five times as long
        return _plain(spec)
    if isinstance(spec, dict):
        return {key: plain(value) for key, value in spec.items()}
    if isinstance(spec, (tuple, list)):
        return [plain(value) for value in spec]
    if isinstance(spec, int) and type(spec) not in (int, bool):
        return str(spec)
    return spec


@once
def _plain(spec: Any) -> dict[str, Any]:
    kind: type = type(spec)
    values = [getattr(spec, name) for name in types_of(kind)]
    return {
        name: value if type(value) in SCALARS else plain(value)
        for name, value in zip(types_of(kind), values, strict=True)
    }


def changes(base: Any, spec: Any, *above: str) -> list[list[Any]]:
    """What differs between two specs of a kind as JSON values, as [path, value]; what they share is not looked at."""
    found: list[list[Any]] = []
    kind: type = type(base)
    names, values = _fields(kind)
    before, after = values(base), values(spec)
    for name, one, other in compress(zip(names, before, after, strict=True), map(is_not, before, after)):
        if type(other) is type(one) and hasattr(type(other), "__dataclass_fields__"):
            found += changes(one, other, *above, name)
        elif differ(plain(one), value := plain(other)):
            found.append([[*above, name], value])
    return found


@cache
def _fields(kind: type) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]]:
    """The names of a class's fields, and what gives all their values at a time."""
    names = tuple(types_of(kind))
    return names, attrgetter(*names) if len(names) > 1 else lambda spec: (getattr(spec, names[0]),)


def digest(spec: ExperimentSpec, parent: str) -> str:
    """64 hex digits over what decides weights: the settings of a spec, and the digest of the parent's.

    A setting at its default is left out, so that a later version's new setting, which by default changes
    nothing, leaves the runs of this one what they are. A released default is therefore never changed.
    """
    found: dict[str, Any] = {}
    kind: type = ExperimentSpec
    for name in types_of(kind):
        value = getattr(spec, name)
        found |= _section(value) if type(value) in SECTIONS else _flat({name: plain(value)})
    found, defaults = _deciding(found, spec.stage), _defaults()
    said = {path: value for path, value in found.items() if path not in defaults or defaults[path] != value}
    return hashlib.sha256(json.dumps([said, parent], sort_keys=True).encode()).hexdigest()


def identity_of(spec: dict[str, Any]) -> dict[str, Any]:
    """The part of a plain spec that decides weights, as dotted keys; what it does not say is at its default."""
    return _deciding(_flat(spec), spec["stage"])


def _deciding(flat: dict[str, Any], stage: str) -> dict[str, Any]:
    found = {**_defaults(), **flat}
    if not found["train.lora.rank"]:
        found = {path: value for path, value in found.items() if not path.startswith("train.lora.")}
    if not STAGES[stage].sparse:
        # A dense stage is the same run whatever an inherited file says of experts.
        found = {path: value for path, value in found.items() if not path.startswith("moe.")}
    return found


@once
def _section(section: Any) -> dict[str, Any]:
    """A section's part of what decides weights; each is of a class of its own."""
    return _flat(plain(section), f"{SECTIONS[type(section)]}.")


def _flat(spec: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in spec.items():
        path = above + key
        if path in FREE:
            continue
        if isinstance(value, dict) and path.count(".") < 2 and path.split(".")[0] in SECTIONS.values():
            found |= _flat(value, path + ".") if value else {path: value}
        else:
            found[path] = value
    return found


@cache
def _defaults() -> dict[str, Any]:
    return _flat({key: value for key, value in plain(ExperimentSpec("moe")).items() if key != "stage"})
