"""What a report tells of a run, read from its folder alone; a metrics file of any length in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.files import read_json
from launch.metrics import loads, rows
from launch.operating import ledger
from launch.operating.reasons import VERDICTS
from launch.operating.show import Line
from launch.record import RunFolder
from launch.redact import redact

CELLS = 160  # a curve's bins at most; at least half as many once there are more steps


class Point:
    """One number over the steps of a bin."""

    __slots__ = ("count", "high", "low", "sum")

    def __init__(self, value: float) -> None:
        self.count, self.sum, self.low, self.high = 1, value, value, value

    def join(self, other: Point) -> None:
        """Take in the next bin's."""
        self.count += other.count
        self.sum += other.sum
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    @property
    def mean(self) -> float:
        return self.sum / self.count


@dataclass
class Cell:
    """What `width` steps measured: numbers by name, and tokens by expert by sparse layer."""

    points: dict[str, Point] = field(default_factory=dict)
    layers: dict[int, list[int]] = field(default_factory=dict)

    def join(self, other: Cell) -> None:
        """Take in the next cell's steps."""
        for name, point in other.points.items():
            if name in self.points:
                self.points[name].join(point)
            else:
                self.points[name] = point
        for layer, counts in other.layers.items():
            mine = self.layers.get(layer, [0] * len(counts))
            self.layers[layer] = [a + b for a, b in zip(mine, counts, strict=True)]


class Curves:
    """A run's numbers over its steps, in bins that double when there are too many."""

    def __init__(self) -> None:
        self.width, self.cells = 1, dict[int, Cell]()  # by (step - 1) // width
        self.seconds: list[float] = []  # of every step
        self.samples = self.last = 0
        self.unusable = 0  # rows whose loss is no finite number

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in a row of metrics.jsonl."""
        cell = Cell()
        for key, value in row.items():
            if isinstance(value, (int, float)) and key not in ("step", "time") and math.isfinite(value):
                cell.points[key] = Point(float(value))
            elif key.startswith("moe/layer") and key.endswith("/counts") and isinstance(value, list):
                cell.layers[_layer(key)] = [int(count) for count in value]
        self.last = row["step"]
        self.samples += int(row.get("samples", 0))
        self.unusable += "loss" in row and "loss" not in cell.points
        if "step_seconds" in cell.points:
            self.seconds.append(cell.points["step_seconds"].sum)
        place = (self.last - 1) // self.width
        if place in self.cells:
            self.cells[place].join(cell)
        else:
            self.cells[place] = cell
        if len(self.cells) > CELLS:
            self.width *= 2
            old, self.cells = self.cells, {}
            for place, cell in old.items():
                if place // 2 in self.cells:
                    self.cells[place // 2].join(cell)
                else:
                    self.cells[place // 2] = cell

    def of(self, name: str) -> list[tuple[float, Point]]:
        """One number's points, each at the middle of its bin."""
        return [
            (self.step(place), cell.points[name]) for place, cell in self.cells.items() if name in cell.points
        ]

    def step(self, place: int) -> float:
        """The middle of a bin."""
        return place * self.width + (self.width + 1) / 2

    def percentile(self, share: float) -> float | None:
        """Of the step times; None without steps."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None

    @property
    def layers(self) -> list[int]:
        """The sparse ones."""
        return sorted({layer for cell in self.cells.values() for layer in cell.layers})

    def tail(self, name: str, share: float = 0.1) -> float | None:
        """The mean over the last tenth of the curve."""
        points = [point for _, point in self.of(name)]
        points = points[-max(1, int(len(points) * share)) :]
        return sum(p.sum for p in points) / sum(p.count for p in points) if points else None

    def evenness(self, layer: int) -> list[tuple[float, float]]:
        """The entropy of a layer's shares over log E, bin by bin."""
        return [
            (self.step(place), loads([float(count) for count in cell.layers[layer]])[2])
            for place, cell in self.cells.items()
            if layer in cell.layers
        ]

    def mean(self, name: str) -> float | None:
        """One number's mean over all steps; None where it was not recorded."""
        points = [point for _, point in self.of(name)]
        return sum(p.sum for p in points) / sum(p.count for p in points) if points else None


def _layer(key: str) -> int:
    return int(key.removeprefix("moe/layer").partition("/")[0])


@dataclass(frozen=True)
class Try:
    """One attempt, as a line of a table."""

    number: int  # from 1
    name: str
    first: int  # the step it started after
    last: int  # the step it came to
    begun: float
    seconds: float
    node: str
    world: int
    ended: str  # in words; "running" while it does


@dataclass(frozen=True)
class Story:
    """One run, as a report tells it."""

    line: Line
    record: dict[str, Any]
    spec: dict[str, Any]
    curves: Curves
    ledger: ledger.Ledger
    tries: tuple[Try, ...]
    handoff: dict[str, Any]
    held_out: dict[str, Any]
    data: dict[str, Any]
    url: str  # of the run on W&B; empty where it never was online

    @property
    def folder(self) -> RunFolder:
        return self.line.folder

    @property
    def name(self) -> str:
        return self.line.short

    @property
    def stage(self) -> str:
        return str(self.record.get("stage", ""))

    @property
    def point(self) -> str:
        """Its place in a sweep; empty without one."""
        return str(self.record.get("point", ""))

    @property
    def experiment(self) -> str:
        return str(self.record.get("experiment", ""))


def story(line: Line) -> Story:
    """Read one run's folder."""
    folder = line.folder
    curves = Curves()
    for row in rows(folder.metrics_file):
        curves.add(row)
    held_out = read_json(folder.eval_file) or {}
    return Story(
        line=line,
        record=folder.run,
        spec=redact(folder.spec),
        curves=curves,
        ledger=ledger.of(folder, line.state),
        tries=tuple(_tries(folder, line, curves.last)),
        handoff=read_json(folder.handoff_file) or {},
        held_out=held_out if isinstance(held_out.get("accuracy"), (int, float)) else {},
        data=read_json(folder.data_file) or {},
        url=_url(folder),
    )


def chain(lines: Sequence[Line], look: Any) -> list[Line]:
    """The runs and all they start from, upstream first; `look` gives the lines of further run folders."""
    known = {line.folder.path: line for line in lines}
    missing = _parents(known)
    while missing:
        known |= {line.folder.path: line for line in look([RunFolder(path) for path in missing])}
        missing = _parents(known)
    depth: dict[Path, int] = {}

    def deep(path: Path) -> int:
        if path not in depth:
            depth[path] = 0  # a ring, which no plan makes, would else not end
            parent = Path(known[path].facts.parent) if known[path].facts.parent else None
            depth[path] = deep(parent) + 1 if parent in known and parent else 0
        return depth[path]

    return sorted(known.values(), key=lambda line: (deep(line.folder.path), line.name))


def _parents(known: Mapping[Path, Line]) -> list[Path]:
    wanted = {Path(line.facts.parent) for line in known.values() if line.facts.parent}
    return sorted(path for path in wanted - set(known) if RunFolder(path).run)


def _tries(folder: RunFolder, line: Line, last: int) -> Iterator[Try]:
    journal = folder.journal
    starts = {r["attempt"]: r for r in journal if r["event"] == "start" and r.get("attempt")}
    launched = {r["attempt"]: r for r in journal if r["event"] == "launched" and r.get("attempt")}
    found = ledger.attempts(journal)
    for i, one in enumerate(found):
        after = next((later for later in found[i + 1 :] if later.name in starts), None)
        newest = i == len(found) - 1
        reached = int(starts[after.name].get("last", 0)) if after else last
        said = [r for r in journal if r.get("attempt") == one.name and r["event"] in ("ended", "verdict")]
        words = _words(said[-1]) if said else "no word of its end"
        if newest and not said and line.state.name == "running":
            words = "running"
        yield Try(
            number=i + 1,
            name=one.name,
            first=one.step,
            last=max(one.step, reached) if one.start else one.step,
            begun=one.begin,
            seconds=max(0.0, (one.end if said or not newest else one.seen) - one.begin),
            node=str(launched.get(one.name, starts.get(one.name, {})).get("node", "")),
            world=one.world,
            ended=words,
        )


def _words(record: Mapping[str, Any]) -> str:
    """Why an attempt ended, of its last record."""
    outcome = str(record.get("verdict") or record.get("outcome") or "")
    words = VERDICTS.get(outcome, (f"ended: {outcome}", ""))[0]
    reason = str(record.get("reason") or "")
    return f"{words}: {reason}" if reason else words


def _url(folder: RunFolder) -> str:
    states = [read_json(path) or {} for path in sorted((folder.path / "wandb").glob("mirror_*.json"))]
    return next((str(state["url"]) for state in reversed(states) if state.get("url")), "")
