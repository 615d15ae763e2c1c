"""What makes a run the run it is: the settings that decide its weights, and the digest over them and its parent's.

What only says where and how fast a run is computed is left out, so that it may move to another cluster or another
number of GPUs and still be the same run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import cache
from typing import Any

from launch.spec import ExperimentSpec
from moe.stages import STAGES

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
    if dataclasses.is_dataclass(spec):
        return {field.name: plain(getattr(spec, field.name)) for field in dataclasses.fields(spec)}
    if isinstance(spec, dict):
        return {key: plain(value) for key, value in spec.items()}
    if isinstance(spec, (tuple, list)):
        return [plain(value) for value in spec]
    if isinstance(spec, int) and type(spec) not in (int, bool):
        return str(spec)
    return spec


def digest(spec: dict[str, Any], parent: str) -> str:
    """64 hex digits over what decides weights: the settings of a plain spec, and the digest of the parent's.

    A setting at its default is left out, so that a later version's new setting, which by default changes
    nothing, leaves the runs of this one what they are. A released default is therefore never changed.
    """
    found, defaults = identity_of(spec), _defaults()
    said = {path: value for path, value in found.items() if path not in defaults or defaults[path] != value}
    return hashlib.sha256(json.dumps([said, parent], sort_keys=True).encode()).hexdigest()


def identity_of(spec: dict[str, Any]) -> dict[str, Any]:
    """The part of a plain spec that decides weights, as dotted keys; what it does not say is at its default."""
    found = {**_defaults(), **_flat(spec)}
    if not found["train.lora.rank"]:
        found = {path: value for path, value in found.items() if not path.startswith("train.lora.")}
    if not STAGES[spec["stage"]].sparse:
        # A dense stage is the same run whatever an inherited file says of experts.
        found = {path: value for path, value in found.items() if not path.startswith("moe.")}
    return found


def _flat(spec: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in spec.items():
        path = above + key
        if path in FREE:
            continue
        if (
            isinstance(value, dict)
            and path.count(".") < 2
            and path.split(".")[0] in ("model", "moe", "data", "train")
        ):
            found |= _flat(value, path + ".") if value else {path: value}
        else:
            found[path] = value
    return found


@cache
def _defaults() -> dict[str, Any]:
    return _flat({key: value for key, value in plain(ExperimentSpec("moe")).items() if key != "stage"})
