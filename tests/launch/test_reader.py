"""The reader with sections of its own: every message, layers, sweeps, and texts that no one would write."""

from __future__ import annotations

import re
import string
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launch.faults import near
from launch.reader import Fault, Layers, Node, Place, SpecError


class Weight(int):
    """Grams, written with a unit."""

    @classmethod
    def parse(cls, text: str) -> Weight:
        if not re.fullmatch(r"[0-9]{1,6}g", text):
            raise ValueError(f"expected a weight such as 10g, got {text!r}")
        return cls(text[:-1])


@dataclass(frozen=True)
class Oven:
    heat: float = 180.0
    range: tuple[float, float] = (0.0, 250.0)

    def check(self) -> Iterator[tuple[str, str, str]]:
        if not self.range[0] <= self.heat <= self.range[1]:
            yield "heat", f"heat ({self.heat}) is out of range", "turn it down"


@dataclass(frozen=True)
class Dough:
    flour: Weight
    kind: Literal["rye", "wheat"] = "rye"
    minutes: int = 10
    proof: int | tuple[int, ...] = 1
    seeds: str | Mapping[str, float] = ""
    notes: tuple[str, ...] = ()
    sifted: bool = False
    extra: Mapping[str, object] = field(default_factory=dict)
    oven: Oven = field(default_factory=Oven)


@dataclass(frozen=True)
class Bread:
    name: str
    dough: Dough
    shop: Mapping[str, str] = field(default_factory=dict)
    loaves: int = 1

    def check(self) -> Iterator[tuple[str, str, str]]:
        if self.loaves * self.dough.minutes > 100:
            yield (
                "dough.minutes",
                f"dough.minutes ({self.dough.minutes}) times loaves is over 100",
                "bake fewer",
            )


SOUND = "name: a\ndough:\n  flour: 500g\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(**files: str) -> None:
    for name, text in files.items():
        path = Path(f"{name.replace('__', '/')}.yaml")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode("utf-8", "surrogateescape"))


def layers(text: str, *overrides: str) -> Layers:
    write(x=text)
    return Layers.read(Path("x.yaml"), overrides, presets={"shop": Path("shops")})


def load(text: str, *overrides: str) -> Bread:
    return layers(text, *overrides).build(Bread)


def told(text: str, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load(text, *overrides)
    return str(caught.value)


# ---- values are read by their field's type


@pytest.mark.parametrize(
    ("line", "path", "value"),
    [
        ("minutes: 1_0", "minutes", 10),
        ("minutes: -3", "minutes", -3),
        ('minutes: "7"', "minutes", 7),
        ("oven: {heat: 2e1}", "oven.heat", 20.0),
        ("oven: {heat: 1_00.5}", "oven.heat", 100.5),
        ("oven: {heat: .5}", "oven.heat", 0.5),
        ("oven: {heat: 5.}", "oven.heat", 5.0),
        ("oven: {range: [-1, 1e3]}", "oven.range", (-1.0, 1000.0)),
        ("sifted: true", "sifted", True),
        ("kind: wheat", "kind", "wheat"),
        ("proof: 3", "proof", 3),
        ("proof: [1, 2]", "proof", (1, 2)),
        ("proof: []", "proof", ()),
        ("seeds: no", "seeds", "no"),
        ("seeds: 1_0", "seeds", "1_0"),
        ("seeds: ''", "seeds", ""),
        ("seeds: {a: 1, b.c: 5e-1}", "seeds", {"a": 1.0, "b.c": 0.5}),
        ("notes: [no, 010, ~, 'a b']", "notes", ("no", "010", "~", "a b")),
        ('notes: ["\\ud83c\\udf5e"]', "notes", ("\N{BREAD}",)),
        ("notes:\n  - |\n    two\n    lines\n", "notes", ("two\nlines\n",)),
        ("extra: {a: 1, b: 1.5, c: true, d: ~, e: no, f: '1', g: [0x1F, 0o17], h: {i: -.inf}}", "extra", {
            "a": 1, "b": 1.5, "c": True, "d": None, "e": "no", "f": "1", "g": [31, 15],
            "h": {"i": float("-inf")},
        }),
        ("extra: {a: 010, b: 1e3, c: 2024-01-01, d: 1:30, e: 1_000, f: }", "extra", {
            "a": 10, "b": 1000.0, "c": "2024-01-01", "d": "1:30", "e": "1_000", "f": None,
        }),
    ],
)  # fmt: skip
def test_a_value_is_read_by_the_type_of_its_field(line: str, path: str, value: object) -> None:
    found: object = load(SOUND + "  " + line).dough
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_a_class_that_parses_its_text_is_asked_to() -> None:
    assert load(SOUND).dough.flour == 500


# ---- messages


MESSAGES = [
    ("  minutes: 5.0", "4:12: error: dough.minutes: expected a whole number, got '5.0'", "write 5"),
    ("  minutes: 5e3", "4:12: error: dough.minutes: expected a whole number, got '5e3'", "write 5000"),
    ("  minutes: 5.5", "4:12: error: dough.minutes: expected a whole number, got '5.5'", ""),
    ("  minutes: 010", "4:12: error: dough.minutes: expected a whole number, got '010'", "write 10"),
    ("  minutes: " + 30 * "9", f"4:12: error: dough.minutes: expected a whole number, got '{30 * '9'}'", ""),
    (
        "  minutes: " + 90 * "a",
        f"4:12: error: dough.minutes: expected a whole number, got '{57 * 'a'}...'",
        "",
    ),
    ("  minutes: [1]", "4:12: error: dough.minutes: expected a whole number, got a list", ""),
    ("  minutes: {a: 1}", "4:3: error: dough.minutes: expected a whole number, got a mapping", ""),
    ("  minutes:", "4:3: error: dough.minutes: no value; expected a whole number", "leave the line out"),
    ("  minutes: ~", "4:12: error: dough.minutes: expected a whole number, got '~'", ""),
    (
        "  seeds:",
        "4:3: error: dough.seeds: no value; expected text or a mapping of names to numbers",
        "leave the line",
    ),
    (
        "  notes:",
        "4:3: error: dough.notes: no value; expected a list of texts",
        "leave the line out, or write []",
    ),
    ("  extra:", "4:3: error: dough.extra: no value; expected a mapping of names to values", "or write {}"),
    ("  oven:", "4:3: error: dough.oven: no value; expected a section of settings", "leave the line out"),
    ("  oven: hot", "4:9: error: dough.oven: expected a section of settings, got 'hot'", ""),
    ("  oven: {heat: nan}", "4:16: error: dough.oven.heat: expected a number, got 'nan'", ""),
    ("  oven: {heat: 1e999}", "4:16: error: dough.oven.heat: expected a number, got '1e999'", ""),
    ("  oven: {heat: 50%}", "4:16: error: dough.oven.heat: expected a number, got '50%'", "write 0.5"),
    ("  oven: {heat: '9;'}", "4:16: error: dough.oven.heat: expected a number, got '9;'", "write 9"),
    ("  oven: {range: [1]}", "4:17: error: dough.oven.range: expected a list of 2 numbers, got 1", ""),
    ("  oven: {range: 1}", "4:17: error: dough.oven.range: expected a list of 2 numbers, got '1'", ""),
    ("  oven: {range: [1, x]}", "4:21: error: dough.oven.range[1]: expected a number, got 'x'", ""),
    ("  sifted: True", "4:11: error: dough.sifted: expected true or false, got 'True'", "write true"),
    ("  sifted: off", "4:11: error: dough.sifted: expected true or false, got 'off'", "write false"),
    ("  sifted: maybe", "4:11: error: dough.sifted: expected true or false, got 'maybe'", ""),
    ("  kind: Rye", "4:9: error: dough.kind: 'Rye' is none of rye, wheat", "did you mean 'rye'?"),
    ("  kind: oat", "4:9: error: dough.kind: 'oat' is none of rye, wheat", ""),
    (
        "  proof: 4x",
        "4:10: error: dough.proof: expected a whole number or a list of whole numbers, got '4x'",
        "",
    ),
    ("  proof: [1, 4x]", "4:14: error: dough.proof[1]: expected a whole number, got '4x'", ""),
    (
        "  proof: {a: 1}",
        "4:3: error: dough.proof: expected a whole number or a list of whole numbers, got a mapp",
        "",
    ),
    ("  seeds: {a: lots}", "4:14: error: dough.seeds.a: expected a number, got 'lots'", ""),
    (
        "  seeds: [a]",
        "4:10: error: dough.seeds: expected text or a mapping of names to numbers, got a list",
        "",
    ),
    ("  notes: salt", "4:10: error: dough.notes: expected a list of texts, got 'salt'", "write [salt]"),
    ("  notes: [[a]]", "4:11: error: dough.notes[0]: expected text, got a list", ""),
    ("  extra: 1", "4:10: error: dough.extra: expected a mapping of names to values, got '1'", ""),
    ("shop: {a: [b]}", "4:11: error: shop.a: expected text, got a list", ""),
    ("  flower: 1g", "4:3: error: dough.flower: no such setting", "did you mean 'flour'?"),
    ("  heat: 1", "4:3: error: dough.heat: no such setting", "did you mean 'dough.oven.heat'?"),
    (
        "  xyz: 1",
        "4:3: error: dough.xyz: no such setting",
        "dough has flour, kind, minutes, proof, seeds, notes, sifted",
    ),
    ("xyz: 1", "4:1: error: xyz: no such setting", "the top level has name, dough, shop, loaves"),
    ("inherit: x", "4:1: error: inherit: no such setting", "did you mean 'inherits'?"),
    ("dough.minutes: 1", "4:1: error: dough.minutes: no such setting", "write it as dough: {minutes: ...}"),
    ('"a\\nb": 1', "4:1: error: 'a\\nb': no such setting", "the top level has"),
    ("  oven: {heat: 900}", "4:16: error: dough.oven.heat (900.0) is out of range", "turn it down"),
    ("  minutes: 101", "4:12: error: dough.minutes (101) times loaves is over 100", "bake fewer"),
    ("loaves: 11", "2:1: error: dough.minutes (10) times loaves is over 100", "bake fewer"),
    ("  flour: 1g", "4:3: error: dough.flour: said twice, first in line 3", "keep one"),
    # The text is no YAML, or YAML that a spec does not have.
    ("\tloaves: 1", "4:1: error: a tab; YAML indents with spaces", "replace the tab by spaces"),
    (" loaves: 1", "4:2: error: this does not line up with the lines above", "indent siblings alike"),
    ("loaves 1", "4:1: error: expected `key: value`", "write a colon and a space after the key"),
    ("shop: @home", "4:7: error: this character cannot begin a value", "put the value in quotes"),
    ("shop: a: b", "4:8: error: a ': ' where no setting can begin", "quote the text, or mend the indent"),
    ("shop: - a", "4:7: error: a list cannot begin here", "put it on its own lines, or write [a]"),
    ("shop: [a", "4:7: error: this [ is not closed, or lacks a comma", ""),
    ("shop: {a: 1", "4:7: error: this { is not closed, or lacks a comma", ""),
    ("shop: [a}", "4:7: error: this [ is not closed, or lacks a comma", ""),
    ("shop: ]", "4:7: error: expected a value here", ""),
    ("shop: 'a", "4:7: error: this quote is not closed", ""),
    ('shop: "\\d"', "4:9: error: no such escape", "in double quotes a backslash is written twice"),
    ('shop: "\\UFFFFFFFF"', "1:1: error: not YAML: ", ""),
    ('shop: {a: "\\ud800"}', "4:11: error: half of a character (a lone surrogate) is no text", ""),
    ('shop: {a: "x\\0"}', "4:11: error: the character U+0000 is in no setting", "delete the \\0"),
    ("shop: {a: \x07}", "4:11: error: the character U+0007 is not allowed in YAML", "delete it"),
    ("shop: &a {}", "", ""),
    ("shop: {a: *b}", "4:11: error: *b is a YAML alias, which a spec does not have", "share it by inherits"),
    (
        "<<: {a: 1}",
        "4:1: error: << is a YAML merge key, which a spec does not have",
        "share settings by inherits",
    ),
    (
        "loaves: !!int 1",
        "4:9: error: 'tag:yaml.org,2002:int' is a YAML tag, which a spec does not have",
        "leave it",
    ),
    ("? [a]\n: 1", "4:3: error: expected a name, got a list or a mapping", ""),
    ("'': 1", "4:1: error: a setting without a name", "write `key: value`"),
    ("---\nname: b", "4:1: error: a second document begins here; a file is one", "delete the ---"),
    ("shop: " + 60 * "[", "4:57: error: nested more than 50 levels deep", ""),
]


@pytest.mark.parametrize(("line", "message", "hint"), MESSAGES, ids=[row[0].strip()[:24] for row in MESSAGES])
def test_what_is_wrong_is_told_once_with_its_place_and_a_way_out(line: str, message: str, hint: str) -> None:
    if not message:
        load(SOUND + line)
        return
    found = told(SOUND + line + "\n")
    assert len(re.findall("(?m)^x.yaml:.*error:", found)) == 1, found
    assert found.startswith(f"x.yaml:{message}"), found
    assert hint in found
    assert bool(hint) == ("= hint:" in found), found


EMPTY = "x.yaml: error: is empty\n      = hint: begin with `inherits:` and the file that it changes"
WHOLE = [
    ("", EMPTY),
    ("# only this\n", EMPTY),
    ("---\n", EMPTY),
    ("- a\n", "x.yaml:1:1: error: expected settings, `key: value`, got '[a]'\n    1 | - a\n      | ^"),
    ("hello\n", "x.yaml:1:1: error: expected settings, `key: value`, got 'hello'\n    1 | hello\n      | ^"),
    (
        "name: \udcff\n",
        "x.yaml: error: is not UTF-8 text: byte 0xff in line 1\n      = hint: save the file as UTF-8",
    ),
    (
        "\ufeffloaves: 1\nname: \udcfe\n",
        "x.yaml: error: is not UTF-8 text: byte 0xfe in line 2\n      = hint: save the file as UTF-8",
    ),
    ("dough: {flour: 1g}\n", "x.yaml: error: name: missing\n      = hint: it is text"),
    (
        "name: a\ndough: {minutes: 1}\n",
        "x.yaml:2:1: error: dough.flour: missing\n    2 | dough: {minutes: 1}\n      | ^\n"
        "      = hint: it is a weight",
    ),
    ("name: a\n", "x.yaml: error: dough.flour: missing\n      = hint: it is a weight"),
    (
        "name: a\ndough: {flour: 1kg}\n",
        "x.yaml:2:16: error: dough.flour: expected a weight such as 10g, got '1kg'\n"
        "    2 | dough: {flour: 1kg}\n      |                ^",
    ),
    # A misspelt name says it all: that the right one is missing goes without saying.
    (
        "nam: a\ndough: {flour: 1g}\n",
        "x.yaml:1:1: error: nam: no such setting\n    1 | nam: a\n      | ^\n"
        "      = hint: did you mean 'name'?",
    ),
]


@pytest.mark.parametrize(("text", "message"), WHOLE, ids=[repr(row[0])[:24] for row in WHOLE])
def test_what_is_wrong_with_a_whole_file_is_told_to_the_letter(text: str, message: str) -> None:
    assert told(text) == message


ARGUMENTS = [
    ("loaves", "<command line>:1:1: error: expected key=value, got 'loaves'"),
    ("=3", "<command line>:1:1: error: expected key=value, got '=3'"),
    ("a..b=3", "<command line>:1:1: error: expected key=value, got 'a..b=3'"),
    ("loaves=", "<command line>:1:1: error: loaves: expected a whole number, got ''"),
    ("loaves=#3", "<command line>:1:1: error: loaves: no value"),
    ("loaves=two", "<command line>:1:8: error: loaves: expected a whole number, got 'two'"),
    ("loaves=[", "<command line>:1:9: error: expected a value here"),
    ("dough={oven: {heat: x}}", "<command line>:1:21: error: dough.oven.heat: expected a number, got 'x'"),
    ("dough.ofen.heat=3", "<command line>:1:1: error: dough.ofen: no such setting"),
    ("loaves.more=3", "<command line>:1:1: error: loaves: expected a whole number, got a mapping"),
    ("inherits=y.yaml", "<command line>:1:1: error: inherits: a file says what it inherits"),
    ("shop=nowhere", "<command line>:1:6: error: shop: no preset 'nowhere'"),
    ("name=\udcff", "<command line>:1:1: error: is not UTF-8 text"),
]


@pytest.mark.parametrize(("argument", "message"), ARGUMENTS, ids=[ascii(row[0]) for row in ARGUMENTS])
def test_what_is_wrong_on_the_command_line_is_told_with_the_argument(argument: str, message: str) -> None:
    found = told(SOUND, argument)
    assert found.startswith(message)
    assert found.count("error:") == 1


# ---- layers


def test_layers_merge_mappings_and_replace_lists_and_scalars_weakest_first() -> None:
    write(
        base="name: base\nloaves: 2\ndough: {flour: 1g, minutes: 1, notes: [a, b], seeds: {x: 1, y: 1}}\n",
        other="loaves: 3\ndough: {minutes: 2}\n",
    )
    text = "inherits: [base.yaml, other.yaml]\ndough:\n  notes: [c]\n  seeds: {y: 2}\n"
    bread = load(text, "dough.oven.heat=200", "dough={sifted: true}")
    assert (bread.name, bread.loaves) == ("base", 3)
    assert (bread.dough.minutes, bread.dough.notes, bread.dough.sifted) == (2, ("c",), True)
    assert (bread.dough.seeds, bread.dough.oven.heat) == ({"x": 1.0, "y": 2.0}, 200.0)
    assert load("inherits: base.yaml\nname: own\n", "dough.seeds=none").dough.seeds == "none"


def test_a_section_given_on_the_command_line_lies_below_its_parts_in_any_order() -> None:
    for order in (
        ("dough.minutes=5", "dough={minutes: 4, proof: 2}"),
        ("dough={minutes: 4, proof: 2}", "dough.minutes=5"),
    ):
        dough = load(SOUND, *order).dough
        assert (dough.minutes, dough.proof) == (5, 2)


def test_the_same_setting_twice_on_the_command_line_is_a_fault() -> None:
    assert told(SOUND, "loaves=1", "loaves=2") == (
        "<command line>:2:1: error: loaves: said twice\n    2 | loaves=2\n      | ^\n      = hint: keep one"
    )


def test_inherited_files_are_found_beside_the_file_that_names_them_then_in_the_search_path() -> None:
    write(sub__a="inherits: b.yaml\nname: a\n", sub__b="inherits: ../x.yaml\n", x=SOUND, far__c=SOUND)
    assert Layers.read(Path("sub/a.yaml")).build(Bread).name == "a"
    assert Layers.read(Path("sub/a.yaml")).files == ("sub/a.yaml", "sub/b.yaml", "x.yaml")
    write(y="inherits: c.yaml\n")
    assert Layers.read(Path("y.yaml"), search=[Path("far")]).build(Bread).dough.flour == 500


def test_two_parents_may_share_theirs() -> None:
    write(base=SOUND, a="inherits: base.yaml\nloaves: 2\n", b="inherits: base.yaml\nname: b\n")
    assert load("inherits: [a.yaml, b.yaml]\n").name == "b"


NO_FILE = "which is not a file"
IN_TURN = "which inherits it in turn:"
INHERITS = [
    ("bse.yaml", f"x.yaml:1:11: error: inherits bse.yaml, {NO_FILE}", "did you mean base.yaml?"),
    ("q/base.yaml", f"x.yaml:1:11: error: inherits q/base.yaml, {NO_FILE}", "there is no folder q"),
    ("zzz", f"x.yaml:1:11: error: inherits zzz, {NO_FILE}", "./ has base.yaml, loop.yaml, x.yaml"),
    ("x.yaml", f"x.yaml:1:11: error: inherits x.yaml, {IN_TURN} x.yaml -> x.yaml", "drop one"),
    (
        "loop.yaml",
        f"loop.yaml:1:11: error: inherits x.yaml, {IN_TURN} x.yaml -> loop.yaml -> x.yaml",
        "drop one",
    ),
    ("", "x.yaml:1:10: error: inherits: expected a file or a list of files", ""),
    ("{a: b}", "x.yaml:1:1: error: inherits: expected a file or a list of files, got a mapping", ""),
    ("[[a]]", "x.yaml:1:12: error: inherits: expected a file or a list of files", ""),
]


@pytest.mark.parametrize(("line", "message", "hint"), INHERITS, ids=[row[0] or "nothing" for row in INHERITS])
def test_what_is_wrong_with_inheriting_is_told_and_nothing_that_follows_from_it(
    line: str, message: str, hint: str
) -> None:
    write(base=SOUND, loop="inherits: x.yaml\n")
    found = told(f"inherits: {line}".strip() + "\nloaves: many\n")
    assert message in found
    assert hint in found
    # The rest of the file is still read; what is missing may stand in the file that is missing.
    assert "x.yaml:2:9: error: loaves: expected a whole number, got 'many'" in found
    assert found.count("error:") == 2 or "expected a file" in message


def test_a_broken_inherited_file_is_told_with_its_own_places() -> None:
    write(base="name: [\n")
    assert told("inherits: base.yaml\n").startswith("base.yaml:2:1: error: expected a value here")


def test_a_missing_file_is_told_with_the_nearest_one() -> None:
    write(stage3_moe=SOUND)
    for path, message in (
        (
            "stage3_moe.yml",
            "error: stage3_moe.yml: no such experiment\n  hint: did you mean stage3_moe.yaml?",
        ),
        ("q.yaml", "error: q.yaml: no such experiment\n  hint: ./ has stage3_moe.yaml"),
        ("no/q.yaml", "error: no/q.yaml: no such experiment\n  hint: there is no folder no"),
        (".", "error: .: is a folder\n  hint: ./ has stage3_moe.yaml"),
        ("a\0b", "error: a?b: no such experiment\n  hint: ./ has stage3_moe.yaml"),
    ):
        with pytest.raises(SpecError) as caught:
            Layers.read(Path(path))
        assert str(caught.value) == message


def test_a_preset_s_name_stands_for_its_file_and_a_mapping_changes_it() -> None:
    write(shops__corner="street: High\ncity: Ulm\n", shops__big="inherits: corner.yaml\ncity: Bonn\n")
    assert load(SOUND + "shop: corner\n").shop == {"name": "corner", "street": "High", "city": "Ulm"}
    assert load(SOUND + "shop: big\n").shop == {"name": "big", "street": "High", "city": "Bonn"}
    write(base=SOUND + "shop: corner\n")
    assert load("inherits: base.yaml\nshop: {street: Low}\n").shop["city"] == "Ulm"
    # A name replaces all that an inherited file said, also of another preset.
    write(base=SOUND + "shop: {door: red}\n")
    assert "door" not in load("inherits: base.yaml\nshop: corner\n").shop
    assert load(SOUND + "shop: corner\n", "shop.city=Rom", "shop=big").shop["city"] == "Rom"


def test_a_preset_that_is_not_there_is_told_with_those_that_are() -> None:
    write(shops__corner="street: High\n", shops__mall="street: Low\n")
    assert told(SOUND + "shop: conner\n") == (
        "x.yaml:4:7: error: shop: no preset 'conner'\n    4 | shop: conner\n      |       ^\n"
        "      = hint: did you mean 'corner'? shops/ has corner, mall"
    )


def test_every_value_knows_its_place_and_explains_itself() -> None:
    write(base=SOUND + "loaves: 2\n", shops__corner="street: High\n")
    read = layers("inherits: base.yaml\nshop: corner\ndough:\n  seeds: {a.b: 1}\n", "dough.oven.heat=99")
    assert read.origin("loaves") == Place("base.yaml", 4, 9, "loaves: 2")
    assert str(read.origin("dough.oven.heat")) == "<command line>"
    assert str(read.origin("dough.seeds.a.b")) == "x.yaml:4"
    assert str(read.origin("dough.minutes")) == "default"
    assert str(read.origin("nothing.at.all")) == "default"
    assert read.explain(read.build(Bread)) == [
        ("name", "a", "base.yaml:1"),
        ("dough.flour", "500", "base.yaml:3"),
        ("dough.kind", "rye", "default"),
        ("dough.minutes", "10", "default"),
        ("dough.proof", "1", "default"),
        ("dough.seeds.a.b", "1.0", "x.yaml:4"),
        ("dough.notes", "[]", "default"),
        ("dough.sifted", "false", "default"),
        ("dough.extra", "{}", "default"),
        ("dough.oven.heat", "99.0", "<command line>"),
        ("dough.oven.range", "[0.0, 250.0]", "default"),
        ("shop.name", "corner", "x.yaml:2"),
        ("shop.street", "High", "shops/corner.yaml:1"),
        ("loaves", "2", "base.yaml:4"),
    ]


def test_what_a_default_is_wrong_with_points_at_the_strongest_mention_of_its_section() -> None:
    write(base=SOUND + "  oven: {range: [0, 9]}\n")
    assert told("inherits: base.yaml\n").startswith(
        "base.yaml:4:3: error: dough.oven.heat (180.0) is out of range"
    )
    own = "inherits: base.yaml\ndough:\n  oven: {range: [0, 8]}\n"
    assert told(own).startswith("x.yaml:3:3: error: dough.oven.heat (180.0) is out of range")


def test_layers_do_not_change_each_other() -> None:
    one = layers(SOUND + "loaves: 2\n")
    two = one.override([])
    assert one.pop("loaves") is not None
    assert (one.build(Bread).loaves, two.build(Bread).loaves) == (1, 2)
    assert two.override(["loaves=3"]).build(Bread).loaves == 3
    assert two.build(Bread).loaves == 2


def test_faults_come_file_by_file_the_experiment_s_own_first_and_the_command_line_last() -> None:
    write(base="name: a\ndough: {flour: x, minutes: y}\n")
    found = told("inherits: base.yaml\nloaves: z\n", "dough.proof=q", "dough.sifted=r")
    assert re.findall("(?m)^(.*): error", found) == [
        "x.yaml:2:9",
        "base.yaml:2:16",
        "base.yaml:2:28",
        "<command line>:1:13",
        "<command line>:2:14",
    ]


def test_equal_faults_are_told_once_and_stay_apart_from_others() -> None:
    fault, other = Fault(Place("a", 2, 1, "x"), "m"), Fault(None, "n", "h")
    assert SpecError([fault, other, fault]).faults in ((fault, other), (other, fault))


def test_a_broken_line_cannot_move_the_terminal_s_cursor() -> None:
    fault = Fault(Place("a", 1, 3, "\ta\x1b[2J\u2028"), "b\nc", "d\x07")
    assert str(fault) == "a:1:3: error: b?c\n    1 | \ta?[2J?\n      | \t ^\n      = hint: d?"


# ---- sweeps


def points(text: str, *overrides: str) -> list[tuple[str, Bread]]:
    read = layers(SOUND + text, *overrides)
    sweep = read.pop("sweep")
    assert sweep is not None
    return [(name, read.override(changes).build(Bread)) for name, changes in read.expand(sweep)]


def test_a_sweep_s_points_are_named_as_written_the_last_axis_fastest() -> None:
    found = points("sweep:\n  dough.oven.heat: [1e2, 2e2]\n  loaves: [1, 2]\n")
    assert [name for name, _ in found] == [
        "heat=1e2,loaves=1",
        "heat=1e2,loaves=2",
        "heat=2e2,loaves=1",
        "heat=2e2,loaves=2",
    ]
    assert [(bread.dough.oven.heat, bread.loaves) for _, bread in found] == [
        (100, 1),
        (100, 2),
        (200, 1),
        (200, 2),
    ]


def test_axes_may_be_nested_come_from_the_command_line_and_keep_apart() -> None:
    found = points(
        "sweep: {dough: {minutes: [1, 2]}}\n", "sweep.dough.minutes=[3]", "sweep.dough.proof=[[1, 2], 4]"
    )
    assert [name for name, _ in found] == ["minutes=3,proof=1_2", "minutes=3,proof=4"]
    names = [name for name, _ in points("sweep: {name: [a/b], shop.name: ['c d']}\n")]
    assert names == ["name=a_b,shop.name=c_d"] or names == ["name=a_b,name=c_d"]


def test_a_point_s_values_know_the_line_of_the_sweep() -> None:
    read = layers(SOUND + "sweep:\n  loaves: [1, 2]\n")
    sweep = read.pop("sweep")
    assert sweep is not None
    (_, changes), _ = read.expand(sweep)
    assert str(read.override(changes).origin("loaves")) == "x.yaml:5"
    assert read.place_of(changes[0][1]) == Place("x.yaml", 5, 3, "  loaves: [1, 2]")
    assert read.pop("sweep") is None


SWEEPS = [
    ("sweep: 3", "x.yaml:4:8: error: sweep: expected settings with lists of values, got '3'"),
    ("sweep: {}", "x.yaml:4:1: error: sweep: expected settings with lists of values, got '{}'"),
    ("sweep:", "x.yaml:4:7: error: sweep: expected settings with lists of values, got nothing"),
    ("sweep: {loaves: 3}", "x.yaml:4:17: error: sweep.loaves: expected a list of values, got '3'"),
    ("sweep: {loaves: []}", "x.yaml:4:17: error: sweep.loaves: expected a list of values, got '[]'"),
    ("sweep: {loaves: [1, 2, 1]}", "x.yaml:4:24: error: sweep.loaves: 1 is said twice"),
    ("sweep: {name: [a/b, a+b, 'a:b']}", "x.yaml:4:1: error: sweep: two points would have the name name=a_b"),
    (f"sweep: {{name: [{300 * 'a'}]}}", "x.yaml:4:1: error: sweep: too long for a folder's name: name=aaa"),
    ("sweep: {leaves: [1, 2]}", "x.yaml:4:9: error: leaves: no such setting"),
    ("sweep: {loaves: [1, many]}", "x.yaml:4:21: error: loaves: expected a whole number, got 'many'"),
]


@pytest.mark.parametrize(("line", "message"), SWEEPS, ids=[row[0][:28] for row in SWEEPS])
def test_what_is_wrong_with_a_sweep_is_told_with_its_place(line: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        points(line + "\n")
    assert str(caught.value).startswith(message)


# ---- near names


@pytest.mark.parametrize(
    ("word", "choice"),
    [
        ("topk", "top_k"),
        ("TOP-K", "top_k"),
        ("learning_rate", "lr"),
        ("wd", "weight_decay"),
        ("capacity", "capacity_factor"),
        ("wieght_decay", "weight_decay"),
        ("qqq", ""),
        ("", ""),
    ],
)
def test_near_finds_what_was_meant(word: str, choice: str) -> None:
    assert near(word, ["min_capacity", "capacity_factor", "top_k", "lr", "weight_decay"]) == choice


def test_a_field_that_no_text_can_fill_is_the_programmer_s_fault() -> None:
    @dataclass(frozen=True)
    class Odd:
        when: complex = 0j

    write(x="when: 1\n")
    with pytest.raises(TypeError, match="when: a spec cannot have fields of type"):
        Layers.read(Path("x.yaml")).build(Odd)


# ---- texts that no one would write

SIGNS = [*":-[]{}#&*!|>'\"%@`,?~\\ \n\t\x85\u2028\ufeff\x00\u20ac"]
WORDS = [
    "<<",
    "...",
    "---",
    "%YAML 9.9",
    "!!int",
    "\\U0000",
    '"\\ud800"',
    '"\\UFFFFFFFF"',
    "1e999",
    40 * "9",
    "x: &x *x",
]
LINES = [
    "inherits: x.yaml\n",
    "dough:\n  ",
    "sweep:",
    "shop: corner\n",
    "name: a\n",
    "flour: 5g",
    "seeds: {a: 1e9}",
]
PIECES = st.sampled_from([*SIGNS, *WORDS, *LINES, "loaves: "])
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(PIECES | st.text(string.printable, max_size=4), max_size=20).map("".join),
    st.tuples(st.integers(0, len(SOUND)), PIECES, st.integers(0, 9)).map(
        lambda cut: SOUND[: cut[0]] + cut[1] + SOUND[cut[0] + cut[2] :]
    ),
    st.binary(max_size=30).map(lambda data: data.decode("utf-8", "surrogateescape")),
)


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(TEXTS, st.lists(TEXTS.map(lambda text: "loaves=" + text) | st.text(max_size=9), max_size=2))
@example("a: " + 5000 * "[", [])
@example("%YAML 1." + 5000 * "9" + "\n--- a", [])
@example("\ud800", ["\ud800"])
def test_whatever_is_written_is_read_or_told_to_be_wrong(text: str, overrides: list[str]) -> None:
    def attempt() -> str:
        try:
            Path("x.yaml").write_bytes(
                text.encode("utf-8", "surrogateescape" if "\ud800" not in text else "replace")
            )
            read = Layers.read(Path("x.yaml"), overrides, presets={"shop": Path("shops")})
            sweep = read.pop("sweep")
            if sweep is not None:
                read.expand(sweep)
            return repr(read.explain(read.build(Bread)))
        except SpecError as error:
            return str(error)

    found = attempt()
    found.encode()  # a terminal can show it
    assert attempt() == found
    assert found


def test_reading_takes_milliseconds() -> None:
    base = "".join(f"# {n}\n" for n in range(20)) + SOUND
    write(base=base, other="loaves: 3\n", shops__corner="street: High\n")
    times = []
    for _ in range(5):
        start = time.process_time()
        layers("inherits: [base.yaml, other.yaml]\nshop: corner\n" + "# x\n" * 20, "loaves=4").build(Bread)
        times.append(time.process_time() - start)
    assert min(times) < 0.05


def test_a_node_shows_as_it_was_written() -> None:
    place = Place("a", 1, 1, "")
    node = Node(place, {"a": Node(place, (Node(place, "1"), Node(place, "x")))})
    assert str(node) == "{a: [1, x]}"
