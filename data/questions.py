"""Questions for a trained model, from the files that the evaluation scripts of LLaVA and MoE-LLaVA ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from data.conversation import IMAGE, ConversationError
from data.indexing import pictures
from data.records import RecordError, stream
from data.sources import DataError
from data.words import is_text, kind_of, refused

TOLD = 10  # faults of a file that are told one by one


class Asked(NamedTuple):
    """One question: its id, its text as the file has it, and that text with a mark for each picture."""

    id: str | int
    text: str
    marked: str
    images: tuple[Path, ...]


def questions(path: Path, folder: Path, append: str = "") -> list[Asked]:
    """All questions of a JSON list or of JSON lines, in their order; `folder`: what the pictures' paths start from.

    A record has `question_id` or `id`, `text` or `conversations`, whose first human turn is asked then (as the
    reference's ScienceQA files), and perhaps `image`, a path or several. A text without a mark for its pictures is
    asked after them, as is one with a mark for its only picture, wherever that stands (moellava/eval/
    model_vqa_science.py). `append`: a line after each text. Raises DataError with all faults of the file, pictures
    that are not there among them.
    """
    found: list[Asked] = []
    faults: list[str] = []
    there: dict[Path, bool] = {}
    try:
        for record in stream(path):
            try:
                question = _question(record.value, folder, append)
            except ConversationError as error:
                faults.append(f"record {record.number}: {error}")
                continue
            found.append(question)
            for image in question.images:
                if image not in there:
                    there[image] = image.is_file()
                if not there[image]:
                    faults.append(f"record {record.number}, question {question.id}: there is no file {image}")
    except RecordError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise DataError(refused(error, path)) from None
    if faults:
        more = [f"and {len(faults) - TOLD} more"] if len(faults) > TOLD else []
        raise DataError("\n  ".join([f"{path} cannot be asked:", *faults[:TOLD], *more]))
    return found


def _question(value: Any, folder: Path, append: str) -> Asked:
    if not isinstance(value, dict):
        raise ConversationError(f"it is {kind_of(value)}, not an object")
    name = value.get("question_id", value.get("id"))
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ConversationError("it has no 'question_id', a text or a whole number")
    text = _text(value)
    if not is_text(text) or not text.strip():
        raise ConversationError("it has no 'text', nor 'conversations' with a human turn")
    images = pictures(value)
    marks = text.count(IMAGE)
    if marks not in (0, len(images)):
        raise ConversationError(f"its text has {marks} of {IMAGE}, and it names {len(images)} pictures")
    bare = text.replace(IMAGE, "").strip() if marks else text
    marked = text if marks > 1 else f"{IMAGE}\n" * len(images) + bare
    after = f"\n{append}" if append else ""
    return Asked(name, bare + after, marked + after, tuple(folder / image for image in images))


def _text(value: dict[str, Any]) -> Any:
    turns = value.get("conversations")
    if "text" in value or not isinstance(turns, list):
        return value.get("text")
    human = (turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") == "human")
    return next(human, None)
