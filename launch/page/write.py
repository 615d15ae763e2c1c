"""The verb `report`: runs, or a whole chain of stages, as one HTML file that needs nothing else.

It can be mailed: pictures are inside, nothing is fetched, no script runs. What it says of settings has been
through launch.redact.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from launch.exits import FAILED, OK
from launch.files import write_text
from launch.operating.ledger import brief
from launch.operating.logs import complain
from launch.operating.show import look
from launch.page import answers, parts
from launch.page.facts import Story, chain, story
from launch.page.style import sheet
from launch.record import RunFolder

SECTIONS = (
    ("Lineage", parts.lineage),
    ("Training", parts.training),
    ("Router balance", parts.routers),
    ("Held-out answers", answers.answers),
    ("Where the time went", parts.goodput),
    ("Attempts", parts.attempts),
    ("Data", answers.data),
    ("Settings that differ", answers.settings),
    ("Where things are", answers.places),
)


def report(chosen: Sequence[RunFolder], options: argparse.Namespace) -> int:
    """Write the page of the runs that are named and of all they start from."""
    if not chosen:
        return complain(f"no runs in {options.runs}: there is nothing to report")
    seen = look(chosen, options.runs)
    every = chain(seen.lines, lambda folders: look(folders, options.runs).lines)
    stories = [story(line) for line in every]
    out: Path = options.out or _place(chosen, options.runs)
    try:
        write_text(out, page(stories))
    except OSError as error:
        complain(f"{out}: {error.strerror}; say --out FILE in a folder that you may write to")
        return FAILED
    size = out.stat().st_size
    if options.json:
        print(json.dumps({"report": str(out), "bytes": size, "runs": [one.name for one in stories]}))
    else:
        print(f"{out}  {len(stories)} run(s), {size / 1e6:.1f} MB")
    return OK


def _place(chosen: Sequence[RunFolder], root: Path) -> Path:
    """Beside the runs: in the one run's folder, in the experiment's, else in the folder of runs."""
    if len(chosen) == 1:
        return chosen[0].path / "report.html"
    parents = {folder.path.parent for folder in chosen}
    return (parents.pop() if len(parents) == 1 else root) / "report.html"


def page(stories: Sequence[Story]) -> str:
    """The whole page."""
    last = stories[-1]
    several = len({one.experiment for one in stories if one.experiment == last.experiment}) > 1
    title = last.experiment if several or last.point else last.name
    made = time.strftime("%Y-%m-%d %H:%M %Z")
    path = " &#8594; ".join(dict.fromkeys(escape(one.stage) for one in stories))
    count = f"{len(stories)} run{'s' * (len(stories) > 1)}"
    body = [f"<h1>{escape(title)}</h1><p class=soft>{count}, {path}. State of {made}.</p>{_tiles(stories)}"]
    body += [
        f"<section><h2>{name}</h2>{html}</section>" for name, make in SECTIONS if (html := make(stories))
    ]
    body.append(
        "<footer>Made by <code>launch/runs.py report</code> from the run folders. Point at a curve or a bar for its "
        "numbers; bands reach from the lowest to the highest step of a bin.</footer>"
    )
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        # No icon: a browser would ask the server for one.
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{sheet()}</style>'
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{chr(10).join(body)}</body></html>\n'


def _tiles(stories: Sequence[Story]) -> str:
    """The few numbers asked for first."""
    last = max(stories, key=lambda one: (bool(one.held_out), one is stories[-1]))
    best = min(
        (one for one in stories if one.experiment == stories[-1].experiment),
        key=lambda one: one.curves.tail("loss") or float("inf"),
    )
    allocated = sum(one.ledger.allocated for one in stories)
    train = sum(one.ledger.seconds["train"] for one in stories)
    hours = sum(one.ledger.gpu_hours for one in stories)
    restarts = sum(max(0, len(one.tries) - 1) for one in stories)
    loss = best.curves.tail("loss")
    tiles = [
        (
            "loss at the end" + (f", {best.point}" if best.point else ""),
            "-" if loss is None else f"{loss:.3f}",
        )
    ]
    if last.held_out:
        scores = [one for one in stories if one.experiment == last.experiment and one.held_out]
        top = max(scores, key=lambda one: float(one.held_out["accuracy"]))
        name = "held-out, right" + (f", {top.point}" if top.point else "")
        tiles.append((name, f"{top.held_out['accuracy']:.1%}"))
    tiles.append(("goodput", f"{train / allocated:.1%}" if allocated else "-"))
    tiles.append(("GPU-hours", f"{hours:,.1f}") if hours else ("time of all runs", brief(allocated)))
    tiles.append(("steps kept", f"{sum(one.curves.last for one in stories):,}"))
    tiles.append(("restarts", str(restarts)))
    boxes = "".join(f"<div><b>{value}</b><span>{escape(name)}</span></div>" for name, value in tiles)
    return f'<div class="tiles">{boxes}</div>'
