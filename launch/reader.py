"""An experiment's YAML, what it inherits and `key=value` over it -> a frozen dataclass or all faults at once.

Weakest first: defaults, inherited files, the file, the command line. Mappings merge key by key, lists and
scalars are replaced. Nothing here knows our fields: nodes.py reads text, fields.py values by a field's type.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple, TypeVar

from launch.faults import COMMAND_LINE, DEFAULT, Fault, Place, SpecError, near, shorten
from launch.fields import Sound, Typed, leaves
from launch.nodes import Node, Text, merge

__all__ = ["Fault", "Layers", "Node", "Place", "SpecError"]

T = TypeVar("T")
Override = tuple[str, Node]  # a dotted path and what is laid there
LONGEST = 200  # bytes of a point's name, which is a folder's
LARGEST = 1_000_000  # bytes of a file; a sweep of 10,000 points written out has a tenth of that


class Said(NamedTuple):
    """A `key=value` of the command line: which it is there, and what names the experiment before it."""

    n: int
    scope: str
    text: str


class Files:
    """Files with what they inherit and the presets they name; what is sound is read on beside the faults."""

    def __init__(self, search: Sequence[Path], presets: Mapping[str, Path]) -> None:
        self.search, self.presets = search, presets
        self.faults: list[Fault] = []
        self.broken = False  # a layer is missing: what seems left out may stand there
        self.names: list[str] = []

    def fork(self) -> Files:
        """One that may meet further faults without telling them here."""
        other = Files(self.search, self.presets)
        other.faults, other.names, other.broken = [*self.faults], [*self.names], self.broken
        return other

    def tell(self, place: Place, message: str, hint: str = "") -> None:
        self.faults.append(Fault(place, message, hint))

    def read(self, path: Path, chain: tuple[Path, ...] = (), presets: bool = True) -> Node | None:
        """A file's tree, laid over those it inherits; None, and a fault, where it cannot be read."""
        name, before = shown(path), len(self.faults)
        text = self._text(path)
        root = None if text is None else Text(text, name, self.faults).read()
        if root is None or not isinstance(root.value, dict):
            self.broken = True
            if len(self.faults) == before and (root is None or root.empty):
                self.tell(Place(name), "is empty", "begin with `inherits:` and the file that it changes")
            elif root is not None:
                self.tell(root.place, f"expected settings, `key: value`, got {shorten(str(root))}")
            return None
        own = Node(Place(name), {key: node for key, node in root.value.items() if key != "inherits"})
        if presets:
            own = self.resolve(own)
        below: Node | None = None
        inherits = root.value.get("inherits", Node(root.place, ()))
        for item in (inherits,) if isinstance(inherits.value, str) else inherits.items:
            if parent := self._parent(path, item, (*chain, path.resolve()), presets):
                below = merge(below, parent) if below else parent
        if isinstance(inherits.value, dict):
            self.tell(inherits.told, "inherits: expected a file or a list of files, got a mapping")
        return merge(below, own) if below else own

    def resolve(self, root: Node) -> Node:
        """The tree with presets for their names. A name replaces all that is there, a mapping changes it."""
        entries = dict(root.entries)
        for key, folder in self.presets.items():
            node = entries.get(key)
            if node is None or not isinstance(node.value, str) or node.empty:
                continue
            del entries[key]
            names = sorted(file.stem for file in folder.glob("*.yaml"))
            if node.value not in names:
                self.broken = True
                found = near(node.value, names)
                meant = f"did you mean {found!r}? " if found else ""
                hint = f"{meant}{shown(folder)}/ has {', '.join(names) or 'none'}"
                self.tell(node.place, f"{key}: no preset {shorten(node.value)}", hint)
            elif preset := self.read(folder / f"{node.value}.yaml", presets=False):
                named = {"name": Node(node.place, node.value, node.key)} | preset.entries
                entries[key] = Node(node.place, named, node.key, whole=True)
        return Node(root.place, entries, root.key)

    def argument(self, said: Said) -> Override | None:
        """One `key=value` of the command line."""
        n, scope, text = said
        clean = text.encode("utf-8", "replace").decode()  # bytes that are no UTF-8 come as lone surrogates
        path, equals, value = clean.partition("=")
        place = Place(COMMAND_LINE, n, 1, scope + " ".join(clean.splitlines()))
        before = len(self.faults)
        if clean != text:
            self.tell(place, "is not UTF-8 text")
        elif not equals or not re.fullmatch(r"[^\s.=]+(\.[^\s.=]+)*", path):
            again = is_file(Path(clean))
            hint = "one experiment at a time" if again else "write it like train.steps=100"
            self.tell(place, f"expected key=value, got {shorten(clean)}", hint)
        elif path.split(".")[0] == "inherits":
            self.tell(place, "inherits: a file says what it inherits; the command line cannot")
        elif not value:
            return path, Node(place, "", place)
        elif node := Text(value, COMMAND_LINE, self.faults, (n, scope + path)).read():
            return path, node.at(place)
        elif len(self.faults) == before:
            self.tell(place, f"{path}: no value", "to YAML this is a comment; put it in quotes")
        return None

    def _text(self, path: Path) -> str | None:
        name = shown(path)
        if name not in self.names:
            self.names.append(name)
        data = b""
        try:
            with path.open("rb") as file:
                data = file.read(LARGEST + 1)
            if len(data) > LARGEST:
                self.tell(
                    Place(name), f"is over {LARGEST // 1_000_000} MB: no specification", "name another file"
                )
                return None
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            # The codec counts from behind the byte order mark.
            start = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
            where = f"byte 0x{data[start]:02x} in line {data[:start].count(10) + 1}"
            self.tell(Place(name), f"is not UTF-8 text: {where}", "save the file as UTF-8")
        except OSError as error:
            self.tell(Place(name), f"cannot be read: {error.strerror}")
        return None

    def _parent(self, path: Path, item: Node, chain: tuple[Path, ...], presets: bool) -> Node | None:
        self.broken, broken = True, self.broken
        if not isinstance(item.value, str) or not item.value:
            self.tell(item.place, "inherits: expected a file or a list of files")
            return None
        candidates = [folder / item.value for folder in (path.parent, *self.search)]
        found = next((file for file in candidates if is_file(file)), None)
        if found is None:
            self.tell(item.place, f"inherits {item.value}, which is not a file", nearest(candidates[0]))
            return None
        if found.resolve() in chain:
            way = [*chain[chain.index(found.resolve()) :], found]
            names = " -> ".join(file.name for file in way)
            self.tell(item.place, f"inherits {item.value}, which inherits it in turn: {names}", "drop one")
            return None
        self.broken = broken
        return self.read(found, chain, presets)


class Layers:
    """The composed tree of one experiment; every value knows the place that set it."""

    def __init__(self, root: Node, files: Files, taken: tuple[str, ...] = ("inherits",)) -> None:
        self._root, self._files, self._taken = root, files, taken
        self._sound: Sound = {}

    @classmethod
    def read(
        cls,
        path: Path,
        overrides: Sequence[str | Said] = (),
        search: Sequence[Path] = (),
        presets: Mapping[str, Path] | None = None,
    ) -> Layers:
        """Read a file, what it inherits (from its own folder, else from `search`), and `key=value` over it.

        `presets` maps a top-level key to the folder with the file that a scalar there names. SpecError where
        the file itself cannot be read; all other faults are told by `build`, together with those it finds.
        """
        files = Files(search, presets or {})
        if not is_file(path):
            what = "is a folder" if path.is_dir() else "no such experiment"
            raise SpecError([Fault(None, f"{shown(path)}: {what}", nearest(path))])
        root = files.read(path)
        if root is None:
            raise SpecError(files.faults)
        return cls(root, files).override(overrides)

    @property
    def files(self) -> tuple[str, ...]:
        """The files read, the experiment's own first."""
        return tuple(self._files.names)

    def pop(self, key: str) -> Node | None:
        """Take a top-level key out, as written."""
        entries = dict(self._root.entries)
        node = entries.pop(key, None)
        self._root = Node(self._root.place, entries)
        self._taken = (*self._taken, key)
        return node

    def override(self, changes: Sequence[str | Said | Override]) -> Layers:
        """A new tree with `a.b=value`s, or paths with nodes, laid over this one, sections first."""
        files = self._files.fork()
        laid: dict[str, Node] = {}
        for n, change in enumerate(changes, 1):
            said = Said(n, "", change) if isinstance(change, str) else change
            path, node = (files.argument(said) if isinstance(said, Said) else said) or ("", None)
            if node and path in laid:
                files.tell(node.key or node.place, f"{path}: said twice", "keep one")
            elif node:
                laid[path] = node
        root = self._root
        for path, node in sorted(laid.items(), key=lambda item: item[0].count(".")):
            for part in reversed(path.split(".")):
                node = Node(node.place, {part: node}, node.key)
            root = merge(root, files.resolve(Node(root.place, node.value)))
        laid_over = Layers(root, files, self._taken)
        laid_over._sound = self._sound
        return laid_over

    def expand(self, sweep: Node, name: str = "sweep") -> list[tuple[str, list[Override]]]:
        """The points of a sweep, its last axis fastest: a name, `lr=2e-5,top_k=1`, and overrides for each.

        An axis is a dotted path with a list of values. SpecError with all that is wrong with them.
        """
        faults = list(self._files.faults)
        axes: dict[str, Node] = {}
        collect_axes(sweep, name, "", axes, faults)
        short = shortest(list(axes))
        points: dict[str, list[Override]] = {}
        for values in product(*(node.items for node in axes.values())) if not faults else ():
            chosen = [
                (path, value.at(node.key)) for (path, node), value in zip(axes.items(), values, strict=True)
            ]
            safe = [(short[path], re.sub(r"[^\w.+-]+", "_", str(value)).strip("_")) for path, value in chosen]
            point = ",".join(f"{key}={value}" for key, value in safe)
            if point in points or len(point.encode()) > LONGEST:
                what = (
                    "two points would have the name" if point in points else "too long for a folder's name:"
                )
                faults.append(
                    Fault(sweep.told, f"{name}: {what} {point}", "sweep over shorter, distinct values")
                )
                break
            points[point] = chosen
        if faults:
            raise SpecError(faults)
        return list(points.items())

    def build(self, cls: type[T]) -> T:
        """An instance of a frozen dataclass; SpecError with every fault of the text and of the values."""
        faults = list(self._files.faults)
        instance: T = Typed(cls, faults, not self._files.broken, self._taken, self._sound).read(self._root)
        if faults:
            rank = {name: n for n, name in enumerate(self._files.names)}
            raise SpecError(
                sorted(faults, key=lambda fault: rank.get(fault.place.file if fault.place else "", -1))
            )
        return instance

    def origin(self, path: str) -> Place:
        """The place that set a value, or DEFAULT."""
        node, found = self._root.find(tuple(path.split(".")))
        return node.told if found else DEFAULT

    @staticmethod
    def place_of(node: Node) -> Place:
        """The place that names a setting."""
        return node.key or node.place

    def explain(self, instance: object) -> list[tuple[str, str, str]]:
        """Path, value and origin of every setting of what was built from these layers."""
        rows = []
        for parts, value in leaves(instance):
            node, found = self._root.find(parts)
            rows.append((".".join(parts), value, str(node.told if found else DEFAULT)))
        return rows


def collect_axes(node: Node, name: str, path: str, axes: dict[str, Node], faults: list[Fault]) -> None:
    """Find a sweep's axes: lists under dotted or nested keys."""
    where = f"{name}.{path}" if path else name
    if node.entries:
        for key, child in node.entries.items():
            collect_axes(child, name, f"{path}.{key}" if path else key, axes, faults)
    elif not path:
        faults.append(Fault(node.told, f"{name}: expected settings with lists of values, got {got(node)}"))
    elif not node.items:
        message = f"{where}: expected a list of values, got {got(node)}"
        some = isinstance(node.value, str) and node.value
        faults.append(Fault(node.told, message, f"write {path}: [{some or '...'}]"))
    else:
        axes[path] = node
        said: set[str] = set()
        for item in node.items:
            if (text := str(item)) in said:
                faults.append(Fault(item.place, f"{where}: {text} is said twice", "keep one"))
            said.add(text)


def got(node: Node) -> str:
    """A node in the words of a message."""
    if node.empty:
        return "nothing"
    return shorten(str(node))


def shortest(paths: list[str]) -> dict[str, str]:
    """Each path's shortest end that no other path has."""
    short = {}
    for path in paths:
        parts = path.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [other for other in paths if other != path]
        short[path] = next(
            (end for end in ends if not any(f".{o}".endswith(f".{end}") for o in others)), path
        )
    return short


def shown(path: Path) -> str:
    """A path as one would type it here."""
    return os.path.normpath(path).removeprefix(os.getcwd() + os.sep)


def is_file(path: Path) -> bool:
    """Whether there is such a file; no for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def nearest(path: Path) -> str:
    """The hint for a missing file: the nearest name in its folder, or what there is."""
    try:
        names = sorted(file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml"))
    except (OSError, ValueError):
        return f"there is no folder {shown(path.parent)}"
    if found := near(path.name, names):
        return f"did you mean {found}?"
    return f"{shown(path.parent)}/ has {', '.join(names)}" if names else ""
