"""What one submission will do: the sweep's points as runs, and the stages still missing up the chain."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.identity import EVERYWHERE, digest, plain
from launch.once import uncollected
from launch.origin import SCHEMES, Origin, OriginError, resolve
from launch.reader import Fault, Layers, Place, Said, SpecError, shown
from launch.record import RunFolder
from launch.snapshot import REPOSITORY
from launch.spec import NAME, ExperimentSpec
from moe.stages import STAGES

EXPERIMENTS = REPOSITORY / "experiments"
UNREADABLE = re.compile(r"[^A-Za-z0-9_.-]+")  # by W&B and SLURM


@dataclass(frozen=True)
class Experiment:
    """One YAML, read: its points, each a whole spec."""

    name: str
    file: Path
    layers: Layers
    points: tuple[tuple[str, ExperimentSpec], ...]

    @property
    def spec(self) -> ExperimentSpec:
        """The first point's spec, for what all points share."""
        return self.points[0][1]


@dataclass(frozen=True)
class Run:
    """One model to train: one point of one experiment."""

    experiment: str
    point: str  # empty without a sweep
    index: int  # its place in the sweep, and in the SLURM array
    spec: ExperimentSpec
    folder: RunFolder
    parent: Run | Origin | None

    @cached_property
    def name(self) -> str:
        """The readable name, also the run folder's path below the runs folder."""
        return f"{self.experiment}/{self.point or 'run'}"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The spec as JSON values."""
        found: dict[str, Any] = plain(self.spec)
        return found

    @cached_property
    def identity(self) -> str:
        """64 hex digits over everything that decides the run's weights, its parent's included."""
        return digest(self.spec, self.parent.identity if self.parent else "")

    @cached_property
    def id(self) -> str:
        """The run's name for W&B and SLURM: at most 64 characters, the same for ever."""
        readable = UNREADABLE.sub("-", self.name.removesuffix("/run"))
        return f"{readable[:55]}-{self.identity[:8]}"

    def record(self, code: str) -> dict[str, Any]:
        """What run.json says."""
        return {
            "version": 1,
            "id": self.id,
            "name": self.name,
            "experiment": self.experiment,
            "point": self.point,
            "index": self.index,
            "stage": self.spec.stage,
            "identity": self.identity,
            "parent": str(self.parent.folder.path) if self.parent else None,
            "parent_identity": self.parent.identity if self.parent else "",
            "code": code,
            **({"origin": self.parent.record()} if isinstance(self.parent, Origin) else {}),
        }


@dataclass(frozen=True)
class StagePlan:
    """One stage of the chain: one experiment, one array."""

    experiment: Experiment
    runs: tuple[Run, ...]

    @property
    def spec(self) -> ExperimentSpec:
        return self.experiment.spec

    @cached_property
    def by_point(self) -> dict[str, Run]:
        return {run.point: run for run in self.runs}


@dataclass(frozen=True)
class Plan:
    """Everything one submission starts, upstream first; `earlier` are the stages it relies on without starting them."""

    stages: tuple[StagePlan, ...]
    earlier: tuple[StagePlan, ...] = ()


def load(file: Path, overrides: Sequence[str | Said] = ()) -> Experiment:
    """Read one experiment and each point of its sweep; raises SpecError with all faults."""
    layers = Layers.read(file, overrides, presets={"cluster": EXPERIMENTS / "clusters"})
    sweep = layers.pop("sweep")
    if sweep is None:
        points = [("", layers.build(ExperimentSpec))]
        return Experiment(_name(file, points[0][1]), file, layers, tuple(points))
    points, faults = [], []
    for name, changes in layers.expand(sweep):
        for path, node in changes:
            if path == "gpus" or path.split(".")[0] in ("cluster", "runs", "name", "stage"):
                fault = Fault(
                    node.key or node.told,
                    f"sweep.{path}: the runs of one array share their {path.split('.')[0]}",
                    "write two experiments instead",
                )
                faults.append(fault)
        try:
            points.append((name, layers.override(changes).build(ExperimentSpec)))
        except SpecError as error:
            faults += error.faults
    if faults:
        raise SpecError(dict.fromkeys(faults))
    return Experiment(_name(file, points[0][1]), file, layers, tuple(points))


def _name(file: Path, spec: ExperimentSpec) -> str:
    if spec.name:
        return spec.name
    path = file.resolve()
    name = path.stem
    if path.is_relative_to(EXPERIMENTS):
        name = path.relative_to(EXPERIMENTS).with_suffix("").as_posix()
    if not NAME.fullmatch(name):
        hint = "rename it with letters, digits and _ . + -, or say name=..."
        raise SpecError((Fault(Place(shown(file)), f"{name!r} cannot name a folder of runs", hint),))
    return name


@uncollected()
def make(file: Path, overrides: Sequence[str] = (), *, first: str = "", last: str = "") -> Plan:
    """The plan for an experiment and the chain above it, cut to the stages from `first` to `last`.

    An override may name the experiment of the chain it is for: `stage2_instruct:train.steps=10`. The settings in
    EVERYWHERE hold for all.
    """
    named = [_scoped(n, text) for n, text in enumerate(overrides, 1)]
    common = [said for said in named if not said.scope and _everywhere(said.text)]
    chain: list[StagePlan] = []
    seen: list[Path] = []
    wanted: Path | None = file
    experiments: list[tuple[Experiment, str]] = []  # with the point of its parent that it names
    scopes = {said.scope: said for said in named if said.scope}
    while wanted is not None:
        seen.append(wanted.resolve())
        scope = f"{wanted.stem}:"
        mine = [said for said in named if said.scope == scope]
        scopes.pop(scope, None)
        mine = [said for said in named if not said.scope] + mine if wanted is file else common + mine
        experiment = load(wanted, mine)
        wanted, point = _parent_file(experiment)
        if wanted is not None and wanted.resolve() in seen:
            raise _fault(
                experiment, "init_from", f"{experiment.name} starts from itself, through {wanted.name}"
            )
        experiments.append((experiment, point))
    if scopes:
        names = ", ".join(path.stem for path in seen)
        raise SpecError(
            tuple(
                Fault(
                    Place("<command line>", said.n, 1, scope + said.text),
                    f"{scope} no experiment of this chain",
                    f"it has {names}",
                )
                for scope, said in scopes.items()
            )
        )
    parents: StagePlan | None = None
    point = ""
    origin = _origin(experiments[-1][0])
    for experiment, names_point in reversed(experiments):
        _check_order(experiment, parents)
        runs = tuple(
            Run(
                experiment.name,
                name,
                index,
                spec,
                RunFolder(runs_folder(spec) / experiment.name / (name or "run")),
                _parent(experiment, name, parents, names_point) if parents else origin,
            )
            for index, (name, spec) in enumerate(experiment.points)
        )
        parents = StagePlan(experiment, runs)
        chain.append(parents)
    start = _position(chain, first) if first else 0
    stop = _position(chain, last) + 1 if last else len(chain)
    if start >= stop:
        raise SpecError((Fault(None, f"nothing lies from {first} until {last}", _order(chain)),))
    return Plan(tuple(chain[start:stop]), tuple(chain[:start]))


def runs_folder(spec: ExperimentSpec) -> Path:
    """The folder of run folders; a relative one lies in the repository, whatever the current folder is."""
    return REPOSITORY / Path(spec.runs).expanduser()


def _scoped(n: int, text: str) -> Said:
    match = re.match(r"([\w-]+:)(?=[\w.]+=)", text)
    return Said(n, match[1], text[match.end() :]) if match else Said(n, "", text)


def _everywhere(text: str) -> bool:
    key = text.split("=", 1)[0].strip()
    return any(key == path or key.startswith(path + ".") for path in EVERYWHERE)


def _parent_file(experiment: Experiment) -> tuple[Path | None, str]:
    """The YAML whose handoff the experiment starts from, and the point of it that is named."""
    named = experiment.spec.init_from
    if not named or named.startswith(SCHEMES):
        return None, ""
    parts = named.split("/")
    for folder in dict.fromkeys((experiment.file.resolve().parent, EXPERIMENTS)):
        for cut in range(len(parts), 0, -1):
            path = folder / ("/".join(parts[:cut]) + ".yaml")
            if path.is_file():
                return path, "/".join(parts[cut:])
    near = sorted(path.stem for path in experiment.file.resolve().parent.glob("*.yaml"))
    raise _fault(
        experiment,
        "init_from",
        f"{named!r} names no experiment",
        f"{experiment.file.parent}/ has {', '.join(near)}",
    )


def _origin(experiment: Experiment) -> Origin | None:
    """What the first experiment of a chain starts from, where that is no experiment's."""
    spec = experiment.spec
    if not spec.init_from.startswith(SCHEMES):
        return None
    try:
        return resolve(spec.init_from, STAGES[spec.stage].after, runs_folder(spec))
    except OriginError as error:
        raise _fault(experiment, "init_from", str(error), error.hint) from None


def _check_order(experiment: Experiment, parents: StagePlan | None) -> None:
    after = STAGES[experiment.spec.stage].after
    if parents and parents.spec.stage != after:
        raise _fault(
            experiment,
            "init_from",
            f"stage {experiment.spec.stage} starts from stage {after}, "
            f"and {parents.experiment.name} is stage {parents.spec.stage}",
        )


def _parent(experiment: Experiment, point: str, parents: StagePlan, named: str) -> Run:
    """The run a point starts from: the one named, the only one, or the one at the same point."""
    if named:
        if named in parents.by_point:
            return parents.by_point[named]
        raise _fault(
            experiment,
            "init_from",
            f"{parents.experiment.name} has no run {named!r}",
            f"it has {', '.join(parents.by_point) or 'one run, without a sweep'}",
        )
    if len(parents.runs) == 1:
        return parents.runs[0]
    if point in parents.by_point:
        return parents.by_point[point]
    raise _fault(
        experiment,
        "init_from",
        f"{parents.experiment.name} has {len(parents.runs)} runs, and none at the point {point or '(no sweep)'}",
        f"sweep over the same values, or name one: init_from: {experiment.spec.init_from}/{parents.runs[0].point}",
    )


def _position(chain: list[StagePlan], name: str) -> int:
    for position, stage in enumerate(chain):
        if name in (stage.spec.stage, stage.experiment.name, stage.experiment.file.stem):
            return position
    raise SpecError((Fault(None, f"{name}: no stage of this chain", _order(chain)),))


def _order(chain: list[StagePlan]) -> str:
    return "its stages are " + ", ".join(f"{stage.spec.stage} ({stage.experiment.name})" for stage in chain)


def _fault(experiment: Experiment, key: str, message: str, hint: str = "") -> SpecError:
    return SpecError((Fault(experiment.layers.origin(key), message, hint),))
