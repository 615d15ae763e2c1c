"""YAML text -> nodes with places, or what is wrong with the text; the only import of yaml.

PyYAML is asked for events only: its loaders keep the last of two equal keys, guess types and lose the lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import yaml

from launch.faults import Fault, Place, join, shorten

DEPTH = 50  # levels of nesting; deeper is an accident, and Python's own stack ends somewhere
BREAKS = re.compile("\r\n|[\r\n\x85\u2028\u2029]")  # PyYAML's line breaks, which are not str.splitlines's
# What PyYAML says -> what we say, the way out, and whether to point at what was left open (its context mark).
PROBLEMS = (
    ("'\\t' that cannot start", "a tab; YAML indents with spaces", "replace the tab by spaces", False),
    ("that cannot start any token", "this character cannot begin a value", "put the value in quotes", False),
    (
        "mapping values are not",
        "a ': ' where no setting can begin",
        "quote the text, or mend the indent",
        False,
    ),
    ("could not find expected ':'", "expected `key: value`", "write a colon and a space after the key", True),
    ("expected <block end>", "this does not line up with the lines above", "indent siblings alike", False),
    ("expected ',' or ']'", "this [ is not closed, or lacks a comma", "", True),
    ("expected ',' or '}'", "this { is not closed, or lacks a comma", "", True),
    ("found unexpected end of stream", "this quote is not closed", "", True),
    ("found unknown escape", "no such escape", "in double quotes a backslash is written twice", False),
    ("expected the node content", "expected a value here", "", False),
    ("nested more than", f"nested more than {DEPTH} levels deep", "", False),
    ("entries are not allowed", "a list cannot begin here", "put it on its own lines, or write [a]", False),
)


@dataclass(frozen=True)
class Node:
    """One value as written: a scalar's text, a list's items or a mapping's entries."""

    place: Place
    value: str | tuple[Node, ...] | dict[str, Node]
    key: Place | None = None  # where the mapping that holds it names it
    plain: bool = False  # a scalar without quotes; empty and plain: nothing was written
    whole: bool = False  # replaces a mapping it is laid over, instead of merging into it

    @property
    def empty(self) -> bool:
        """Whether nothing at all was written."""
        return self.plain and self.value == ""

    @property
    def told(self) -> Place:
        """The spot to point at: the value, or the name of a section."""
        return self.key if self.key and isinstance(self.value, dict) else self.place

    @property
    def entries(self) -> dict[str, Node]:
        """A mapping's entries; none where it is something else."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def items(self) -> tuple[Node, ...]:
        """A list's items; none where it is something else."""
        return self.value if isinstance(self.value, tuple) else ()

    def at(self, key: Place | None) -> Node:
        """The same value, named elsewhere."""
        return replace(self, key=key)

    def find(self, parts: tuple[str, ...]) -> tuple[Node, bool]:
        """The deepest node set on a path, and whether the path ends there. A key may have dots in it."""
        for n in range(len(parts), 0, -1):
            if (key := ".".join(parts[:n])) in self.entries:
                return self.entries[key].find(parts[n:])
        return self, not parts

    def __str__(self) -> str:
        """As written, in one line."""
        if isinstance(self.value, tuple):
            return f"[{', '.join(map(str, self.value))}]"
        if isinstance(self.value, dict):
            return "{" + ", ".join(f"{key}: {node}" for key, node in self.value.items()) + "}"
        return self.value


def merge(below: Node, above: Node) -> Node:
    """One tree laid over another: mappings key by key, all else replaced."""
    if not isinstance(below.value, dict) or not isinstance(above.value, dict) or above.whole:
        return above
    entries = dict(below.value)
    for key, node in above.value.items():
        entries[key] = merge(entries[key], node) if key in entries else node
    return Node(above.place, entries, above.key or below.key, whole=below.whole)


class Text:
    """A text to read; `argument` is (n, key) where it is the value of the command line's n-th `key=value`."""

    def __init__(
        self, text: str, file: str, faults: list[Fault], argument: tuple[int, str] | None = None
    ) -> None:
        self.text, self.file, self.faults, self.argument = text, file, faults, argument
        self.lines = BREAKS.split(text)
        self.events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)

    def read(self) -> Node | None:
        """The text's one document; None where it is empty, or broken and a fault tells of it."""
        try:
            next(self.events)
            if isinstance(event := next(self.events), yaml.StreamEndEvent):
                return None
            node = self._node(next(self.events), "")
            next(self.events)
            if isinstance(event := next(self.events), yaml.DocumentStartEvent):
                self._tell(event, "a second document begins here; a file is one", "delete the ---")
            return node
        except yaml.MarkedYAMLError as error:
            said = " ".join(filter(None, (error.context, error.problem)))
            other = ("", f"not YAML: {said}", "", False)
            _, message, hint, context = next((row for row in PROBLEMS if row[0] in said), other)
            mark = (error.context_mark if context else None) or error.problem_mark or error.context_mark
            place = self._place(mark.line, mark.column) if mark else self._place(0, 0)
            self.faults.append(Fault(place, message, hint))
        except yaml.reader.ReaderError as error:
            before = BREAKS.split(self.text[: error.position])
            name = f"U+{ord(self.text[error.position]):04X}"
            place = self._place(len(before) - 1, len(before[-1]))
            self.faults.append(Fault(place, f"the character {name} is not allowed in YAML", "delete it"))
        except (ValueError, OverflowError) as error:  # an escape, or a %YAML version, beyond all numbers
            self.faults.append(Fault(self._place(0, 0), f"not YAML: {error}"))
        return None

    def _place(self, line: int, col: int) -> Place:
        if self.argument:
            n, key = self.argument
            col = col if line == 0 else 0
            return Place(self.file, n, len(key) + 2 + col, f"{key}={' '.join(self.lines)}")
        return Place(self.file, line + 1, col + 1, self.lines[line] if line < len(self.lines) else "")

    def _at(self, event: Any) -> Place:
        return self._place(event.start_mark.line, event.start_mark.column)

    def _tell(self, event: Any, message: str, hint: str = "") -> None:
        self.faults.append(Fault(self._at(event), message, hint))

    def _node(self, event: Any, path: str, depth: int = 0) -> Node:
        if depth > DEPTH:
            problem = f"nested more than {DEPTH} levels deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            hint = "write the value out, or share it by inherits; if it is text, quote it"
            self._tell(event, f"*{event.anchor} is a YAML alias, which a spec does not have", hint)
            return Node(self._at(event), f"*{event.anchor}")
        if event.tag is not None:
            message = f"{shorten(event.tag)} is a YAML tag, which a spec does not have"
            self._tell(event, message, "leave it out; the setting knows its type")
        if isinstance(event, yaml.ScalarEvent):
            return Node(self._at(event), self._sound(event), plain=event.style is None)
        if isinstance(event, yaml.SequenceStartEvent):
            children = self._until(yaml.SequenceEndEvent)
            return Node(self._at(event), tuple(self._node(child, path, depth + 1) for child in children))
        entries: dict[str, Node] = {}
        for name in self._until(yaml.MappingEndEvent):
            key = str(self._node(name, path, depth + 1))
            value = self._node(next(self.events), join(path, key), depth + 1)
            if not isinstance(name, yaml.ScalarEvent):
                self._tell(name, "expected a name, got a list or a mapping")
            elif key == "":
                self._tell(name, "a setting without a name", "write `key: value`")
            elif key == "<<" and name.style is None:
                hint = "share settings by inherits"
                self._tell(name, "<< is a YAML merge key, which a spec does not have", hint)
            elif key in entries:
                first = entries[key].key or entries[key].place
                self._tell(name, f"{join(path, key)}: said twice, first in line {first.line}", "keep one")
            else:
                entries[key] = value.at(self._at(name))
        return Node(self._at(event), entries)

    def _until(self, end: type) -> Iterator[Any]:
        while not isinstance(event := next(self.events), end):
            yield event

    def _sound(self, event: yaml.ScalarEvent) -> str:
        """The scalar's text; JSON's surrogate pairs are joined, and half of one is no text."""
        if "\0" in event.value:  # from an escape; no path, variable or script can hold it
            self._tell(event, "the character U+0000 is in no setting", "delete the \\0")
            return "?"
        try:
            return event.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self._tell(event, "half of a character (a lone surrogate) is no text")
            return "?"
