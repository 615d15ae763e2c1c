"""Archives become the tree: whole, split, nested, stopped half-way; nothing is written outside."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import pytest

from data import archives
from data.archives import ArchiveError, Joined, unpack
from data.catalog import Archive, Dataset

FILES = {f"coco/train2017/{at:03d}.jpg": bytes([at]) * (1000 + at) for at in range(20)}


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def split_archive(folder: Path, method: int) -> Dataset:
    """An archive in an archive in three parts, as the hub has the 665k mix."""
    inner = zipped({f"tune/{name}": content for name, content in FILES.items()})
    outer = zipped({"tune.zip": inner}, method)
    names = [f"tune_2.zip.00{at}" for at in (1, 2, 3)]
    third = len(outer) // 3
    for at, name in enumerate(names):
        (folder / name).write_bytes(outer[at * third : (at + 1) * third if at < 2 else len(outer)])
    archive = Archive("tune_2.zip", 1.0, parts=dict.fromkeys(names, 0.3), nested="tune.zip")
    return Dataset("tune", "tune.json", "tune", archive=archive)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_split_nested_archive_is_read_in_place(method: int, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    told: list[tuple[int, int]] = []
    dataset = split_archive(tmp_path, method)
    done = unpack(dataset, tmp_path, root, lambda *step: told.append(step))
    assert done == (20, 0)
    assert tree(root) == {f"tune/{name}": content for name, content in FILES.items()}
    assert told[-1][0] == told[-1][1] == sum(map(len, FILES.values()))
    assert unpack(dataset, tmp_path, root) == (0, 20)


@pytest.mark.parametrize("top", ["", "LA/", "mimicit_tune/LA/"])
def test_members_land_where_the_annotations_look(top: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "mimicit_tune").mkdir(parents=True)
    (root / "mimicit_tune" / "LA.zip").write_bytes(zipped({f"{top}a.jpg": b"a", f"{top}b/c.jpg": b"c"}))
    dataset = Dataset("la", "la.json", "mimicit_tune/LA", archive=Archive("LA.zip", 1.0, into="mimicit_tune"))
    unpack(dataset, root, root)
    assert tree(root / "mimicit_tune" / "LA") == {"a.jpg": b"a", "b/c.jpg": b"c"}


def test_an_unpacking_that_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = split_archive(tmp_path, zipfile.ZIP_STORED)
    root = tmp_path / "root"
    root.mkdir()
    copy, made = shutil.copyfileobj, []

    def stop(source: object, target: object, size: int) -> None:
        if len(made) == 7:
            target.write(b"half")  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        made.append(1)
        copy(source, target, size)  # type: ignore[arg-type]

    monkeypatch.setattr(archives.shutil, "copyfileobj", stop)
    with pytest.raises(KeyboardInterrupt):
        unpack(dataset, tmp_path, root)
    monkeypatch.undo()
    assert len(tree(root)) == 7
    assert unpack(dataset, tmp_path, root) == (13, 7)
    assert tree(root) == {f"tune/{name}": content for name, content in FILES.items()}


def test_what_cannot_be_unpacked_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    root.mkdir()
    dataset = Dataset("x", "x.json", "x", archive=Archive("x.zip", 1.0))
    with pytest.raises(ArchiveError, match=r"there is no x\.zip; `python data/prepare\.py plan` says"):
        unpack(dataset, tmp_path, root)
    whole = zipped({"x/a.jpg": b"a" * 5000}, zipfile.ZIP_STORED)
    (tmp_path / "x.zip").write_bytes(whole[:-30])
    with pytest.raises(ArchiveError, match=r"x\.zip: not a whole zip archive .*; download it again"):
        unpack(dataset, tmp_path, root)
    (tmp_path / "x.zip").write_bytes(whole.replace(b"aaaa", b"aaab", 1))
    with pytest.raises(ArchiveError, match=r"x/a\.jpg: damaged in the archive .*; download it again"):
        unpack(dataset, tmp_path, root)
    for field in ((8, 10, b"\x09\x00"), (6, 8, b"\x01\x00")):  # deflate64; locked by a password
        strange = bytearray(whole)
        for head, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
            at = strange.index(head) + shift
            strange[at + field[0] : at + field[1]] = field[2]
        (tmp_path / "x.zip").write_bytes(strange)
        with pytest.raises(ArchiveError, match=r"x/a\.jpg: Python cannot unpack it .*; unpack .* with 7z"):
            unpack(dataset, tmp_path, root)
    (tmp_path / "x.zip").write_bytes(zipped({"../evil.jpg": b"a"}))
    with pytest.raises(ArchiveError, match="would write outside"):
        unpack(dataset, tmp_path, root)
    assert tree(tmp_path / "root") == {}
    assert unpack(Dataset("t", "t.json"), tmp_path, root) == (0, 0)
    nested = split_archive(tmp_path, zipfile.ZIP_DEFLATED)
    usage = shutil.disk_usage(root)._replace(free=10)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ArchiveError, match=r"tune\.zip is compressed inside its archive and needs 0\.0 GB"):
        unpack(nested, tmp_path, root)


def test_joined_files_read_as_one(tmp_path: Path) -> None:
    parts = []
    for at, content in enumerate((b"abc", b"", b"defgh")):
        (tmp_path / str(at)).write_bytes(b"__" + content + b"..")
        parts.append(((tmp_path / str(at)).open("rb"), 2, len(content)))
    joined = io.BufferedReader(Joined(parts))
    assert joined.read() == b"abcdefgh"
    joined.seek(2)
    assert joined.read(3) == b"cde"
    joined.seek(-3, io.SEEK_END)
    assert (joined.tell(), joined.read(9)) == (5, b"fgh")
    for file, _, _ in parts:
        file.close()
