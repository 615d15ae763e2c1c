"""Every pitfall in tests/pitfalls.md names a test that is there, a fact that doctor tells, or says that it is open."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = TESTS / "pitfalls.md"
PITFALLS = 78


def rows(text: str) -> list[list[str]]:
    """The table's cells, line by line."""
    lines = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@cache
def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@cache
def facts() -> str:
    return (TESTS.parent / "launch" / "operating" / "consequences.py").read_text()


def fault(shown: str) -> str:
    """What is wrong with a row's last cell; empty when it is sound."""
    if shown == "open":
        return ""
    if match := re.fullmatch(r"doctor: `([\w ]+)`", shown):
        return "" if f'"{match[1]}"' in facts() else f"doctor tells no {match[1]}"
    if match := re.fullmatch(r"`([\w/]+\.py)::(test_\w+)`", shown):
        file = TESTS / match[1]
        there = file.is_file() and match[2] in names_in(file)
        return "" if there else f"tests/{match[1]} has no {match[2]}"
    return f"{shown!r} names neither a test nor a fact"


def test_each_pitfall_is_shown_to_be_handled_or_said_to_be_open() -> None:
    found = rows(TABLE.read_text())
    assert [int(row[0]) for row in found] == list(range(1, PITFALLS + 1))
    assert [row for row in found if len(row) != 4] == []
    assert [f"{row[0]}: {wrong}" for row in found if (wrong := fault(row[3]))] == []


def test_the_table_counts_what_is_open() -> None:
    text = TABLE.read_text()
    said = re.search(r"^open: (\d+)$", text, re.MULTILINE)
    assert said is not None
    assert int(said[1]) == sum(row[3] == "open" for row in rows(text))


def test_a_name_that_is_gone_is_found() -> None:
    assert fault("`slurm/test_facts.py::test_gone`") == "tests/slurm/test_facts.py has no test_gone"
    assert fault("`slurm/test_gone.py::test_x`") == "tests/slurm/test_gone.py has no test_x"
    assert fault("doctor: `MaxGone`") == "doctor tells no MaxGone"
    assert fault("doctor: `MaxArraySize`") == ""
    assert "names neither" in fault("somewhere")
