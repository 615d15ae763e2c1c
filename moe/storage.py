"""What makes a folder a checkpoint, and how one comes to be and goes; standard library only, for the login
node too.

A folder `step_00000100` is a checkpoint when its COMPLETE file says so: written last, with the size and
digest of every other file. It is made under another name and renamed when all is on disk, so that a process
killed at any moment leaves either no such folder or a whole one; nothing old is removed before the new one
stands.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe import digests

COMPLETE = "COMPLETE"
VERSION = 1
CHUNK = 16 << 20  # bytes written at once
SENT = 64 << 20  # bytes sent to the disk at once; with 16 MiB a GiB took half as long again
VECTORS = 512  # buffers given to the kernel at once; Linux takes 1024
STEP = re.compile(r"step_(\d{8,})")
PARTIAL, REPLACED, CORRUPT = ".partial-", ".replaced-", ".corrupt"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or read; the message says which, why and what to do."""


class Damaged(CheckpointError):
    """A checkpoint's bytes are not those that were written."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, how many steps had been taken, and how long this process took to save it."""

    path: Path
    step: int
    seconds: float = field(default=0.0, compare=False)  # 0: it was found


def folder_name(step: int) -> str:
    """The folder of a checkpoint: names sort as steps do."""
    return f"step_{step:08d}"


def describe(path: Path) -> dict[str, Any]:
    """What COMPLETE says: version, step, world, layout, updates, extra, and each file's size and digest.

    Raises CheckpointError when the folder is no complete checkpoint, or a file is missing or of another
    size; contents are not read (`faults` reads them).
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is no folder; name a checkpoint such as {path.parent / folder_name(100)}"
        )
    try:
        record = json.loads((path / COMPLETE).read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} has no {COMPLETE} file: the save did not finish. Use the checkpoint before it."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path / COMPLETE} cannot be read ({error}). Use the checkpoint before it."
        ) from None
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise CheckpointError(
            f"{path / COMPLETE} is no record of a checkpoint. Use the checkpoint before it."
        )
    if record.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is of version {record.get('version')}; this code reads version {VERSION}. "
            "Read it with the code that wrote it (the run's own snapshot), or start again."
        )
    for name, said in record["files"].items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path}: {name} is missing ({error.strerror}).") from None
        if size != said["size"]:
            raise CheckpointError(f"{path}: {name} has {size} bytes where {said['size']} were written.")
    return record


def faults(path: Path, record: dict[str, Any], names: Iterable[str]) -> list[str]:
    """What is wrong with the contents of these files of a checkpoint, in words; reads them whole."""
    found = []
    for name in names:
        said = record["files"][name]
        try:
            if digests.check(Path(path) / name, said["digest"], said["size"]) is False:
                found.append(altered(path, name))
        except OSError as error:
            found.append(f"{path}: {name} cannot be read ({error.strerror})")
    return found


def altered(path: Path, name: str) -> str:
    """That a file's bytes are others than were written, in words."""
    return f"{path}: the contents of {name} are not what was written (their digest differs)"


def found(folder: Path) -> list[Checkpoint]:
    """The folders under `folder` that are named as checkpoints, newest first; whether they are whole is
    not checked.
    """
    if not folder.is_dir():
        return []
    named = ((STEP.fullmatch(entry.name), entry) for entry in folder.iterdir())
    return sorted(
        (Checkpoint(entry, int(match[1])) for match, entry in named if match),
        key=lambda c: c.step,
        reverse=True,
    )


# --- writing ---


class Writer:
    """Writes new files; leaving its block waits until all of them are on disk, together.

    One wait for many files: the first makes the file system commit its journal, and the rest find it done.
    """

    def __init__(self) -> None:
        self._open: list[int] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for descriptor in self._open if kind is None else ():
                os.fsync(descriptor)
        finally:
            for descriptor in self._open:
                os.close(descriptor)

    def write(self, path: Path, buffers: Iterable[memoryview]) -> tuple[dict[str, Any], str]:
        """Write one file; its size, digest, and the digests of its pieces."""
        tree = digests.Tree()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._open.append(descriptor)
        size = waiting = sent = 0
        batch: list[memoryview] = []
        for buffer in buffers:
            for first in range(0, len(buffer), CHUNK):
                piece = buffer[first : first + CHUNK]
                tree.update(piece)
                batch.append(piece)
                waiting += len(piece)
                if waiting >= CHUNK or len(batch) == VECTORS:
                    _write_all(descriptor, batch)
                    size, waiting, batch = size + waiting, 0, []
                if size - sent >= SENT:
                    # Dirty pages are not dropped by this but sent to the disk, while the next are copied.
                    os.posix_fadvise(descriptor, sent, size - sent, os.POSIX_FADV_DONTNEED)
                    sent = size
        _write_all(descriptor, batch)
        digest, pieces = tree.finish()
        return {"size": size + waiting, "digest": digest}, pieces


def _write_all(descriptor: int, batch: list[memoryview]) -> None:
    while batch:
        written = os.writev(descriptor, batch)
        while batch and written >= len(batch[0]):
            written -= len(batch.pop(0))
        if batch:
            batch[0] = batch[0][written:]


def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start(folder: Path, step: int) -> Path:
    """A new, empty folder to write a checkpoint into, under a name no other attempt uses."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{folder_name(step)}{PARTIAL}{os.urandom(4).hex()}"
    partial.mkdir()
    return partial


def seal(partial: Path, record: dict[str, Any]) -> None:
    """Write COMPLETE, the last file, and wait until all names are on disk."""
    text = json.dumps({"version": VERSION, **record}, indent=1, allow_nan=False)
    with Writer() as writer:
        writer.write(partial / COMPLETE, [memoryview(text.encode())])
    flush_folder(partial)


def publish(partial: Path, step: int) -> Checkpoint:
    """Give a sealed folder its name."""
    target = partial.parent / folder_name(step)
    aside = None
    if target.exists():  # the same step again, after a fall back to an earlier one
        aside = target.with_name(f".{target.name}{REPLACED}{os.urandom(4).hex()}")
        target.rename(aside)
    try:
        partial.rename(target)
    except OSError:
        if aside is not None:  # a successor's, perhaps, which has removed what this attempt wrote
            aside.rename(target)
        raise
    flush_folder(target.parent)
    if aside is not None:
        remove([aside])
    return Checkpoint(target, step)


def recover(folder: Path) -> None:
    """At the start of an attempt: remove what earlier ones left unfinished, undo a replacement cut off
    half-way.

    Not at each save: a process of an earlier attempt that is still alive would remove its successor's.
    """
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        if PARTIAL in entry.name:
            shutil.rmtree(entry, ignore_errors=True)
        if REPLACED not in entry.name:
            continue
        target = folder / entry.name.removeprefix(".").partition(REPLACED)[0]
        if target.exists():
            remove([entry])
        else:
            entry.rename(target)


def set_aside(path: Path) -> None:
    """Rename a corrupt checkpoint, so that none takes it for one; it goes when a newer one is complete."""
    aside = path.with_name(path.name + CORRUPT)
    with contextlib.suppress(OSError):
        if aside.exists():
            remove([discard(aside)])
        path.rename(aside)


def prune(folder: Path, newest: Checkpoint, keep: int) -> list[Path]:
    """Take the checkpoints before the `keep` newest out of sight, up to `newest`, which must be whole.

    What is returned is left to `remove`, which takes long for large files.
    """
    older = [checkpoint.path for checkpoint in found(folder) if checkpoint.step < newest.step]
    corrupt = [entry for entry in folder.iterdir() if entry.name.endswith(CORRUPT)]
    return [discard(path) for path in (*older[keep - 1 :], *corrupt)]


def discard(path: Path) -> Path:
    """Rename a folder in one step to what no one takes for a checkpoint, and `recover` removes."""
    aside = path.with_name(f".{path.name}{PARTIAL}{os.urandom(4).hex()}")
    path.rename(aside)
    return aside


def remove(paths: Iterable[Path]) -> None:
    """Remove folders; one that cannot be is left to the next attempt."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
