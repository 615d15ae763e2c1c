"""Make the demo's DATA_ROOT: crops of scikit-image's photos and drawn scenes, laid out as MoE-LLaVA's data.

`python data/demo.py FOLDER [--seed 0] [--scale 1]`. Folders, annotation schema, file names and prefixes of
image paths are those of the LanguageBind/MoE-LLaVA data set, so that the demo takes the path real data take.
A scene is one to three outlined shapes of one or two looks. Held-out scenes are drawn first and kept out of all
other files; colors, shapes, places and numbers are drawn evenly; no conversation tells what it asks later.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

MARK = "demo.json"  # written last; a folder without it is not ours to touch
RECIPE = 1  # raise it when the same seed makes other data than before


def make(folder: Path, seed: int = 0, scale: float = 1.0) -> bool:
    """Make the data in `folder`, all at once or not at all; False when they are there already.

    `scale` multiplies all counts. Seed, scale and the versions of Pillow and scikit-image decide every byte.
    Raises DemoError when the folder holds anything else.
    """
    from data.studio import DemoError, build

    wanted = {"recipe": RECIPE, "seed": seed, "scale": scale}
    if (folder / MARK).is_file():
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if {key: found.get(key) for key in wanted} == wanted:
            return False
        differs = ", ".join(
            f"{key} {found.get(key)} and not {value}"
            for key, value in wanted.items()
            if found.get(key) != value
        )
        raise DemoError(f"{folder} holds other demo data ({differs}): remove it, or name another folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DemoError(f"{folder} holds something else than demo data: name a new or an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        rows = build(scratch, seed, scale)
        mark = json.dumps({**wanted, "rows": rows}, indent=1) + "\n"
        (scratch / MARK).write_text(mark, encoding="utf-8")
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError as fault:
            if (folder / MARK).is_file():  # another process was faster
                return make(folder, seed, scale)
            raise DemoError(
                f"{folder} cannot be put in place ({fault}): name a new or an empty folder"
            ) from fault
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def _positive(text: str) -> float:
    number = float(text) if text.replace(".", "", 1).isdecimal() else math.nan
    if not 0 < number <= 1000:
        raise argparse.ArgumentTypeError(f"expected a number above 0, at most 1000, got {text!r}")
    return number


def main(arguments: list[str] | None = None) -> int:
    """Make the data; its exit code: 0, 2 where they cannot be made, 130 after Ctrl-C."""
    from data.studio import DemoError
    from data.words import refused

    parser = argparse.ArgumentParser(prog="python data/demo.py", description="Make the demo's DATA_ROOT.")
    parser.add_argument("folder", type=Path, help="a new folder for it")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--scale", type=_positive, default=1.0, help="multiplies the number of samples")
    options = parser.parse_args(arguments)
    try:
        made = make(options.folder, options.seed, options.scale)
    except DemoError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except OSError as fault:
        print(f"error: {refused(fault, options.folder)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command begins again", file=sys.stderr)
        return 130
    rows = json.loads((options.folder / MARK).read_text(encoding="utf-8"))["rows"]
    word = "made" if made else "already there, nothing to do"
    print(f"demo data: {word}: {sum(rows.values())} samples in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    importlib.import_module("launch.door").enter("data.demo")
