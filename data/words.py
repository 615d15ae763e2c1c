"""What the system refuses and what a file holds instead, in words."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

_WHY = {
    errno.ENOENT: "there is no such file or folder",
    errno.EACCES: "you may not read or write there",
    errno.EPERM: "you may not do that there",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.EEXIST: "it exists already",
}


def refused(error: OSError, near: Path | None = None) -> str:
    """An OSError: where, why, and what to do; `near` is where was written to when the error does not say."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = Path(error.filename) if error.filename else near
        while place and not place.exists() and place != place.parent:
            place = place.parent
        room = f" ({shutil.disk_usage(place).free / 1e6:,.0f} MB left)" if place else ""
        where = f"the disk or quota of {place} is full" if place else "the disk or quota is full"
        return f"{where}{room}: make room, then say the same again"
    if error.filename is None or error.errno not in _WHY:
        return str(error)
    return f"{error.filename}: {_WHY[error.errno]}"


def kind_of(value: Any) -> str:
    """What a value of JSON is called."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
