"""`moe/generate.py CHECKPOINT --questions FILE`: a whole file of questions, answered in batches.

An answer is a line as the evaluation scripts of LLaVA and MoE-LLaVA write and score it (moellava/eval/
model_vqa_loader.py): question_id, prompt, text, answer_id, model_id, metadata. They are in the questions' order, and
whatever ends the command, the same one goes on behind the last whole line.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from data.bar import Bar
from data.images import ImageError
from data.questions import Asked, questions
from data.words import refused
from launch.asked import Model, opened, template_of
from launch.record import RunFolder

Row = dict[str, Any]
Ahead = tuple[Sequence[Asked], list[list[Future[Tensor]]]]


def part(text: str) -> tuple[int, int]:
    """K/N as two numbers, for argparse."""
    first, slash, of = text.partition("/")
    if slash and first.isdecimal() and of.isdecimal() and 1 <= int(first) <= int(of):
        return int(first), int(of)
    raise argparse.ArgumentTypeError(f"expected K/N, the Kth of N parts, got {text!r}")


def answer_file(given: argparse.Namespace) -> None:
    """Ask what has no answer yet. Raises ValueError and RuntimeError in words."""
    asked = questions(given.questions, given.images or given.questions.parent, given.append)
    which, parts = given.part
    asked = asked[len(asked) * (which - 1) // parts : len(asked) * which // parts]
    with _open(given.answers) as file:
        about = {
            "template": template_of(given.checkpoint, given.template),
            "max_new_tokens": given.max_new_tokens,
        }
        rows = [_row(question, _name(given.checkpoint), about) for question in asked]
        before = _kept(file, given.answers, rows)
        if before < len(rows):
            _ask(given, asked[before:], rows[before:], file)
    kept = f", {before} of them from before" if before else ""
    print(f"{len(asked)} answers in {given.answers}{kept}", flush=True)


def _ask(given: argparse.Namespace, asked: Sequence[Asked], rows: Sequence[Row], file: BinaryIO) -> None:
    model = opened(given.checkpoint, given.template)
    bar, done = Bar("questions"), 0
    try:
        for batch, coming in _read_ahead(model, asked, given.batch):
            prompts = [model.prompt(_turns(q), len(q.images)) for q in batch]
            shown = [model.shown(_pictures(q, some)) for q, some in zip(batch, coming, strict=True)]
            said = model.say(prompts, shown, given.max_new_tokens)
            fresh = zip(rows[done : done + len(batch)], said, strict=True)
            _add(file, given.answers, [row | {"text": text} for row, text in fresh])
            done += len(batch)
            bar.show(done, len(asked))
    except BaseException:
        bar.close()
        words = f"{len(asked) - done} questions are left; the same command goes on with them"
        print(words, file=sys.stderr)
        raise
    bar.close()


def _turns(question: Asked) -> list[dict[str, str]]:
    return [{"from": "human", "value": question.marked}]


def _name(checkpoint: Path) -> str:
    """The run's name and the step, wherever the folder lies."""
    run = checkpoint.resolve().parents[1]
    return f"{RunFolder(run).run.get('name', run.name)}/{checkpoint.name}"


def _row(question: Asked, model: str, about: Row) -> Row:
    key = json.dumps([question.id, question.marked, model, about])
    return {
        "question_id": question.id,
        "prompt": question.text,
        "text": "",
        "answer_id": hashlib.sha256(key.encode()).hexdigest()[:22],
        "model_id": model,
        "metadata": about,
    }


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The file of answers, for this process alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except FileExistsError:
        raise ValueError(f"{path.parent} is a file, not a folder") from None
    except OSError as error:
        raise ValueError(refused(error, path)) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{path} is being written by another process: give each its own --part and file"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield file


def _kept(file: BinaryIO, path: Path, rows: list[Row]) -> int:
    """How many answers are there already; what a kill or a full disk left of a line is cut off."""
    file.seek(0)
    whole, count = 0, 0
    for count, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            count -= 1
            break
        try:
            found = json.loads(line)
            found, said = {**found, "text": ""}, found["text"]
        except (ValueError, TypeError, KeyError):
            found, said = None, None
        if count > len(rows) or found != rows[count - 1] or not isinstance(said, str):
            raise ValueError(
                f"{path}, line {count}: not this command's answer to "
                + (
                    f"question {rows[count - 1]['question_id']}"
                    if count <= len(rows)
                    else "any of the questions"
                )
                + " (other questions, another part, model, template or --max-new-tokens): name another file"
            )
        whole += len(line)
    file.truncate(whole)
    return count


def _add(file: BinaryIO, path: Path, rows: list[Row]) -> None:
    try:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            file.close()  # with what it could not write
        raise ValueError(refused(error, path)) from None


def _read_ahead(model: Model, asked: Sequence[Asked], size: int) -> Iterator[Ahead]:
    """Batches whose pictures are being read while the batch before is answered."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        ahead: deque[Ahead] = deque()
        for start in range(0, len(asked), size):
            batch = asked[start : start + size]
            ahead.append((batch, [[pool.submit(model.picture, path) for path in q.images] for q in batch]))
            if len(ahead) > 1:
                yield ahead.popleft()
        yield from ahead


def _pictures(question: Asked, coming: list[Future[Tensor]]) -> list[Tensor]:
    try:
        return [each.result() for each in coming]
    except ImageError as error:
        raise ValueError(f"question {question.id}: {error}") from None
