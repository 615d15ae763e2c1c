"""Writes that a kill cannot tear, and journals of which one loses at most the last line.

What other programs read later is written beside and renamed; what grows is one line a record.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

LOCKED = 10.0  # seconds to wait for another writer of a journal, who takes a thousandth of one


def write_text(path: Path, text: str, *, flush: bool = True) -> None:
    """Write a small file so that a reader sees all of it or none, whatever is killed when; `flush`: and a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if flush:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if flush:
        sync_folder(path.parent)


def flush_all(paths: Iterable[Path]) -> None:
    """Bring files that were written without a flush, and their folders, to the disk: many at once are soon done."""
    from concurrent.futures import ThreadPoolExecutor  # 10 ms that no look at the runs should wait for

    files = list(paths)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(sync_folder, files))
        list(pool.map(sync_folder, {path.parent for path in files}))


def write_json(path: Path, value: object, *, flush: bool = True) -> None:
    """`write_text` for a JSON value, keys in order so that equal values are equal files."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n", flush=flush)


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's mapping, or None where there is no such file or no JSON mapping in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _lock(handle: int) -> None:
    """Lock an open file, if that can be had: a node that died may hold it, and some file systems have no locks."""
    end = time.monotonic() + LOCKED
    while time.monotonic() < end:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.005)
        except OSError:
            return
        else:
            return


def append_line(path: Path, record: Mapping[str, object], *, flush: bool = True) -> None:
    """Add one record to a journal with a single write; records of several writers do not mix.

    A line that a full disk or a crash cut short is ended first, so that it takes no whole one with it. Without `flush`
    the caller sees to it that it is on the disk (`flush_all`). The lock is for NFS, where each node takes the end for
    where it last saw it, and writes over what another has added; with the lock it asks the server.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record, sort_keys=True) + "\n").encode()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        _lock(handle)
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        while line := line[os.write(handle, line) :]:
            pass  # a short write: the next one says why, or completes the line
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # nobody waits for this one's disk
        if flush:
            os.fsync(handle)
    finally:
        os.close(handle)


def begin_journal(path: Path, record: Mapping[str, object], *, flush: bool = True) -> bool:
    """Begin a journal with a record, unless there is one; of several who try one does, and nobody sees it empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        beside.unlink(missing_ok=True)
        append_line(beside, record, flush=flush)
        os.link(beside, path)
    except FileExistsError:
        return False
    except OSError:
        if path.exists():
            return False
        os.replace(beside, path)  # a file system without links
    finally:
        beside.unlink(missing_ok=True)
    if flush:
        sync_folder(path.parent)
    return True


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The journal's records; a line torn by a kill is no record."""
    try:
        # A missing file is an empty journal; what a broken disk made of a line is no record, and takes no other along.
        file = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115
    except OSError:
        return
    with file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def newest_lines(path: Path | str, block: int = 4096) -> Iterator[bytes]:
    """The file's lines from its end to its start, without line ends; nothing where there is no file.

    What grows without bound is read as far back as the reader asks, in blocks that double.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return
        at = os.fstat(handle).st_size
        rest = b""
        while at:
            size = min(block, at)
            at -= size
            lines = (os.pread(handle, size, at) + rest).split(b"\n")
            rest = lines[0]  # its start may lie before this block
            yield from reversed(lines[1:])
            block *= 2
        yield rest
    finally:
        os.close(handle)


def newest_records(path: Path | str, skip: bytes = b"") -> Iterator[dict[str, Any]]:
    """The journal's records, newest first; lines with `skip` in them are passed over unread."""
    for line in newest_lines(path):
        if not line or (skip and skip in line):
            continue
        try:
            record = json.loads(line.decode())
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder`, or what is in a file, survive a power cut; file systems that cannot are left alone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
