"""The batches: what was submitted together, and the runs among it that wait for a folder of their own.

A batch's folder holds `plan.json`, written before sbatch and never changed; `batch.json`, what became of it; and the
script. A run that is submitted for the first time is an entry of the plan, so that a sweep of a thousand takes three
files. Its folder is made from the entry by whoever first has something to write there, its job above all
(launch.record.RunFolder.make), and the entry is then marked: a folder that is removed later does not come back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from launch.files import read_json

LOCK = ".submit.lock"  # in the folder of runs: one submitter at a time holds it, and notes its batches in it
LINE = ",\n"
VERSION = 2  # of plan.json; in version 1 each run's folder was made before its job was submitted


@dataclass(frozen=True)
class Entry:
    """A run as its batch holds it."""

    batch: str  # the batch's folder
    index: int  # its element
    name: str  # and its folder's path below the folder of runs
    plan: Mapping[str, Any]

    @cached_property
    def _whole(self) -> dict[str, Any]:
        return applied(self.plan["common"], self.plan["new"][str(self.index)])

    @property
    def run(self) -> dict[str, Any]:
        """What the folder's run.json will say."""
        found: dict[str, Any] = self._whole["run"]
        return found

    @property
    def spec(self) -> dict[str, Any]:
        """What its spec.json will say."""
        found: dict[str, Any] = self._whole["spec"]
        return found

    @property
    def submitting(self) -> dict[str, Any]:
        """The first record of its journal."""
        facts = {"batch": self.batch, "index": self.index, "code": os.path.basename(self.plan["code"])}
        return {"event": "submitting", "time": self.plan["time"], **facts}

    def mark(self) -> None:
        """Note that its folder was made."""
        made = f"{self.batch}/made"
        os.makedirs(made, exist_ok=True)
        os.close(os.open(f"{made}/{self.index}", os.O_WRONLY | os.O_CREAT, 0o666))


class Batches(dict[str, dict[str, Any]]):
    """One look at the batches: what batch.json says, by the batch's folder, and the runs that wait; read once each."""

    def __init__(self, known: Mapping[str, dict[str, Any]] = {}) -> None:
        super().__init__(known)
        self._waiting: dict[str, dict[str, Entry]] = {}
        self._above: dict[str, list[str]] = {}  # the folders above one that hold batches

    def __missing__(self, path: str) -> dict[str, Any]:
        self[path] = {**_read(f"{path}/batch.json"), "folder": path}
        return self[path]

    def waiting(self, root: str) -> dict[str, Entry]:
        """The runs that were submitted and have no folder yet, by the folder that they will have."""
        if root not in self._waiting:
            self._waiting[root] = _waiting(root, _seen(root))
        return self._waiting[root]

    def entry(self, folder: str) -> Entry | None:
        """The entry of a run that has no folder yet; None for any other."""
        above = root = os.path.dirname(folder)
        if above not in self._above:
            self._above[above] = []
            while root not in ("", "/"):
                if os.path.isdir(f"{root}/batches"):
                    self._above[above].append(root)
                root = os.path.dirname(root)
        return next((found for root in self._above[above] if (found := self.waiting(root).get(folder))), None)


def entry_of(batch: str, index: str) -> Entry | None:
    """The entry of an element's run, None where the batch has none: its folder was there before."""
    plan = _plan(batch)
    if index not in plan.get("new", ()):
        return None
    return Entry(batch, int(index), _name(plan, index), plan)


def tell(root: str, token: str) -> None:
    """Note a batch where whoever has the submit lock next will look."""
    handle = os.open(f"{root}/{LOCK}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, f"{token}\n".encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def tokens(root: str) -> list[str]:
    """The names of the batches, in order: those that a listing shows, and those noted.

    On NFS a listing may be a minute old, so that the batch of a submitter on another node is not in it yet. What is in
    a file is as its last writer closed it, and a name never asked for before is asked for at the server.
    """
    try:
        found = {entry.name for entry in os.scandir(f"{root}/batches")}
    except OSError:
        found = set()
    try:
        with open(f"{root}/{LOCK}", encoding="utf-8", errors="replace") as file:
            found |= {line.strip() for line in file} - {""}
    except OSError:
        pass
    return sorted(found)


def _seen(root: str) -> tuple[tuple[str, int], ...]:
    """The batches that were sent, or are about to be, each with the time at which the last of its folders was made."""
    found = []
    for token in tokens(root):
        if ".after-" not in token and os.path.exists(f"{root}/batches/{token}/batch.json"):
            try:
                found.append((token, os.stat(f"{root}/batches/{token}/made").st_mtime_ns))
            except OSError:
                found.append((token, 0))
    return tuple(found)


@lru_cache(maxsize=16)
def _waiting(root: str, seen: tuple[tuple[str, int], ...]) -> dict[str, Entry]:
    """The runs that wait, by folder. The newest batch has the say in what becomes of a run; a successor has begun."""
    newest: dict[str, tuple[float, str, str]] = {}
    plans: dict[str, dict[str, Any]] = {}
    made: dict[str, set[str]] = {}
    for token, _ in seen:
        batch = f"{root}/batches/{token}"
        plan = _plan(batch)
        if plan.get("version") != VERSION:
            continue
        plans[batch] = plan
        try:
            made[batch] = set(os.listdir(f"{batch}/made"))
        except OSError:
            made[batch] = set()
        for index in plan["runs"]:
            name = _name(plan, index)
            mine = (plan["time"], batch, index)
            if name not in newest or newest[name] < mine:
                newest[name] = mine
    return {
        f"{root}/{name}": Entry(batch, int(index), name, plans[batch])
        for name, (_, batch, index) in newest.items()
        if index in plans[batch]["new"] and index not in made[batch]
    }


def _name(plan: Mapping[str, Any], index: str) -> str:
    """Where the element's folder lies below that of the runs, which may have moved, or be seen through a link."""
    return str(plan["runs"][index]).removeprefix(f"{plan['root']}/")


def _plan(batch: str) -> dict[str, Any]:
    """A batch's plan, empty where there is none that can be read."""
    path = f"{batch}/plan.json"
    try:
        stat = os.stat(path)
    except OSError:
        return {}
    return _kept(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4096)
def _kept(path: str, mtime: int, size: int) -> dict[str, Any]:
    return _read(path)


def _read(path: str) -> dict[str, Any]:
    return read_json(Path(path)) or {}


def text(
    code: str,
    time: float,
    root: str,
    folders: Mapping[str, str],
    common: Mapping[str, Any],
    new: Mapping[str, list[list[Any]]],
) -> str:
    """plan.json: each element's folder below `root`, and of those that are `new` what their folders will hold.

    Of one that is written out, under `common`: its run.json and spec.json; of all what differs from that, as `changes`.
    """
    head = {"version": VERSION, "code": code, "time": time, "root": root, "common": common}
    parts = [f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in head.items()]
    parts.append(f'"runs": {json.dumps(folders, separators=(LINE, ": "))}')
    entries = (f'"{index}": {json.dumps(found)}' for index, found in new.items())
    parts.append(f'"new": {{{LINE.join(entries)}}}')
    return f"{{{LINE.join(parts)}}}\n"


def changes(base: Mapping[str, Any], own: Mapping[str, Any], *above: str) -> list[list[Any]]:
    """Which values of a mapping differ from those of another of the same keys, as [path, value]."""
    return [
        [[*above, key], value]
        for key, value in own.items()
        if value is not base[key] and differ(base[key], value)
    ]


def differ(one: Any, other: Any) -> bool:
    """Whether two JSON values are written differently: 1 is not 1.0, nor is it true."""
    return one != other if type(one) is type(other) is str else repr(one) != repr(other)


def applied(base: Mapping[str, Any], differences: list[list[Any]]) -> dict[str, Any]:
    """`base` with the differences; what is not on their way is shared."""
    found = dict(base)
    for path, value in differences:
        place = found
        for key in path[:-1]:
            place[key] = place = dict(place[key])
        place[path[-1]] = value
    return found
