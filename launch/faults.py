"""What was written where, and what is wrong with it: the words in which a bad spec is told.

A fault points at the value as written, in the file it was written in, also when another file inherits it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

from launch.redact import PLANTED, redact_text

COMMAND_LINE = "<command line>"
WIDEST = 200  # characters of a line that are shown
# What would move a terminal's cursor, or end the line.
UNPRINTABLE = re.compile("[^\t\x20-\x7e\xa0-\u2027\u202f-\U0010ffff]")


@dataclass(frozen=True)
class Place:
    """A spot in a file, or in the n-th `key=value` of the command line; line 0 is the file as a whole."""

    file: str
    line: int = 0
    col: int = 0
    text: str = ""  # the source line

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line and self.file != COMMAND_LINE else self.file


DEFAULT = Place("default")


@dataclass(frozen=True)
class Fault:
    """One thing wrong: what, where, and if one is known a way out."""

    place: Place | None
    message: str
    hint: str = ""

    def __str__(self) -> str:
        at, message, hint = self.place, UNPRINTABLE.sub("?", self.message), UNPRINTABLE.sub("?", self.hint)
        if at is None:
            return f"error: {message}" + (f"\n  hint: {hint}" if hint else "")
        where = f"{at.file}:{at.line}:{at.col}" if at.line else at.file
        lines = [f"{where}: error: {message}"]
        if at.line and at.text and PLANTED not in message:  # its line is the last thing to show
            text, col = _around(
                redact_text(UNPRINTABLE.sub("?", at.text)), at.col
            )  # what is shown may end in a log
            under = re.sub(r"[^\t]", " ", text[: col - 1])
            lines += [f"{at.line:5} | {text}", f"      | {under}^"]
        if hint:
            lines.append(f"      = hint: {hint}")
        return "\n".join(lines)


class SpecError(Exception):
    """All faults of a spec, file by file in the order they stand there, each once; the command line last."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        once = list(dict.fromkeys(faults))
        files = list(dict.fromkeys(fault.place.file if fault.place else "" for fault in once))

        def order(fault: Fault) -> tuple[bool, int, int, int]:
            at = fault.place or Place("")
            return at.file == COMMAND_LINE, files.index(at.file), at.line, at.col

        self.faults: tuple[Fault, ...] = tuple(sorted(once, key=order))
        super().__init__("\n".join(map(str, self.faults)))


def _around(text: str, col: int) -> tuple[str, int]:
    """As much of a line as can be read, and where its column is in that."""
    if len(text) <= WIDEST:
        return text, col
    start = max(0, min(col - WIDEST // 2, len(text) - WIDEST))
    before, after = "..." * (start > 0), "..." * (start + WIDEST < len(text))
    return f"{before}{text[start : start + WIDEST]}{after}", col - start + len(before)


@lru_cache(maxsize=4096)
def join(path: str, key: str) -> str:
    """A dotted path; a key that would not read as one word is quoted."""
    key = key if re.fullmatch(r"[\w./+-]+", key) else repr(key)
    return f"{path}.{key}" if path else key


def shorten(text: str) -> str:
    """Text quoted for a message, cut where it is long."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def near(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """The choice probably meant: equal but for case and hyphens, by initials (lr), begun, or alike."""

    def bare(name: str) -> str:
        return re.sub(r"[\W_]", "", name).casefold()

    def initials(name: str) -> str:
        return "".join(part[0] for part in re.split(r"[\W_]+", name.casefold()) if part)

    choices = list(choices)
    for choice in choices:
        if bare(choice) == bare(word):
            return choice
    for choice in choices:
        if initials(choice) == word.casefold() != "" or (len(choice) > 1 and initials(word) == choice):
            return choice
    for choice in choices:
        if len(word) > 3 and bare(choice).startswith(bare(word)):
            return choice
    folded = {choice.casefold(): choice for choice in choices}
    found = get_close_matches(word.casefold(), folded, n=1, cutoff=cutoff)
    return folded[found[0]] if found else ""


def did_you_mean(word: str, choices: Iterable[str], otherwise: str = "") -> str:
    """The hint for a word that is none of the choices."""
    found = near(word, choices)
    return f"did you mean {found!r}?" if found else otherwise
