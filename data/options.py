"""The command line of the third door, data/prepare.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from data.catalog import GROUPS
from data.convert import CONVERTERS

Triple = tuple[float, float, float]
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # OpenAI's CLIP
# What the towers of the catalog's mission take: side, mean, std, how a picture becomes square.
FORMATS: dict[str, tuple[int, Triple, Triple, Literal["crop", "squash"]]] = {
    "clip-336": (336, *_CLIP, "crop"),
    "clip-224": (224, *_CLIP, "crop"),
    "siglip-384": (384, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash"),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(
        prog="python data/prepare.py",
        description="Prepare the folder of training data. COMMAND --help tells more of one.",
        epilog="exit codes: 0 all is well, 1 something is missing or would be lost, 2 the command is wrong",
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str, mix: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about)
        made.add_argument("--root", default="$DATA_ROOT", help="the folder of the data (default: $DATA_ROOT)")
        if mix:
            known = ", ".join(GROUPS)
            made.add_argument("mix", nargs="+", help=f"groups ({known}), data sets, or .json files")
        return made

    def reading(made: argparse.ArgumentParser, required: bool) -> None:
        made.add_argument("--tokenizer", type=Path, required=required, help="a folder with tokenizer.json")
        made.add_argument("--template", default="v1", help="conversation template (default: v1)")

    command("plan", "Say what to download, how large it is and where it goes.")
    made = command("unpack", "Unpack downloaded archives into the tree; goes on where it was stopped.")
    made.add_argument("--downloads", type=Path, help="where the archives are (default: the root)")
    made.add_argument("--delete", action="store_true", help="delete an archive once it is unpacked")
    made = command("check", "Read everything and report what would be lost; exit code 1 if anything.")
    reading(made, required=False)
    made.add_argument(
        "--max-length", type=_least(2), default=2048, help="tokens of a sequence (default: 2048)"
    )
    made.add_argument("--patches", type=_least(1), default=576, help="tokens of an image (default: 576)")
    made.add_argument("--no-pictures", action="store_true", help="do not open the pictures")
    made.add_argument("--workers", type=_least(1), default=os.cpu_count() or 1, help="threads that decode")
    made.add_argument("--out", type=Path, help="folder for check.json and check.html (default: ROOT/check)")
    made.add_argument("--fix", action="store_true", help="write NAME.fixed.json beside each file with losses")
    made = command("index", "Tokenise once for all runs; goes on where it was stopped.")
    reading(made, required=True)
    made = command(
        "pixels",
        "Scale all pictures once, so that training need not decode (338 KB each at 336); goes on where it was stopped.",
    )
    made.add_argument("--format", choices=[*FORMATS], default="clip-336", help="what the vision tower takes")
    made.add_argument(
        "--aspect", choices=["pad", "square"], default="pad", help="data.aspect of the runs (default: pad)"
    )
    made.add_argument("--workers", type=_least(1), default=os.cpu_count() or 1, help="threads that decode")
    made = command("convert", "Convert a publisher's own file into the annotation schema.", mix=False)
    made.add_argument("kind", choices=[*CONVERTERS, "mimic-it-pictures"], help="whose file it is")
    made.add_argument("source", type=Path, help="the publisher's file; for pictures MIMIC-IT's JSON of them")
    made.add_argument("--out", type=Path, required=True, help="the new file; for pictures the new folder")
    made.add_argument("--prefix", default="", help="folder under the root in which the pictures are")
    made.add_argument("--texts", type=Path, help="a file of its own for records without pictures")
    return whole


def _least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return int(text)

    return number
