"""Downloaded archives into the DATA_ROOT tree: in parts or nested, with no joined copy on the disk."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from data.catalog import Dataset

COPY = 1 << 20
Progress = Callable[[int, int], None]


class ArchiveError(ValueError):
    """An archive that cannot be unpacked; the message names it and says what to do."""


class Joined(io.RawIOBase):
    """Consecutive slices of files as one: the parts of a split archive, or an archive stored in another."""

    def __init__(self, slices: Sequence[tuple[BinaryIO, int, int]]) -> None:
        self._slices = slices  # file, first byte, length
        self._size = sum(length for _, _, length in slices)
        self._at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move as files do."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """The place in the whole."""
        return self._at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        """Fill as much of the buffer as one slice has."""
        start = 0
        for file, first, length in self._slices:
            if self._at < start + length:
                inside = self._at - start
                file.seek(first + inside)
                data = file.read(min(len(buffer), length - inside))
                buffer[: len(data)] = data
                self._at += len(data)
                return len(data)
            start += length
        return 0


def files_of(dataset: Dataset) -> dict[str, float]:
    """The files to download for a data set's pictures, and their gigabytes."""
    if dataset.archive is None:
        return {}
    return dict(dataset.archive.parts) or {dataset.archive.name: dataset.archive.gigabytes}


def unpack(
    dataset: Dataset, downloads: Path, root: Path, progress: Progress | None = None
) -> tuple[int, int]:
    """Unpack a data set's pictures below the root; how many files were written, and how many were there.

    A file of the right size is not written again, so an unpacking that was stopped goes on. Raises
    ArchiveError.
    """
    archive = dataset.archive
    if archive is None:
        return 0, 0
    with ExitStack() as stack:
        slices = []
        for name in files_of(dataset):
            found = next(
                (p for p in (downloads / name, downloads / archive.into / name) if p.is_file()), None
            )
            if found is None:
                raise ArchiveError(
                    f"{downloads}: there is no {name}; `python data/prepare.py plan` says where to get it"
                )
            slices.append((stack.enter_context(found.open("rb")), 0, found.stat().st_size))
        whole = _open(io.BufferedReader(Joined(slices), COPY), archive.name, stack)
        if archive.nested:
            whole = _nested(whole, archive.nested, slices, root, stack)
        return _extract(whole, _home(whole, dataset, root), progress)


def _open(file: BinaryIO, name: str, stack: ExitStack) -> zipfile.ZipFile:
    try:
        return stack.enter_context(zipfile.ZipFile(file))
    except zipfile.BadZipFile as error:
        raise ArchiveError(f"{name}: not a whole zip archive ({error}); download it again") from None


def _nested(
    outer: zipfile.ZipFile,
    name: str,
    slices: Sequence[tuple[BinaryIO, int, int]],
    root: Path,
    stack: ExitStack,
) -> zipfile.ZipFile:
    """The archive inside: read in place when it is stored, else unpacked beside the tree for as long as
    needed.
    """
    inside = next((info for info in outer.infolist() if PurePosixPath(info.filename).name == name), None)
    if inside is None:
        return outer  # already the pictures
    if inside.compress_type == zipfile.ZIP_STORED:
        parts = io.BufferedReader(Joined(slices))
        parts.seek(inside.header_offset + 26)
        header = parts.read(4)  # lengths of the name and of the extra field, between header and bytes
        first = inside.header_offset + 30 + header[0] + 256 * header[1] + header[2] + 256 * header[3]
        window, start = [], 0
        for file, _, length in slices:
            left, right = max(first, start), min(first + inside.file_size, start + length)
            if left < right:
                window.append((file, left - start, right - left))
            start += length
        return _open(io.BufferedReader(Joined(window), COPY), name, stack)
    room = shutil.disk_usage(root).free
    if room < inside.file_size:
        raise ArchiveError(
            f"{root}: {name} is compressed inside its archive and needs {inside.file_size / 1e9:.1f} GB for "
            f"a while, but {room / 1e9:.1f} GB are free"
        )
    beside = root / f".{name}"
    if not (beside.is_file() and beside.stat().st_size == inside.file_size):
        _copy(outer, inside, beside)
    stack.callback(beside.unlink, missing_ok=True)
    return _open(stack.enter_context(beside.open("rb")), name, stack)


def _home(archive: zipfile.ZipFile, dataset: Dataset, root: Path) -> Path:
    """Where members go: archives of the hub start at the picture folder's own name, others inside it."""
    folder = PurePosixPath(dataset.images)
    names = [PurePosixPath(info.filename) for info in archive.infolist()]
    if all(name.parts[: len(folder.parts)] == folder.parts for name in names):
        return root
    if all(name.parts[:1] == (folder.name,) for name in names):
        return root / folder.parent
    return root / folder


def _extract(archive: zipfile.ZipFile, home: Path, progress: Progress | None) -> tuple[int, int]:
    members = [info for info in archive.infolist() if not info.is_dir()]
    made = there = done = 0
    total = sum(info.file_size for info in members)
    for info in members:
        parts = PurePosixPath(info.filename).parts
        if ".." in parts or info.filename.startswith("/"):
            raise ArchiveError(
                f"{info.filename}: the archive would write outside {home}; it is not the published one"
            )
        target = home.joinpath(*parts)
        if target.is_file() and target.stat().st_size == info.file_size:
            there += 1
        else:
            _copy(archive, info, target)
            made += 1
        done += info.file_size
        if progress:
            progress(done, total)
    return made, there


def _copy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    """Write a member at once or not at all; its checksum is proved on the way."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with archive.open(info) as source, partial.open("wb") as file:
            shutil.copyfileobj(source, file, COPY)
        os.replace(partial, target)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ArchiveError(f"{info.filename}: damaged in the archive ({error}); download it again") from None
    except RuntimeError as error:  # zipfile's, for a compression or a lock that it does not know
        raise ArchiveError(
            f"{info.filename}: Python cannot unpack it ({error}); unpack the archive with 7z, into the same folder"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
