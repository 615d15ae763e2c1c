"""What a chain starts from that none of its experiments made: `init_from: wandb:...` and `init_from: hub:...`.

    wandb:ENTITY/PROJECT/checkpoint-RUN:ALIAS    a finished run's handoff, found by the artifact that mirrors it
    hub:NAME or hub:/a/folder                    a dense model with a projector, as Hugging Face folders hold it

It is resolved while the plan is made, to a digest that run.json keeps; an alias that moves later changes
nothing for a run that is planned already. wandb and the hub's client are asked by launch.online.fetch, a process
of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.files import read_json, write_json
from launch.handoff import HandoffError, check, digest_of
from launch.record import RunFolder
from launch.snapshot import REPOSITORY

SCHEMES = ("wandb:", "hub:")
FETCH_SECONDS = 1800  # a model of the hub may have to be downloaded
# What of a hub folder is a model's or a tokenizer's; the rest is not looked at.
MODEL = re.compile(r"config\.json|.*\.(safetensors|bin|index\.json)")
TOKENIZER = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template).*|.*\.(model|tiktoken)|generation_config\.json"
)


class OriginError(Exception):
    """A chain cannot start there; the text says why, `hint` what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Origin:
    """A parent that is no run of the plan; it is done already."""

    name: str  # as init_from has it
    folder: RunFolder
    identity: str
    stage: str
    digest: str
    artifact: str = ""  # entity/project/name, of wandb:
    parent: None = None

    def record(self) -> dict[str, str]:
        """What run.json keeps of it."""
        facts = {"named": self.name, "stage": self.stage, "digest": self.digest, "identity": self.identity}
        return facts | {"artifact": self.artifact, "folder": str(self.folder.path)}

    @classmethod
    def of(cls, record: Mapping[str, str]) -> Origin:
        """From what run.json keeps."""
        folder = RunFolder(Path(record["folder"]))
        identity, stage, digest = (record[key] for key in ("identity", "stage", "digest"))
        return cls(record["named"], folder, identity, stage, digest, record["artifact"])


def resolve(named: str, after: str, root: Path) -> Origin:
    """The origin that a stage after `after` starts from; raises OriginError."""
    scheme, _, place = named.partition(":")
    if scheme == "hub":
        return from_hub(named, place, after, root)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+/[\w.-]+:[\w.-]+", place):
        raise OriginError(
            f"{named!r} names no artifact",
            "write wandb:ENTITY/PROJECT/checkpoint-RUN:latest, or :v3, or :h-DIGEST",
        )
    return from_wandb(named, place, after, _fetch("wandb", place))


def from_wandb(named: str, place: str, after: str, handoff: Mapping[str, Any]) -> Origin:
    """Check the handoff that an artifact mirrors against its stage and what is on this file system."""
    folder = RunFolder(Path(handoff["folder"]))
    if handoff.get("stage") != after:
        raise OriginError(
            f"it starts from a handoff of stage {after}, and {named} is one of stage {handoff.get('stage')}",
            "name the artifact of a run of that stage",
        )
    own = read_json(folder.handoff_file)
    if own is None:
        raise OriginError(
            f"{named} is the checkpoint in {folder.path}, and that run folder is not on this file system",
            "copy it here under the same path, or train it here",
        )
    if own.get("digest") != handoff["digest"]:
        raise OriginError(
            f"{named} has the digest {handoff['digest'][:12]}, and {folder.path} now holds {own['digest'][:12]}",
            "name the version that is there (:h-" + str(own["digest"])[:12] + "), or bring the other back",
        )
    try:
        check(folder, own, digests=False)  # the ranks compare contents, too
    except HandoffError as error:
        raise OriginError(f"{named}: {error}") from None
    return Origin(named, folder, own["identity"], after, own["digest"], place.rpartition(":")[0])


def from_hub(named: str, place: str, after: str, root: Path) -> Origin:
    """Check a hub folder's config, and keep beside the runs which files it had."""
    folder = Path(place).expanduser()
    if place.startswith(("/", "~", ".")) and not folder.is_dir():
        raise OriginError(
            f"{named}: there is no folder {folder}", "a model of the hub is written hub:OWNER/NAME"
        )
    if not folder.is_dir():
        folder = Path(_fetch("hub", place)["folder"])
    said = read_json(folder / "config.json")
    if said is None:
        raise OriginError(f"{named}: {folder} has no config.json that can be read", "it is no model's folder")
    _fits(named, said)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "digest": _content(path, root)}
        for path in sorted(folder.iterdir())
        if path.is_file() and (MODEL.fullmatch(path.name) or TOKENIZER.fullmatch(path.name))
    }
    if not any(name.endswith((".safetensors", ".bin")) for name in files):
        raise OriginError(f"{named}: {folder} has no weights (*.safetensors, *.bin)", "download it whole")
    digest = digest_of(files)
    kept = RunFolder(
        root / ".origins" / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', place).strip('-.')[-60:]}-{digest[:12]}"
    )
    for name in files:
        if TOKENIZER.fullmatch(name) and not (kept.tokenizer / name).exists():
            kept.tokenizer.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, kept.tokenizer / name)
    facts = {"version": 1, "kind": "hub", "run": place, "stage": after, "step": 0, "identity": digest}
    facts |= {"path": str(folder.absolute()), "digest": digest, "shards": files, "parent": None}
    if read_json(kept.handoff_file) != facts:
        write_json(
            kept.run_file, {"id": place, "name": named, "stage": after, "identity": digest, "parent": None}
        )
        write_json(kept.handoff_file, facts)
    return Origin(named, kept, digest, after, digest)


def _fits(named: str, said: Mapping[str, Any]) -> None:
    """A dense model with a projector, of ours or of the reference system; as far as its config.json says."""
    sparse = said.get("moe") and (said.get("model_type") == "moe_vlm" or said["moe"].get("moe_enable"))
    if sparse:
        raise OriginError(
            f"{named} has experts already; stages start from a dense model", "name the one before it"
        )
    if said.get("model_type") != "moe_vlm" and not (
        said.get("mm_projector_type") or said.get("mm_hidden_size")
    ):
        raise OriginError(
            f"{named} is a language model without a projector (config.json has no mm_projector_type)",
            "say model.weights for it, and begin with stage align",
        )


def check_hub(folder: RunFolder, handoff: Mapping[str, Any], *, digests: bool) -> Path:
    """The hub folder of an origin, with each file there in its size (and content); raises HandoffError."""
    path = Path(handoff["path"])
    for name, facts in handoff["shards"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != facts["size"]:
            raise HandoffError(
                f"{file} is missing or has another size than when {folder.handoff_file} was written"
            )
        if digests and _sha256(file) != facts["digest"]:
            raise HandoffError(
                f"{file} is not what it was when {folder.handoff_file} was written; plan again"
            )
    return path


def _fetch(what: str, place: str) -> dict[str, Any]:
    """Ask launch.online.fetch; raises OriginError with its words."""
    from launch.tracking import environment

    with tempfile.TemporaryDirectory() as folder:
        keep = {name: os.environ[name] for name in ("HF_TOKEN", "HF_HOME") if name in os.environ}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "launch.online.fetch", what, place],
                cwd=REPOSITORY,
                env=environment(Path(folder)) | (keep if what == "hub" else {}),
                capture_output=True,
                text=True,
                timeout=FETCH_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise OriginError(
                f"{what}:{place}: no answer within {FETCH_SECONDS} s", "try again later"
            ) from None
    try:
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise OriginError(
            f"{what}:{place}: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}"
        ) from None
    if "error" in said:
        raise OriginError(said["error"], said.get("hint", ""))
    return said


def _content(path: Path, root: Path) -> str:
    """The file's SHA-256; large ones are hashed once as long as their size and time stay."""
    blob = path.resolve().name
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob  # the hub's cache names a large file by it
    stat = path.stat()
    if stat.st_size < 1 << 20:
        return _sha256(path)
    kept = root / ".origins" / "digests.json"
    known = read_json(kept) or {}
    key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    if key not in known:
        known[key] = _sha256(path)
        write_json(kept, known)
    return str(known[key])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
