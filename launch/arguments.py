"""An argument parser that tells of a slip as the rest does: what, and what was probably meant; exit code 2."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from launch.exits import USAGE
from launch.faults import did_you_mean, near


class Parser(argparse.ArgumentParser):
    """argparse without its page of usage before each error, and with the nearest name after it."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end."""
        hint = f"{self.prog} --help"
        if match := re.fullmatch(r"unrecognized arguments: (.*)", message):
            words = match[1].split()
            wrong = next((word for word in words if word.startswith("-")), words[0])
            known = [name.lstrip("-") for action in self._every() for name in action.option_strings]
            message = f"{wrong}: no such option" if wrong.startswith("-") else f"{match[1]}: one too many"
            if meant := near(wrong.partition("=")[0].lstrip("-"), [name for name in known if len(name) > 1]):
                hint = f"did you mean --{meant}?"
        elif match := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            choices = re.findall(r"[\w-]+", match[2])
            message = f"{match[1]!r} is none of {', '.join(choices)}"
            hint = did_you_mean(match[1], choices, hint)
        elif match := re.fullmatch(r"the following arguments are required: (.*)", message):
            message = f"{match[1]} is missing"
        message = message.removeprefix("argument ")
        print(f"error: {message}\n  hint: {hint}", file=sys.stderr)
        self.exit(USAGE)

    def _every(self) -> list[argparse.Action]:
        """The options of this parser and of its verbs."""
        found = list(self._actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [inner for verb in action.choices.values() for inner in verb._actions]
        return found


def whole(least: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` on."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
        return int(text)

    return read


def positive(text: str) -> float:
    """A number above 0; argparse shows what else is said."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (0 < number < math.inf):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number
