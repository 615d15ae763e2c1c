"""Run folders with a history, written by the writers that runs use: for tests of what tells of runs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from launch.files import append_line, write_json
from launch.identity import plain
from launch.metrics import JsonlTracker
from launch.plan import load
from launch.record import RunFolder
from tests.launch.chain import write

BEGAN = 1_790_000_000.0
STAGES = {"align": ("", 40), "instruct": ("align", 120), "moe": ("instruct", 400)}
LAYERS, EXPERTS = 4, 8
COLOURS = {"red": "#d92626", "green": "#1f9e3c", "blue": "#2653d9", "yellow": "#f2cf1f"}


def digest(name: str) -> str:
    """A digest as handoffs have them, another for each name."""
    return "".join(f"{(ord(name[i % len(name)]) * 7 + i) % 16:x}" for i in range(64))


def experiments(folder: Path, sweep: str = "moe.top_k") -> Path:
    """Align, instruct with two requeues, and a sweep of two sparse runs, one of them preempted; the runs' root."""
    specs = write(folder, sweep3=f"sweep: {{{sweep}: [1, 2]}}\n").parent
    root = folder / "runs"
    above: dict[str, Path] = {}
    for n, (stage, (after, steps)) in enumerate(STAGES.items()):
        experiment = load(specs / f"s{n + 1}.yaml")
        for index, (point, spec) in enumerate(experiment.points):
            path = root / experiment.name / (point or "run")
            record = {
                "id": f"{experiment.name}-{index}",
                "name": f"{experiment.name}/{point or 'run'}",
                "experiment": experiment.name,
                "point": point,
                "index": index,
                "stage": stage,
                "parent": str(above[after]) if after else None,
                "identity": digest(stage),
                "parent_identity": "",
                "code": "0f3a",
            }
            one_run(
                RunFolder(path), record, plain(spec), steps, restarts=2 * (stage == "instruct") + index, at=n
            )
            above[stage] = path
    return root


def one_run(
    folder: RunFolder, record: dict[str, Any], spec: dict[str, Any], steps: int, *, restarts: int, at: int
) -> None:
    """A finished run whose attempts were each preempted or lost, but the last."""
    write_json(folder.run_file, record)
    write_json(folder.spec_file, spec)
    parent = RunFolder(Path(record["parent"])).handoff_file if record["parent"] else None
    now, done = BEGAN + at * 4000, 0

    def note(event: str, **facts: object) -> None:
        append_line(folder.journal_file, {"event": event, "time": round(now, 3), **facts})

    note("submitting", batch=str(folder.path.parents[1] / "batches" / "b"), index=record["index"])
    rng = random.Random(str(folder.path.name))
    for attempt in range(restarts + 1):
        name, last = f"{100 + at}_{record['index']}-{attempt}", attempt == restarts
        begun = now + 35
        now += 40
        note("launched", attempt=name, node=f"n{at + 1}{attempt}", job_started=begun)
        before, now = folder.last_metrics(), now + 15
        facts = {"number": attempt, "world": 4, "steps": steps, "samples": 6000, "step": done}
        note("start", attempt=name, node=f"n{at + 1}{attempt}", **facts,
             last=before.get("step", 0), last_time=before.get("time", 0.0))  # fmt: skip
        reach = steps if last else int(steps * (attempt + 1) / (restarts + 1)) - 7
        tracker = JsonlTracker(folder.metrics_file, start_step=done)
        for step in range(done + 1, reach + 1):
            seconds = 0.9 + 0.1 * rng.random()
            now += seconds
            tracker.log(step, row(step, steps, seconds, rng, sparse=record["stage"] == "moe") | {"time": now})
            if step % 20 == 0:
                done = step
                note("saved", attempt=name, step=step)
        tracker.finish("")
        if not last:
            why = ("preempted", "SIGUSR2") if attempt % 2 == 0 else ("infrastructure", "a node was lost: n21")
            if why[0] == "preempted":
                done = reach
                note("saved", attempt=name, step=reach)
            note("verdict", attempt=name, verdict=why[0], reason=why[1], again=True)
    note("evaluating", attempt=name)
    now += 12
    evaluation(folder, record["stage"], rng)
    above = json.loads(parent.read_text())["digest"] if parent else None
    facts = {"step": steps, "path": f"checkpoints/step_{steps:08}", "digest": digest(record["name"])}
    write_json(folder.handoff_file, {**facts, "stage": record["stage"], "run": record["id"], "parent": above})
    sources = {"llava<b>": 3000, "sharegpt4v": 1200}
    counts = {"samples": 6000, "cut": 12, "dropped": 3, "replaced_count": 1, "padding": 0.07}
    write_json(folder.path / "data.json", {**counts, "sources": sources})
    note("ended", attempt=name, outcome="finished", reason="")


def row(step: int, steps: int, seconds: float, rng: random.Random, *, sparse: bool) -> dict[str, Any]:
    """What a step measures."""
    ce = 4 * math.exp(-3 * step / steps) + 0.4 + 0.2 * rng.random()
    measured: dict[str, Any] = {
        "loss": ce + 0.01 * sparse, "ce": ce, "aux": 1.0 * sparse, "grad_norm": 0.6 + rng.random(),
        "lr": 2e-5 * (1 + math.cos(math.pi * step / steps)) / 2, "tokens": 4096, "samples": 8, "padding": 0.07,
        "step_seconds": seconds, "samples_per_second": 8 / seconds, "tokens_per_second": 4096 / seconds,
    }  # fmt: skip
    if step == 3:
        measured["loss"] = float("nan")
    for layer in range(LAYERS * sparse):
        spread = 3.0 * math.exp(-step / 60) + 0.1 * layer
        counts = [
            int(400 * (1 + spread * abs(math.sin(7 * e + layer)))) + rng.randrange(60) for e in range(EXPERTS)
        ]
        measured[f"moe/layer{2 * layer}/counts"] = counts
        measured[f"moe/layer{2 * layer}/dropped"] = sum(max(0, count - 900) for count in counts) / sum(counts)
    return measured


def evaluation(folder: RunFolder, stage: str, rng: random.Random) -> None:
    """Held-out questions about drawn pictures, answered rightly more often the later the stage."""
    share, answers = {"align": 0.1, "instruct": 0.6, "moe": 0.8}[stage], []
    for n, (colour, code) in enumerate(list(COLOURS.items()) * 6):
        image = Image.new("RGB", (160, 160), "#77706a")
        ImageDraw.Draw(image).ellipse((40, 40, 120, 120), fill=code, outline="black", width=4)
        file = folder.path.parents[1] / "pictures" / f"{colour}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
        said = colour if rng.random() < share else "grey"
        kind, text = (
            ("color", "<image>\nWhat color is it?") if n % 2 else ("shape", "<image>\nIs it a <circle>?")
        )
        answers.append(
            {"question": text, "images": [str(file)], "answer": colour, "said": said, "kind": kind}
        )
    right = [row["said"] == row["answer"] for row in answers]
    kinds = {
        kind: {
            "questions": len(answers) // 2,
            "accuracy": sum(right[kind == "color" :: 2]) / (len(answers) // 2),
        }
        for kind in ("color", "shape")
    }
    facts = {"questions": len(answers), "accuracy": sum(right) / len(right), "majority": 0.25}
    write_json(folder.eval_file, {**facts, "majority_by_kind": 0.25, "by_kind": kinds, "answers": answers})
