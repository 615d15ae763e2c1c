"""What came of a plan: a table a stage, held-out accuracy, tokens per expert, answers, and the loss as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launch.files import read_json, read_lines
from launch.plan import Plan, Run
from launch.progress import span
from launch.record import RunFolder

ANSWERS = 3  # shown, of different kinds where there are as many


def show(plan: Plan) -> None:
    """Print the report of a finished plan, and draw its loss curves beside its last run."""
    runs = [run for stage in (*plan.earlier, *plan.stages) for run in stage.runs]
    for line in lines(runs):
        print(line)


def lines(runs: Sequence[Run]) -> Iterator[str]:
    """The report, line by line."""
    yield ""
    head = f"{'stage':10}{'run':32}{'steps':>7}{'loss first':>12}{'last':>9}"
    yield f"{head}{'samples/s':>11}{'time':>14}{'held-out':>10}"
    for run in runs:
        rows = list(read_lines(run.folder.metrics_file))
        if not rows:
            continue
        seconds = sum(float(row.get("step_seconds", 0.0)) for row in rows)
        samples = sum(int(row.get("samples", 0)) for row in rows)
        result = read_json(run.folder.eval_file)
        accuracy = f"{result['accuracy']:.1%}" if result else "-"
        yield (
            f"{run.spec.stage:10}{run.name.removesuffix('/run'):32}{rows[-1]['step']:>7}{_mean(rows[:5]):>12.3f}"
            f"{_mean(rows[-20:]):>9.3f}{samples / max(seconds, 1e-9):>11.0f}{span(wall(run.folder)):>14}{accuracy:>10}"
        )
    last = runs[-1]
    if result := read_json(last.folder.eval_file):
        yield (
            f"{'':10}{'majority answer, over all':73}{'':12}{result['majority']:>10.1%}\n"
            f"{'':10}{'majority answer, kind by kind':73}{'':12}{result['majority_by_kind']:>10.1%}"
        )
    yield from expert_lines(last.folder)
    if result:
        yield ""
        yield f"held-out questions ({result['questions']}):"
        for row in picked(result["answers"]):
            yield f"  {(row['images'] or ['(no picture)'])[0]}"
            question = " ".join(row["question"].replace("<image>", " ").split())
            yield f"    {question}  ->  {row['said']!r}  (right: {row['answer']!r})"
    yield ""
    picture = last.folder.path / "loss.png"
    draw(runs, picture)
    yield f"loss curves   {picture}"
    if handoff := read_json(last.folder.handoff_file):
        yield f"checkpoint    {last.folder.path / handoff['path']}"
    start = last.folder.last("start")
    if start:
        yield f"logs          {last.folder.logs(start['attempt'])}"
    yield f"W&B           {last.folder.path / 'wandb'}"


def expert_lines(folder: RunFolder) -> Iterator[str]:
    """Tokens each expert was given over the last 50 steps, a line a sparse layer."""
    totals: dict[str, list[int]] = {}
    for row in list(read_lines(folder.metrics_file))[-50:]:
        for key, counts in row.items():
            if key.startswith("moe/layer") and key.endswith("/counts"):
                before = totals.get(key, [0] * len(counts))
                totals[key] = [a + int(b) for a, b in zip(before, counts, strict=True)]
    if totals:
        yield ""
        yield "tokens per expert, over the last 50 steps:"
    for key, counts in totals.items():
        share = "  ".join(f"{count:>8} ({count / max(1, sum(counts)):4.0%})" for count in counts)
        yield f"  layer {key.removeprefix('moe/layer').removesuffix('/counts'):>2}: {share}"


def picked(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few answers of different kinds, with pictures where there are some."""
    with_pictures = [row for row in answers if row["images"]] or list(answers)
    kinds: dict[str, dict[str, Any]] = {}
    for row in with_pictures:
        kinds.setdefault(row["question"].split("?")[0], row)
    return list(kinds.values())[:ANSWERS]


def wall(folder: RunFolder) -> float:
    """Seconds the run's attempts took, start to end."""
    total, begun = 0.0, 0.0
    for record in folder.journal:
        if record["event"] == "start":
            begun = record["time"]
        elif record["event"] in ("ended", "verdict") and begun:
            total, begun = total + record["time"] - begun, 0.0
    return total


def draw(runs: Sequence[Run], picture: Path) -> None:
    """The loss of each run over its steps, one panel a stage, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    stages = list(dict.fromkeys(run.spec.stage for run in runs))
    figure, panels = pyplot.subplots(1, len(stages), figsize=(4.5 * len(stages), 3.2), squeeze=False)
    for stage, panel in zip(stages, panels[0], strict=True):
        for run in runs:
            if run.spec.stage != stage:
                continue
            rows = [row for row in read_lines(run.folder.metrics_file) if "loss" in row]
            panel.plot(
                [row["step"] for row in rows], [row["loss"] for row in rows], label=run.point or None, lw=1
            )
        panel.set(title=stage, xlabel="step", ylabel="loss")
        if any(run.point for run in runs if run.spec.stage == stage):
            panel.legend(fontsize=7)
    figure.tight_layout()
    beside = picture.with_suffix(".part")
    figure.savefig(beside, format="png", dpi=120)
    beside.replace(picture)
    pyplot.close(figure)


def _mean(rows: Sequence[dict[str, Any]]) -> float:
    return sum(float(row["loss"]) for row in rows) / max(1, len(rows))
