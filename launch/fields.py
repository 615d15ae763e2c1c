"""Nodes -> frozen dataclasses: each value is read by the type of the field it is for, and by nothing else.

YAML's own typing is never asked: `2e-5` is a number because `lr` is one, and `name: no` stays "no".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from launch.faults import Fault, Place, did_you_mean, join, near, shorten
from launch.nodes import Node

# What was read without a fault, by its path and its node: the points of a sweep share most of their nodes.
Sound = dict[tuple[str, int], tuple[Node | None, Any]]
FAILED: Any = object()  # stands for a value whose fault has been told
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", object: "a value"}
PLURALS = {int: "whole numbers", float: "numbers", bool: "trues and falses", str: "texts", object: "values"}
INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
FLOAT = re.compile(r"[-+]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
# The scalars of YAML 1.2's core schema, for fields that take any value (yaml.org/spec/1.2.2, 10.3.2).
CORE_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None, ".nan": math.nan}


@cache
def types_of(cls: type) -> dict[str, Any]:
    """Field name -> type, in the order of the class."""
    types = get_type_hints(cls)
    return {field.name: types[field.name] for field in fields(cls)}


@cache
def settings_of(cls: type) -> tuple[tuple[str, Any, bool, bool], ...]:
    """(name, type, has a default, is a section) of every field."""
    return tuple(
        (
            field.name,
            types_of(cls)[field.name],
            field.default is not MISSING or field.default_factory is not MISSING,
            isinstance(hint := types_of(cls)[field.name], type) and is_dataclass(hint),
        )
        for field in fields(cls)
    )


@cache
def all_paths(cls: type, path: str = "") -> tuple[str, ...]:
    """Every setting's dotted path, sections included."""
    found: list[str] = []
    for name, hint in types_of(cls).items():
        found.append(join(path, name))
        if isinstance(hint, type) and is_dataclass(hint):
            found += all_paths(hint, join(path, name))
    return tuple(found)


def words(hint: Any) -> str:
    """What a field of this type expects."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(words(arg) for arg in args)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"a list of {'' if args[-1] is ... else f'{len(args)} '}{PLURALS.get(args[0], 'values')}"
    if origin is Mapping:
        return f"a mapping of names to {PLURALS.get(args[1], 'values')}"
    return "a section of settings" if is_dataclass(hint) else WORDS.get(hint, f"a {hint.__name__.lower()}")


def core(node: Node) -> Any:
    """A value for a field of any type, by YAML 1.2's core schema."""
    if isinstance(node.value, tuple):
        return [core(item) for item in node.value]
    if isinstance(node.value, dict):
        return {key: core(item) for key, item in node.value.items()}
    text = node.value
    if not node.plain:
        return text
    if text in (text.lower(), text.upper(), text.capitalize()) and text.lower() in CORE_WORDS:
        return CORE_WORDS[text.lower()]
    for pattern, read in (
        (r"[-+]?[0-9]{1,4000}", int),
        (r"0o[0-7]+", lambda t: int(t[2:], 8)),
        (r"0x[0-9a-fA-F]+", lambda t: int(t[2:], 16)),
        (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
        (r"[-+]?\.(inf|Inf|INF)", lambda t: float(t.replace(".", ""))),
    ):
        if re.fullmatch(pattern, text):
            return read(text)
    return text


class Typed:
    """Reads a tree into a dataclass and collects faults; one not `complete` may lack what is required."""

    def __init__(
        self,
        cls: type,
        faults: list[Fault],
        complete: bool,
        beside: Iterable[str] = (),
        sound: Sound | None = None,
    ) -> None:
        self.cls, self.faults, self.complete = cls, faults, complete
        self.sound: Sound = {} if sound is None else sound
        self.beside = list(beside)  # top-level keys that are read elsewhere, and may be misspelt too

    def read(self, root: Node) -> Any:
        """An instance of the class, or FAILED."""
        return self.section(self.cls, root, "", root.place)

    def tell(self, place: Place, message: str, hint: str = "") -> Any:
        self.faults.append(Fault(place, message, hint))
        return FAILED

    def wrong(self, hint: Any, node: Node, path: str, advice: str = "") -> Any:
        if node.empty:
            fix = {Mapping: ", or write {}", tuple: ", or write []"}.get(get_origin(hint) or hint, "")
            fix = ", or write ''" if hint is str else fix
            return self.tell(
                node.key or node.place,
                f"{path}: no value; expected {words(hint)}",
                f"leave the line out{fix}",
            )
        got = {tuple: "a list", dict: "a mapping"}.get(type(node.value)) or shorten(str(node.value))
        return self.tell(node.told, f"{path}: expected {words(hint)}, got {got}", advice)

    def section(self, cls: type, node: Node, path: str, above: Place) -> Any:
        """A dataclass from a mapping; `above` is told where the section itself is not written."""
        if not isinstance(node.value, dict):
            return self.wrong(cls, node, path)
        types, given = types_of(cls), {}
        meant = {self.unknown(cls, path, key, child) for key, child in node.value.items() if key not in types}
        sound = not meant
        for name, hint, has_default, is_section in settings_of(cls):
            where, child = join(path, name), node.value.get(name)
            if child is not None or is_section:
                kept = self.sound.get((where, id(child)))
                if kept is not None and kept[0] is child:
                    given[name] = kept[1]
                    continue
                told = len(self.faults)
                if is_section:
                    # A section that is left out is one with nothing in it: its defaults are checked all the same.
                    written = child or Node(node.key or above, {})
                    value = self.section(hint, written, where, node.key or above)
                else:
                    value = self.value(hint, node.value[name], where)
                if value is not FAILED:
                    given[name] = value
                    if len(self.faults) == told:
                        self.sound[where, id(child)] = (child, value)
                else:
                    sound = sound and is_section and has_default
            elif not has_default:
                sound = False
                if self.complete and name not in meant:
                    self.tell(node.key or above, f"{where}: missing", f"it is {words(hint)}")
        if not sound:
            return FAILED
        instance = cls(**given)
        # What only the sections together can know is asked when each is sound.
        if hasattr(instance, "check") and (path or not self.faults):
            for name, message, advice in instance.check():
                found, _ = node.find(tuple(name.split(".")))
                place = (node.key or above) if found is node else found.told
                last = name.rpartition(".")[2]
                if re.match(rf"{re.escape(name)}\b", message):
                    message = f"{path}.{message}" if path else message
                elif re.match(rf"{re.escape(last)}\b", message):
                    message = join(path, name)[: -len(last)] + message
                else:
                    message = f"{join(path, name)}: {message}"
                self.tell(place, message, advice)
        return instance

    def unknown(self, cls: type, path: str, key: str, node: Node) -> str:
        """Tell of a key that is no field; returns the one that was probably meant, if it is here."""
        here = [*types_of(cls), *(self.beside if not path else ())]
        elsewhere = [found for found in all_paths(self.cls) if found.rpartition(".")[2] == key]
        if "." in key and key in all_paths(self.cls):
            hint = f"in a file, write it as {key.replace('.', ': {')}: ...{'}' * key.count('.')}"
        elif elsewhere and near(key, here, cutoff=0.85) == "":
            hint = f"did you mean {elsewhere[0]!r}?"
        else:
            hint = did_you_mean(key, here, f"{path or 'the top level'} has {', '.join(here)}")
        self.tell(node.key or node.place, f"{join(path, key)}: no such setting", hint)
        return near(key, here)

    def value(self, hint: Any, node: Node, path: str) -> Any:
        """A field's value, or FAILED."""
        origin, args = get_origin(hint), get_args(hint)
        if hint is object:
            return core(node)
        if node.empty:
            return self.wrong(hint, node, path)
        if origin in (Union, UnionType):
            return self.union(hint, node, path)
        if origin is tuple:
            return self.items(hint, node, path)
        if origin is Mapping:
            if not isinstance(node.value, dict):
                return self.wrong(hint, node, path)
            entries = {key: self.value(args[1], item, join(path, key)) for key, item in node.value.items()}
            return FAILED if FAILED in entries.values() else entries
        if not isinstance(node.value, str):
            return self.wrong(hint, node, path)
        if origin is Literal:
            for choice in args:
                if node.value == str(choice):
                    return choice
            choices = [str(choice) for choice in args]
            message = f"{path}: {shorten(node.value)} is none of {', '.join(choices)}"
            return self.tell(node.place, message, did_you_mean(node.value, choices))
        if hasattr(hint, "parse"):
            try:
                return hint.parse(node.value)
            except ValueError as error:
                return self.tell(node.place, f"{path}: {error}")
        return self.scalar(hint, node, node.value, path)

    def scalar(self, hint: Any, node: Node, text: str, path: str) -> Any:
        if hint is str:
            return text
        if hint is bool:
            if text in ("true", "false"):
                return text == "true"
            yes = {"true": "true", "yes": "true", "on": "true", "1": "true"}
            no = {"false": "false", "no": "false", "off": "false", "0": "false"}
            meant = (yes | no).get(text.casefold())
            return self.wrong(hint, node, path, f"write {meant}" if meant else "")
        if hint is int:
            if len(text) < 20 and INT.fullmatch(text):
                return int(text)
            number = float(text) if FLOAT.fullmatch(text) else math.nan
            integral = abs(number) < 1e15 and number == int(number)
            return self.wrong(hint, node, path, f"write {int(number)}" if integral else "")
        if hint is float:
            if FLOAT.fullmatch(text) and math.isfinite(float(text)):
                return float(text)
            bare, unit = text.rstrip(" ,;%"), text.endswith("%")
            if not FLOAT.fullmatch(bare) or bare == text:
                return self.wrong(hint, node, path)
            return self.wrong(hint, node, path, f"write {float(bare) / 100:g}" if unit else f"write {bare}")
        raise TypeError(f"{path}: a spec cannot have fields of type {hint}")

    def union(self, hint: Any, node: Node, path: str) -> Any:
        """The first alternative that takes the value as it is written."""
        shape = {tuple: tuple, dict: Mapping}.get(type(node.value))
        fits = [arg for arg in get_args(hint) if (get_origin(arg) if shape else shape_of(arg)) is shape]
        for arg in fits:
            trial = Typed(self.cls, [], self.complete)
            if (value := trial.value(arg, node, path)) is not FAILED:
                return value
            if shape and len(fits) == 1:
                self.faults += trial.faults
                return FAILED
        return self.wrong(hint, node, path)

    def items(self, hint: Any, node: Node, path: str) -> Any:
        args = get_args(hint)
        if not isinstance(node.value, tuple):
            advice = f"write [{node.value}]" if isinstance(node.value, str) and args[-1] is ... else ""
            return self.wrong(hint, node, path, advice)
        if args[-1] is not ... and len(node.value) != len(args):
            return self.tell(node.place, f"{path}: expected {words(hint)}, got {len(node.value)}")
        types = args[:1] * len(node.value) if args[-1] is ... else args
        read = [
            self.value(kind, item, f"{path}[{n}]")
            for n, (kind, item) in enumerate(zip(types, node.value, strict=True))
        ]
        return FAILED if FAILED in read else tuple(read)


def shape_of(hint: Any) -> Any:
    """tuple or Mapping for what is written as a list or a mapping, None for a scalar."""
    return get_origin(hint) if get_origin(hint) in (tuple, Mapping) else None


def written(value: object) -> str:
    """A value as one would write it in a spec."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {written(item)}" for key, item in value.items()) + "}"
    return "null" if value is None else "''" if value == "" else str(value)


def leaves(instance: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every setting of an instance with its path, in the classes' order; a mapping entry by entry."""
    if is_dataclass(instance):
        for field in fields(instance):
            yield from leaves(getattr(instance, field.name), (*path, field.name))
    elif isinstance(instance, Mapping) and instance:
        for key, item in instance.items():
            yield from leaves(item, (*path, str(key)))
    else:
        yield path, written(instance)
