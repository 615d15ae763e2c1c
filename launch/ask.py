"""The command `python moe/generate.py CHECKPOINT --image a.jpg "question"`: model and data put together to answer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data.conversation import IMAGE, answer_end, prompt
from data.images import ImageFormat, load
from launch.arguments import Parser, whole
from launch.exits import INTERRUPTED, USAGE
from moe.generate import answer
from moe.interchange import open_checkpoint, run_spec
from moe.parallel import Groups
from moe.pictures import draw, shares
from moe.storage import CheckpointError, describe, found
from moe.vlm import VLM


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
    given = parser.parse_intermixed_args(arguments)  # options may stand before the question
    try:
        for image in given.image:  # before a large model is loaded
            if not image.is_file():
                what = "this is a folder, not a picture" if image.is_dir() else "there is no such file"
                raise ValueError(f"{image}: {what}")
        given.checkpoint = newest(given.checkpoint)
        return _converse(given)
    except BrokenPipeError:  # whoever reads has enough
        raise
    except (ValueError, RuntimeError, OSError) as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the shell's next prompt begins a line
        return INTERRUPTED


def newest(path: Path) -> Path:
    """The newest complete checkpoint of a run folder; any other folder as it is. ValueError where it has none."""
    if not (path / "spec.json").is_file():
        return path
    for checkpoint in found(path / "checkpoints"):
        try:
            describe(checkpoint.path)
        except CheckpointError:
            continue  # being written, or torn
        return checkpoint.path
    raise ValueError(f"{path} has no complete checkpoint; runs.py status says how far the run is")


def _converse(given: argparse.Namespace) -> int:
    vlm, tokenizer = open_checkpoint(given.checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vlm.to(device)
    said = run_spec(given.checkpoint).get("data", {})
    template = given.template or said.get("template", "v1")
    if template == "plain":
        template = "v1"  # stage align's own has no questions
    look = vlm.vision
    format = ImageFormat(look.size, look.mean, look.std, look.resize)
    empty = torch.empty(0, 3, look.size, look.size)
    pixels = [load(path, format, said.get("aspect", "pad"))[None] for path in given.image]
    shown = torch.cat(pixels) if pixels else empty
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
        ids = prompt(turns, tokenizer, template, has_image=bool(given.image))
        if given.routing:
            _picture(vlm, ids, shown.to(device), given.routing)
        most, end = given.max_new_tokens, answer_end(tokenizer, template)
        [reply] = answer(vlm, tokenizer, [ids], [shown], end=end, max_new_tokens=most, groups=Groups.single())
        print(reply, flush=True)
        if given.question:
            break
        turns.append({"from": "gpt", "value": reply})
        question = _ask()
    return 0


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _picture(vlm: VLM, ids: list[int], pixels: torch.Tensor, path: Path) -> None:
    draw(shares(vlm, torch.tensor([ids], device=pixels.device), pixel_values=pixels), path)
