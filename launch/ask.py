"""The command `python moe/generate.py CHECKPOINT`: a question, a conversation, or a file of questions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data.conversation import IMAGE
from launch.arguments import Parser, whole
from launch.asked import newest, opened
from launch.exits import INTERRUPTED, OK, USAGE
from launch.questions import answer_file, part
from moe.pictures import draw, shares


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer one question, or hold a conversation; 2 when it cannot be done, saying why, 130 after Ctrl-C."""
    parser = Parser(
        prog="python moe/generate.py",
        description="Ask a trained model about images.",
        epilog='example: python moe/generate.py runs/stage3_moe/run --image a.jpg "What is this?"',
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, help="a run folder, or one checkpoint in it")
    parser.add_argument("question", nargs="?", help="left out: a conversation, ended by an empty line")
    parser.add_argument("--image", type=Path, action="append", default=[], help="may be given several times")
    parser.add_argument(
        "--max-new-tokens", type=whole(1), default=256, metavar="N", help="tokens of an answer; default 256"
    )
    parser.add_argument("--template", default="", help="default: the one the run trained with")
    parser.add_argument(
        "--routing", type=Path, metavar="PNG", help="picture which experts the prompt went to"
    )
    file = parser.add_argument_group("a file of questions, answered as LLaVA's evaluation scripts do")
    file.add_argument("--questions", type=Path, metavar="FILE", help="JSON lines: question_id, text, image")
    file.add_argument(
        "--images", type=Path, metavar="FOLDER", help="of their pictures; default: the file's own"
    )
    file.add_argument(
        "--answers", type=Path, metavar="FILE", help="JSON lines; one begun before is gone on with"
    )
    file.add_argument("--append", default="", metavar="TEXT", help="a line after each question")
    file.add_argument(
        "--batch", type=whole(1), default=16, metavar="N", help="questions at a time; default 16"
    )
    file.add_argument(
        "--part", type=part, default=(1, 1), metavar="K/N", help="only the Kth of N parts of the file"
    )
    given = parser.parse_intermixed_args(arguments)  # options may stand before the question
    _check(parser, given)
    try:
        for image in given.image:  # before a large model is loaded
            if not image.is_file():
                what = "this is a folder, not a picture" if image.is_dir() else "there is no such file"
                raise ValueError(f"{image}: {what}")
        given.checkpoint = newest(given.checkpoint)
        if given.questions:
            answer_file(given)
        else:
            _converse(given)
    except BrokenPipeError:  # whoever reads has enough
        raise
    except (ValueError, RuntimeError, OSError) as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the shell's next prompt begins a line
        return INTERRUPTED
    return OK


def _check(parser: Parser, given: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if given.questions:
        if given.question or given.image or given.routing:
            parser.error("--questions asks what its file says: no question, --image or --routing beside it")
        if not given.answers:
            parser.error("--questions wants --answers FILE, where the answers go")
    elif given.answers or given.images or given.append or given.part != (1, 1):
        parser.error("--answers, --images, --append and --part go with --questions FILE")


def _converse(given: argparse.Namespace) -> None:
    model = opened(given.checkpoint, given.template)
    shown = model.shown([model.picture(path) for path in given.image])
    turns: list[dict[str, str]] = []
    question = given.question or _ask()
    while question:
        if given.image and IMAGE in question:
            wrong = f"leave {IMAGE} out of the question: the pictures named by --image stand before it"
            if given.question:
                raise ValueError(wrong)
            print(wrong, file=sys.stderr)
            question = _ask()
            continue
        text = f"{IMAGE}\n" * len(given.image) + question if not turns else question
        turns.append({"from": "human", "value": text})
        ids = model.prompt(turns, len(given.image))
        if given.routing:
            asked = torch.tensor([ids], device=model.device)
            draw(shares(model.vlm, asked, pixel_values=shown.to(model.device)), given.routing)
        [reply] = model.say([ids], [shown], given.max_new_tokens)
        print(reply, flush=True)
        if given.question:
            break
        turns.append({"from": "gpt", "value": reply})
        question = _ask()


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
