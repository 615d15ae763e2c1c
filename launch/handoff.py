"""The record a finished stage leaves, and the check the next one makes before it takes a GPU.

The file system is the truth: `handoff.json` names the checkpoint's files with their sizes and digests. W&B mirrors it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.files import read_json, write_json
from launch.record import RunFolder
from moe.storage import CheckpointError, describe, faults


class HandoffError(Exception):
    """A stage cannot start from what it is given; the text says what is wrong and what to do."""


def digest_of(files: Mapping[str, Mapping[str, Any]]) -> str:
    """64 hex digits over the names, sizes and digests of a checkpoint's files."""
    facts = {name: [file["size"], file["digest"]] for name, file in files.items()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def publish(folder: RunFolder, checkpoint: Path, *, parent: Mapping[str, Any] | None) -> dict[str, Any]:
    """Write the run's handoff, for a complete checkpoint; the next stage may start once this returns."""
    facts = describe(checkpoint)
    run = folder.run
    spec = json.dumps(read_json(folder.spec_file), sort_keys=True)
    tokenizer = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.tokenizer.glob("*"))
        if path.is_file()
    }
    handoff = {
        "version": 1,
        "run": run["id"],
        "experiment": run["experiment"],
        "point": run["point"],
        "stage": run["stage"],
        "identity": run["identity"],
        "code": run["code"],
        "step": facts["step"],
        "path": checkpoint.relative_to(folder.path).as_posix(),
        "digest": digest_of(facts["files"]),
        "shards": facts["files"],
        "tokenizer": tokenizer,
        "spec_digest": hashlib.sha256(spec.encode()).hexdigest(),
        "parent": parent["digest"] if parent else None,
    }
    write_json(folder.handoff_file, handoff)
    return handoff


def read(folder: RunFolder, *, identity: str = "", stage: str = "") -> dict[str, Any]:
    """The handoff of a finished run, checked as far as its text goes; raises HandoffError."""
    handoff = read_json(folder.handoff_file)
    if handoff is None:
        raise HandoffError(f"{folder.path} has no handoff: the run has not finished")
    if stage and handoff.get("stage") != stage:
        raise HandoffError(
            f"{folder.path} is the handoff of stage {handoff.get('stage')}, and stage {stage} is wanted"
        )
    if identity and handoff.get("identity") != identity:
        raise HandoffError(
            f"{folder.path} was left by another run than the one planned ({handoff.get('identity', '')[:12]}, "
            f"planned {identity[:12]}); resubmit it under a name of its own, or plan with the spec it was trained with"
        )
    return handoff


def start(record: Mapping[str, Any], stage: str) -> tuple[RunFolder, dict[str, Any]] | None:
    """What the run of this record starts from, None where that is the backbone; raises HandoffError."""
    if not stage:
        return None
    folder = RunFolder(Path(record["parent"]))
    handoff = read(folder, identity=record["parent_identity"], stage=stage)
    origin = record.get("origin", {})
    if origin and origin["digest"] != handoff["digest"]:
        raise HandoffError(
            f"{folder.path} holds {handoff['digest'][:12]}, and the run was planned from {origin['named']}, which was "
            f"{origin['digest'][:12]}; bring that back, or plan the run anew under another name"
        )
    return folder, handoff | {"artifact": origin.get("artifact", ""), "origin": origin.get("named", "")}


def check(folder: RunFolder, handoff: Mapping[str, Any], *, digests: bool) -> Path:
    """The handoff's checkpoint, with each file there in its size (and content, with `digests`); raises HandoffError."""
    if handoff.get("kind") == "hub":
        from launch.origin import check_hub

        return check_hub(folder, handoff, digests=digests)
    path = folder.path / str(handoff["path"])
    try:
        facts = describe(path)
        if digest_of(facts["files"]) != handoff["digest"]:
            raise HandoffError(
                f"{path} is not the checkpoint that {folder.handoff_file} names: its digests differ"
            )
    except CheckpointError as error:
        raise HandoffError(f"{folder.handoff_file}: {error}") from None
    wrong = (
        faults(path, facts, facts["files"]) if digests else []
    )  # sizes are described only where they are right
    if wrong:
        raise HandoffError(
            f"{path} is not as {folder.handoff_file} says: {'; '.join(wrong)}; restore it, or train that run again"
        )
    for name, digest in handoff.get("tokenizer", {}).items():
        file = folder.tokenizer / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise HandoffError(f"{file} is missing or is not the tokenizer that the model was trained with")
    return path
