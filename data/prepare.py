"""Prepare a DATA_ROOT: python data/prepare.py plan|unpack|convert|check|index|pixels ...

Nothing here is needed to train; all of it is cheaper than to find out on a GPU. Exit codes: 0 all is well, 1
something would be lost or is missing, 2 the command cannot be carried out.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, Python puts data/ at the head of the path; the repository belongs there.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    importlib.import_module("launch.door").enter("data.prepare")  # and so this file is imported, not run

GIGA = 1e9
GO_ON = ("unpack", "index", "pixels")  # commands that go on where they were stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command; its exit code."""
    from data.options import parser
    from data.words import refused

    options = parser().parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
    except BrokenPipeError:  # whoever reads has enough
        raise
    except (ValueError, OSError, KeyError) as error:
        words = f"a record lacks {error}" if isinstance(error, KeyError) else str(error)
        if isinstance(error, OSError):
            words = refused(error, getattr(options, "out", None) or Path(getattr(options, "root", ".")))
        print(f"prepare: {words}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        on = "the same command goes on from here" if options.command in GO_ON else "begin again"
        print(f"\nprepare: stopped, nothing is half written; {on}", file=sys.stderr)
        return 130


def plan(options: argparse.Namespace) -> int:
    """What is there, and what is to be downloaded."""
    from data.archives import files_of
    from data.catalog import HUB, annotation_path

    root = _root(options, must=False)
    missing: list[tuple[str, float, str]] = []
    kept = 0.0
    for dataset in _datasets(options):
        try:
            print(f"{dataset.name:18} {annotation_path(root, dataset.annotation)} is there")
        except ValueError:
            missing.append((f"train_json/{dataset.annotation}", dataset.megabytes / 1e3, str(root)))
            print(f"{dataset.name:18} {dataset.annotation} is missing")
        archive = dataset.archive
        if archive and (root / dataset.images).is_dir():
            parts = ", ".join(f"{archive.into}/{name}".lstrip("/") for name in files_of(dataset))
            print(
                f"{'':18} {root / dataset.images} is there; where it is not whole: {parts} of {HUB}, and unpack"
            )
        elif archive:
            into = f"{root}, then `prepare.py unpack`, which fills {root / dataset.images}"
            folder = f"{archive.into}/" if archive.into else ""
            missing += [(f"{folder}{name}", size, into) for name, size in files_of(dataset).items()]
            kept += archive.gigabytes
        print(f"{'':18} {dataset.page}")
        print(f"{'':18} licence {dataset.terms}" + (f"; {dataset.note}" if dataset.note else ""))
    if not missing:
        again = " ".join(map(shlex.quote, options.mix))
        print(
            f"\nall files are there; next: python data/prepare.py check {again} --root {shlex.quote(str(root))}"
        )
        return 0
    print(f"\nto download, from https://huggingface.co/datasets/{HUB}:")
    for name, size, into in missing:
        print(f"  {name:40} {size:7.2f} GB  into {into}")
    total = sum(size for _, size, _ in missing)
    print(f"  {'together':40} {total:7.2f} GB")
    print(
        f"  unpacked pictures take about {kept:.1f} GB more, until the archives are deleted (unpack --delete)"
    )
    near = next(folder for folder in [root, *root.resolve().parents] if folder.is_dir())
    free = shutil.disk_usage(near).free / GIGA
    short = "" if free > total + kept else ", too little: use a larger disk, or unpack --delete one by one"
    print(f"  free under {near}: {free:.1f} GB{short}")
    names = " ".join(f"'{name}'" for name, _, _ in missing)
    print(f"\n  hf download {HUB} {names} --repo-type dataset --local-dir {shlex.quote(str(root))}")
    return 1


def unpack(options: argparse.Namespace) -> int:
    """Archives into the tree."""
    from data.archives import files_of
    from data.archives import unpack as into_tree
    from data.bar import Bar

    root = _root(options)
    downloads, worst = options.downloads or root, 0
    for dataset in _datasets(options):
        if dataset.archive is None:
            print(f"{dataset.name}: no archive of pictures, nothing to unpack")
            continue
        bar = Bar(dataset.name)
        made, there = into_tree(dataset, downloads, root, bar.show)
        bar.close()
        if not made + there:
            print(f"{dataset.name}: there is no file in {dataset.archive.name}; download it again")
            worst = 1
            continue
        print(f"{dataset.name}: {made:,} files written, {there:,} were there, in {root / dataset.images}")
        if options.delete:
            for name in files_of(dataset):
                for place in (downloads / name, downloads / dataset.archive.into / name):
                    place.unlink(missing_ok=True)
    return worst


def check(options: argparse.Namespace) -> int:
    """Everything read, and reported."""
    from data import checking, report
    from data.bar import Bar
    from data.conversation import TEMPLATES, tokenizer_faults
    from data.records import RecordError
    from data.repair import fix

    root, tokenizer = _root(options), _tokenizer(options)
    if options.template not in TEMPLATES:
        raise ValueError(f"no template is called {options.template!r}; there are {', '.join(TEMPLATES)}")
    faults = tokenizer_faults(tokenizer, options.template) if tokenizer is not None else []
    for fault in faults:
        print(f"LOST  tokenizer: {fault}")
    if tokenizer is None:
        print("without --tokenizer the lengths of samples are not looked at")
    wanted = checking.Options(
        tokenizer=tokenizer,
        template=options.template,
        max_length=options.max_length,
        patches=options.patches,
        pictures=not options.no_pictures,
        workers=options.workers,
    )
    bars: dict[str, Bar] = {}

    def progress(name: str, done: int, size: int) -> None:
        bars.setdefault(name, Bar(name)).show(done, size)

    found = checking.check(root, _datasets(options), wanted, progress)
    for bar in bars.values():
        bar.close()
    out = options.out or root / "check"
    print(report.as_text(found, report.write(found, out)))
    print(f"the whole report: {out / 'check.html'} and check.json")
    if faults:
        print(f"LOST  all of it: the tokenizer does not suit template {options.template}, as said above")
    unfixed = False
    for file in found.files if options.fix else []:
        if file.path and file.kinds:
            path = Path(file.path)
            target = path.with_name(f"{path.stem}.fixed.json")
            try:
                done = fix(found, path, target)
            except (RecordError, FileExistsError) as error:  # the other files are still to be repaired
                unfixed = True
                print(f"prepare: {target} is not written: {error}", file=sys.stderr)
                continue
            print(f"{target}: " + ", ".join(f"{count:,} {what}" for what, count in sorted(done.items())))
    if unfixed:
        return 2
    return 1 if found.lost or faults else 0


def index(options: argparse.Namespace) -> int:
    """The training indexes, built."""
    from data.bar import Bar
    from data.catalog import annotation_path
    from data.conversation import tokenizer_faults
    from data.index import fingerprint, open_index

    root, tokenizer = _root(options), _tokenizer(options)
    if faults := tokenizer_faults(tokenizer, options.template):
        raise ValueError(f"the tokenizer does not suit template {options.template}: {'; '.join(faults)}")
    key, worst = fingerprint(tokenizer, options.template), 0
    for dataset in _datasets(options):
        bar = Bar(dataset.name)
        path = annotation_path(root, dataset.annotation)
        made = open_index(path, tokenizer, options.template, bar.show, key)
        bar.close()
        faults = [f"record {fault.record}: {fault.why}" for fault in made.faults()]
        print(f"{dataset.name}: {len(made):,} records, {made.meta['tokens']:,} tokens in {made.folder}")
        for fault in faults[:5]:
            print(f"  cannot be trained on: {fault}")
        if faults:
            print(f"  {len(faults):,} in all; `check --fix` writes a file without them")
            worst = 1
    return worst


def convert(options: argparse.Namespace) -> int:
    """A publisher's file into the schema."""
    from data.convert import CONVERTERS, latest, write, write_pictures

    if options.kind == "mimic-it-pictures":
        made, broken = write_pictures(options.source, options.out)
        print(f"{made:,} pictures written to {options.out}" + (f", {len(broken):,} not" if broken else ""))
        for name in broken[:5]:
            print(f"  {name}")
        return 1 if broken else 0
    try:
        records = CONVERTERS[options.kind](options.source, options.prefix)
        kept, texts = write(records, options.out, options.texts)
    except (AttributeError, TypeError) as error:  # a value of another type than the publisher's
        place = latest(options.source)
        raise ValueError(f"{place}: not as {options.kind}'s publisher writes it ({error})") from None
    print(f"{kept:,} records in {options.out}" + (f", {texts:,} in {options.texts}" if options.texts else ""))
    return 0


def pixels(options: argparse.Namespace) -> int:
    """The pictures, scaled and kept."""
    from data.bar import Bar
    from data.catalog import annotation_path
    from data.conversation import ConversationError
    from data.images import ImageFormat
    from data.index import pictures
    from data.options import FORMATS
    from data.records import stream
    from data.shards import build, folder

    root = _root(options)
    size, mean, std, resize = FORMATS[options.format]
    form = ImageFormat(size, mean, std, resize)
    files = [annotation_path(root, dataset.annotation) for dataset in _datasets(options)]
    unsound: list[str] = []

    def paths() -> Iterator[str]:
        for file in files:
            for record in stream(file):
                try:
                    yield from pictures(record.value) if isinstance(record.value, dict) else ()
                except ConversationError as error:
                    unsound.append(f"{file}, record {record.number}: {error}")

    bar = Bar("pictures")
    made, broken = build(root, paths(), form, options.aspect, options.workers, bar.show)
    bar.close()
    place = folder(root, form, options.aspect)
    print(f"{made:,} pictures in {place}" if made else "no pictures: nothing is written")
    for why in (*unsound[:5], *broken[:5]):
        print(f"  {why}")
    if (lost := len(unsound) + len(broken)) > 5:
        print(f"  {lost:,} in all; `check` lists them")
    return 1 if lost else 0


COMMANDS = {
    "plan": plan,
    "unpack": unpack,
    "check": check,
    "index": index,
    "pixels": pixels,
    "convert": convert,
}


def _root(options: argparse.Namespace, must: bool = True) -> Path:
    root = os.path.expanduser(os.path.expandvars(options.root))
    if "$" in root:
        raise ValueError(
            f"--root is {options.root}, and that variable is not set: export it, or say --root FOLDER"
        )
    if Path(root).exists() and not Path(root).is_dir():
        raise ValueError(f"--root: {root} is no folder")
    if must and not Path(root).is_dir():
        raise ValueError(f"--root: there is no folder {root}; `mkdir` it, or mend DATA_ROOT")
    return Path(root)


def _datasets(options: argparse.Namespace):  # type: ignore[no-untyped-def]
    from data.catalog import resolve

    return [dataset for dataset, _ in resolve(dict.fromkeys(options.mix, 1.0))]


def _tokenizer(options: argparse.Namespace):  # type: ignore[no-untyped-def]
    from data.tokenizer_file import TokenizerFile

    return TokenizerFile(options.tokenizer) if options.tokenizer else None
