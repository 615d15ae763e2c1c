"""The code a run was submitted with, kept by content, so that it is also the code it runs and requeues with."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from launch.files import sync_folder, write_json

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("launch", "moe", "data")


def files() -> list[str]:
    """The files that make up the code, relative to the repository, in order."""
    found: list[str] = []
    for package in PACKAGES:
        for folder, inner, names in os.walk(REPOSITORY / package):
            inner[:] = [name for name in inner if name != "__pycache__"]
            below = os.path.relpath(folder, REPOSITORY)
            found += [f"{below}/{name}" for name in names if not name.startswith(".")]
    return sorted(found)


def digest() -> str:
    """16 hex digits that name the code's content."""
    total = hashlib.sha256()
    for name in files():
        with open(f"{REPOSITORY}/{name}", "rb") as file:
            content = file.read()
        total.update(f"{name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()[:16]


def commit() -> str:
    """The commit the checkout is at, with + where files differ from it; empty outside git."""
    try:
        found = subprocess.run(
            ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def take(runs: Path) -> Path:
    """Copy the code to `runs/code/<digest>` unless it is there, and return that folder."""
    name = digest()
    folder = runs / "code" / name
    if folder.is_dir():
        return folder
    beside = folder.with_name(f".{name}.{os.uname().nodename}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        for path in files():
            target = beside / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / path, target)
        write_json(beside / "snapshot.json", {"digest": name, "commit": commit()})
        try:
            os.rename(beside, folder)
        except OSError:
            if not folder.is_dir():  # else another submitter was first, with the same content
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    sync_folder(folder.parent)
    return folder
