"""The verb `dashboard`: a chain's saved workspace and report on W&B, made or brought up to date."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.exits import FAILED, OK
from launch.files import read_json
from launch.operating.logs import complain
from launch.operating.show import Line, look
from launch.page.facts import chain
from launch.record import RunFolder
from launch.snapshot import REPOSITORY

SECONDS = 300


def dashboard(chosen: Sequence[RunFolder], options: argparse.Namespace) -> int:
    """Send the views, and print where they are."""
    from launch.tracking import environment

    if not chosen:
        return complain(f"no runs in {options.runs}: there is nothing to show")
    lines = chain(look(chosen, options.runs).lines, lambda found: look(found, options.runs).lines)
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "launch.online.panels"],
                input=json.dumps(facts(lines)),
                cwd=REPOSITORY,
                env=environment(Path(folder)),
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
            said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            said = {"error": f"W&B did not take it within {SECONDS} s; try again later"}
        except (ValueError, IndexError):
            said = {
                "error": (done.stderr.strip().splitlines() or ["the process that talks to W&B failed"])[-1]
            }
    if "error" in said:
        complain(said["error"])
        return FAILED
    print(
        json.dumps(said) if options.json else f"workspace  {said['workspace']}\nreport     {said['report']}"
    )
    return OK


def facts(lines: Sequence[Line]) -> dict[str, Any]:
    """What launch.online.panels is told of a chain."""
    runs = []
    for line in lines:
        record, handoff = line.folder.run, read_json(line.folder.handoff_file) or {}
        runs.append(
            {
                **{key: str(record.get(key) or "") for key in ("id", "experiment", "stage", "parent")},
                "name": line.short,
                "digest": str(handoff.get("digest", "")),
                "step": handoff.get("step", 0),
                "from": str(handoff.get("parent") or ""),
            }
        )
    last = lines[-1].folder.spec.get("wandb", {})
    kept = [run for run in runs if run["experiment"]]  # a model of the hub is no run on W&B
    return {
        "entity": str(last.get("entity") or ""),
        "project": str(last.get("project") or "moe-vlm"),
        "experiment": runs[-1]["experiment"],
        "runs": kept,
    }
