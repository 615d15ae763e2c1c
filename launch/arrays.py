"""Which runs make one array: by what they wait for, and by how many elements the cluster takes.

SLURM refuses indices from MaxArraySize on, and more jobs at a time than an account may have. A sweep of more runs is
several arrays, each of them submitted, found and waited for by itself; an element is the run's index less its array's
offset, and runs of equal index in two stages are equal elements, whatever the size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import cluster
from launch.files import read_json
from launch.plan import Run

TOO_LARGE = re.compile(r"invalid job array specification", re.IGNORECASE)
TOO_MANY = re.compile(r"MaxSubmitJob|job submit limit", re.IGNORECASE)


@dataclass(frozen=True)
class Group:
    """The runs of one array."""

    runs: tuple[Run, ...]
    dependency: str  # as in --dependency=, empty for none
    offset: int  # of the runs' indices


def groups(runs: Sequence[Run], jobs: Mapping[str, str], size: int = 0) -> list[Group]:
    """The runs in arrays of at most `size` indices (0: any); `jobs` has the element of each parent still to finish.

    One parent for all: afterok on its element. Parents at the same indices of one array: aftercorr, element by
    element. What a partial resubmission leaves over falls into an array a parent.
    """
    found: dict[tuple[str, int], list[Run]] = {}
    parents = {run.parent.name for run in runs if run.parent}
    for run in runs:
        offset = run.index // size * size if size else 0
        element = jobs.get(run.parent.name, "") if run.parent else ""
        array, _, index = element.partition("_")
        if not element:
            dependency = ""
        elif len(parents) > 1 and index == str(run.index - offset):
            dependency = f"aftercorr:{array}"
        else:
            dependency = f"afterok:{element}"
        found.setdefault((dependency, offset), []).append(run)
    return [Group(tuple(members), *key) for key, members in found.items()]


def smaller(group: Group, refusal: str, size: int) -> tuple[list[Group], int]:
    """The group in parts that SLURM may take, after it refused the whole in these words, and the size of an array now.

    No parts: the words are of something else, or there is no smaller. `size` is what was tried for all; 0 for any.
    """
    if TOO_LARGE.search(refusal):
        most = int(cluster.fields(_line("MaxArraySize")).get("MaxArraySize", "0"))
        return ([], most) if 0 < most != size else ([], size)
    if TOO_MANY.search(refusal) and len(group.runs) > 1:
        half = len(group.runs) // 2
        parts = (group.runs[:half], group.runs[half:])
        return [Group(part, group.dependency, group.offset) for part in parts], size
    return [], size


def named(elements: Iterable[tuple[str, str, str]]) -> list[str]:
    """What scancel is told, of (array, its batch's folder, element) each: arrays as a whole where all are meant.

    An array whose last elements are cancelled one by one before they start is forgotten by SLURM 22.05, and what
    depends on one of them is then taken to depend on nothing: it starts.
    """
    members: dict[tuple[str, str], list[str]] = {}
    for array, batch, element in elements:
        members.setdefault((array, batch), []).append(element)
    found = []
    for (array, batch), some in members.items():
        runs = (read_json(Path(batch) / "plan.json") or {}).get("runs", {})
        found += [array] if len(runs) == len(some) else some
    return found


def _line(key: str) -> str:
    """The setting's line in SLURM's configuration."""
    text = cluster.call("scontrol", "show", "config", timeout=20)
    return next((" ".join(line.split()).replace(" = ", "=") for line in text.splitlines() if key in line), "")


def shares(limit: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """A limit over several arrays, in proportion to what each has left, at least 1 each; 0 is no limit for any."""
    whole = sum(sizes.values())
    return {array: limit and max(1, limit * size // max(1, whole)) for array, size in sizes.items()}
