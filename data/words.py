"""What the system refuses and what a file holds instead, in words."""

from __future__ import annotations

import errno
import re
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


# JSON can say half of a UTF-16 pair; no tokenizer and no file system takes it.
_HALF = re.compile("[\ud800-\udfff]")


def is_text(value: Any) -> bool:
    """Whether a value is a text that can be written as UTF-8."""
    return isinstance(value, str) and (value.isascii() or not _HALF.search(value))


def is_path(value: Any) -> bool:
    """Whether a value can be the path of a file."""
    if not is_text(value) or not value or "\0" in value:
        return False
    return len(value) < 64 or (len(value.encode()) < 4096 and max(map(len, value.encode().split(b"/"))) < 256)


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
