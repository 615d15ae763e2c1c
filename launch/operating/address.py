"""Which runs a word on the command line means: a name or a part of it, an experiment, a pattern, an id, a
YAML.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from launch.batches import Batches
from launch.faults import did_you_mean
from launch.operating.status import label
from launch.operating.survey import survey
from launch.record import RunFolder

HELP = (
    "a run's name or a part that only it has; an experiment; a pattern ('*/lr=1e-5'); an experiment's YAML; "
    "a run's id; SLURM's id (4242 or 4242_3)"
)


def name(folder: RunFolder, root: Path) -> str:
    """A run's name: its folder below the folder of runs; of what lies elsewhere, what its record says."""
    path, below = str(folder.path), f"{root}/"
    return path[len(below) :] if path.startswith(below) and path[len(below)] != "." else label(path)


def choose(
    found: Sequence[RunFolder], root: Path, words: Sequence[str], *, parts: bool = True
) -> list[RunFolder]:
    """The runs that are meant, all for no words; LookupError says which word means none.

    With `parts` a part of a name means every run that has it; without, as for what changes runs, one.
    """
    if not words:
        return list(found)
    chosen: dict[Path, RunFolder] = {}
    for word in words:
        whole, loose = _matches(found, root, word)
        if not whole and len(loose) > 1 and not parts:
            names = ", ".join(name(folder, root) for folder in loose[:6]) + ", ..." * (len(loose) > 6)
            raise LookupError(
                f"{word} may mean {names}; say more of the name, or a pattern such as '*{word}*'"
            )
        if not (meant := whole or loose):
            otherwise = "see `runs.py list`" if found else "there are none"
            near = did_you_mean(word, [name(folder, root) for folder in found], otherwise)
            raise LookupError(f"{word}: no such run in {root}; {near}")
        chosen |= {folder.path: folder for folder in meant}
    return list(chosen.values())


def _matches(found: Sequence[RunFolder], root: Path, word: str) -> tuple[list[RunFolder], list[RunFolder]]:
    """The runs that a word names outright, and those that it only begins or is part of."""
    names = [(folder, name(folder, root).removesuffix("/run")) for folder in found]
    if word.endswith((".yaml", ".yml")) and Path(word).is_file():
        word = _experiment(Path(word))
    word = word.removesuffix("/run").rstrip("/")
    if exact := [folder for folder, text in names if text == word]:
        return exact, []
    if inside := [folder for folder, text in names if text.startswith(word + "/")]:
        return inside, []
    if any(character in word for character in "*?["):
        return [folder for folder, text in names if fnmatch.fnmatchcase(text, word)], []
    loose = [folder for folder, text in names if text.startswith(word)]
    if loose := loose or [folder for folder, text in names if word in text]:
        return [], loose
    facts, batches = survey(found, root), Batches()
    if exact := [folder for folder, fact in zip(found, facts, strict=True) if fact.id == word]:
        return exact, []
    if word.replace("_", "", 1).isdigit():
        array, _, index = word.partition("_")
        return [
            folder
            for folder, fact in zip(found, facts, strict=True)
            if fact.batch
            and index in ("", str(fact.element))
            and str(batches[fact.batch].get("job", "")) == array
        ], []
    return [], [folder for folder, fact in zip(found, facts, strict=True) if fact.id.startswith(word)]


def _experiment(file: Path) -> str:
    """The name of a YAML's experiment, read as submit.py does; where it is broken, its file's."""
    from launch.plan import load
    from launch.reader import SpecError

    try:
        return load(file).name
    except SpecError:
        return file.stem
