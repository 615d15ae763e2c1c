"""Repair a record where that is safe, else drop it; and a checked file, record by record."""

from __future__ import annotations

import copy
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.checking import Report
from data.conversation import IMAGE, TEMPLATES, Template
from data.convert import write
from data.findings import KINDS
from data.inspection import broken, defects, paths_of
from data.records import stream

_ROLES = {"user": "human", "assistant": "gpt", "human": "human", "gpt": "gpt", "bot": "gpt", "chatgpt": "gpt"}


def repair(record: Any, kinds: list[str], template: Template) -> tuple[dict[str, Any] | None, list[str]]:
    """The record as it should be, or None to drop it; and what was done, a word an action.

    A record without findings comes back as it is. After repairs it is looked at again: what is still lost is
    dropped.
    """
    if not any(KINDS[kind].fix for kind in kinds):
        return record, []
    if any(kind.startswith("image-") and KINDS[kind].fix and KINDS[kind].lost for kind in kinds):
        return None, ["dropped"]
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        return None, ["dropped"]
    fixed, done = copy.deepcopy(record), []
    turns = fixed["conversations"]
    if "role-unknown" in kinds and all(isinstance(turn, dict) for turn in turns):
        for turn in turns:
            turn["from"] = _ROLES.get(str(turn.get("from")).lower(), turn.get("from"))
        done.append("renamed roles")
    if broken(fixed, template) is not None:
        return None, ["dropped"]
    if template.style != "plain":
        done += _trimmed(fixed)
    turns = fixed["conversations"]
    if paths_of(fixed) and turns and not any(IMAGE in turn["value"] for turn in turns):
        turns[0]["value"] = f"{IMAGE}\n" * len(paths_of(fixed)) + turns[0]["value"]
        done.append("put <image> in front")
    if not turns or "question-too-long" in kinds or "encoding" in kinds:
        return None, ["dropped"]
    if any(KINDS[kind].lost for kind, _ in defects(fixed, template, [])):
        return None, ["dropped"]
    return fixed, done


def _trimmed(record: dict[str, Any]) -> list[str]:
    """Remove leading answers, trailing questions and rounds without an answer; strip answers."""
    turns, done = record["conversations"], []
    if turns and turns[0]["from"] == "gpt" and IMAGE not in turns[0]["value"]:
        del turns[0]
        done.append("removed a leading answer")
    if turns and turns[-1]["from"] == "human" and IMAGE not in turns[-1]["value"]:
        del turns[-1]
        done.append("removed a trailing question")
    for at in range(len(turns) - 1, 0, -1):
        if (
            turns[at]["from"] == "gpt"
            and not turns[at]["value"].strip()
            and IMAGE not in turns[at - 1]["value"]
        ):
            del turns[at - 1 : at + 1]
            done.append("removed a round without an answer")
    for turn in turns:
        if turn["from"] == "gpt" and turn["value"] != turn["value"].strip():
            turn["value"] = turn["value"].strip()
            done.append("stripped an answer")
    return done


def fix(report: Report, path: Path, out: Path) -> Counter[str]:
    """Write a file's records without what would be lost, repaired where that is safe; what was done, counted.

    Raises FileExistsError rather than writing over a file.
    """
    names = list(KINDS)
    records, kinds = array("I"), array("B")
    for finding in report.findings:
        if finding.file == str(path) and finding.record >= 0 and KINDS[finding.kind].fix:
            records.append(finding.record)
            kinds.append(names.index(finding.kind))
    order = np.argsort(np.array(records), kind="stable").tolist()
    done: Counter[str] = Counter()

    def repaired() -> Iterator[dict[str, Any]]:
        at = 0
        for record in stream(path):
            told = []
            while at < len(order) and records[order[at]] == record.number:
                told.append(names[kinds[order[at]]])
                at += 1
            value, what = repair(record.value, told, TEMPLATES[report.options.template])
            done.update(what)
            if value is not None:
                done["written"] += 1
                yield value

    write(repaired(), out)
    return done
