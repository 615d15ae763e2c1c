"""Where a spec's data lie: its root, its annotation files, their indexes, texts and held-out questions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.catalog import CatalogError, annotation_path, resolve
from data.index import faults_of, fingerprint, open_index, pictures
from data.mixture import Source
from data.records import RecordError, stream
from data.spec import DataSpec
from data.templates import TEMPLATES


class DataError(ValueError):
    """Data that a run cannot train on; the message says what, where and what to do."""


@dataclass(frozen=True)
class Question:
    """A held-out question: turns up to the one to answer, and the answer that is expected."""

    image_paths: tuple[Path, ...]
    conversations: list[dict[str, str]]
    answer: str
    dataset: str


def texts(spec: DataSpec) -> Iterator[str]:
    """What a tokenizer is trained on: each turn of a mix, in the order of the files, then the templates' own words.

    The tokenizer goes from stage to stage; without the words that later stages put around every turn, it would
    spell them out, and more than half of each sequence would be those letters.
    """
    for annotation in annotations_of(spec, root_of(spec)):
        for record in stream(annotation[1]):
            if isinstance(record.value, dict):
                for turn in record.value.get("conversations") or []:
                    if isinstance(turn, dict) and isinstance(turn.get("value"), str):
                        yield turn["value"]
    for template in TEMPLATES.values():
        yield f"{template.system} {template.user}: {template.assistant}:"


def held_out(spec: DataSpec) -> list[Question]:
    """The held-out questions: of each record all turns before its last answer."""
    root = root_of(spec)
    try:
        path = annotation_path(root, spec.held_out)
        questions = []
        for record in stream(path):
            value = record.value
            if fault := faults_of(value):
                raise DataError(f"{path}, record {record.number}: {fault}")
            turns = value["conversations"]
            answers = [at for at, turn in enumerate(turns) if turn.get("from") == "gpt" and turn.get("value")]
            if not answers or not answers[-1]:
                raise DataError(
                    f"{path}, record {record.number}: a held-out record needs a question and an answer"
                )
            last = answers[-1]
            images = tuple(root / image for image in pictures(value))
            dataset = str(value.get("dataset", path.stem))
            questions.append(Question(images, turns[:last], turns[last]["value"], dataset))
    except (CatalogError, RecordError) as error:
        raise DataError(str(error)) from None
    return questions


def root_of(spec: DataSpec) -> Path:
    """The data's folder on this machine; DataError when it is not there."""
    root = os.path.expanduser(os.path.expandvars(spec.root))
    if "$" in root:
        raise DataError(
            f"data.root is {spec.root}, and that variable is not set here: export it, or name a folder"
        )
    if not Path(root).is_dir():
        raise DataError(f"data.root: there is no folder {root} on this machine")
    return Path(root)


def annotations_of(spec: DataSpec, root: Path) -> list[tuple[str, Path, float]]:
    """Name, annotation file and weight of each data set of the mix."""
    try:
        return [
            (dataset.name, annotation_path(root, dataset.annotation), weight)
            for dataset, weight in resolve(spec.mix)
        ]
    except CatalogError as error:
        raise DataError(str(error)) from None


def sources_of(spec: DataSpec, root: Path, tokenizer: Any) -> list[Source]:
    """The data sets of the mix, with their indexes; the first to ask builds them."""
    key = fingerprint(tokenizer, spec.template)
    sources = []
    for name, path, weight in annotations_of(spec, root):
        try:
            sources.append(Source(name, open_index(path, tokenizer, spec.template, key=key), weight))
        except (RecordError, OSError) as error:
            raise DataError(str(error)) from None
    return sources
