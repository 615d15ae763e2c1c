"""The sections of a report about training: lineage, curves, router balance, time and attempts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

from launch.files import read_json
from launch.operating.ledger import PARTS, brief
from launch.page.chart import BOUNDS, Series, curve, heat, plain, stack
from launch.page.embed import picture
from launch.page.facts import Point, Story, Try

# (title, name in metrics.jsonl, unit, whether the axis starts at 0)
PANELS = (
    ("learning rate", "lr", "", True),
    ("gradient norm", "grad_norm", "", False),
    ("samples a second", "samples_per_second", "", True),
    ("tokens a second, supervised", "tokens_per_second", "", True),
    ("time of a step", "step_seconds", "s", True),
    ("cross entropy", "ce", "", False),
    ("balancing loss", "aux", "", False),
    ("padding", "padding", "share of slots", True),
    ("model FLOPs used", "mfu", "share of peak", True),
    ("GPU memory, largest", "gpu_memory_max_gb", "GB", True),
    ("memory of rank 0", "rss_gb", "GB", True),
    ("model TFLOP/s a rank", "model_tflops", "", True),
)
MARKS = 24  # of attempts in a picture, at most
WORDS = {
    "queue": "waiting in the queue",
    "start": "from SLURM's start to the ranks",
    "load": "imports, rendezvous, model, data",
    "train": "steps that are kept",
    "replay": "steps computed again after a restart",
    "save": "saving",
    "eval": "held-out questions",
    "lost": "hangs, teardown and failures",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Rows of HTML cells; `numbers` are the columns that stand to the right."""
    kind = [' class="n"' if n in numbers else "" for n in range(len(head))]
    top = "".join(f"<th{k}>{escape(text)}</th>" for k, text in zip(kind, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{cell}</td>" for k, cell in zip(kind, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def stages(stories: Sequence[Story]) -> list[list[Story]]:
    """Runs of one experiment together, in the order given."""
    found: dict[str, list[Story]] = {}
    for story in stories:
        found.setdefault(story.experiment, []).append(story)
    return list(found.values())


def lineage(stories: Sequence[Story]) -> str:
    """Stage 1 -> 2 -> 3: each run, what it left, and whether the next one started from exactly that."""
    by_path = {story.folder.path: story for story in stories}
    columns = []
    for group in stages(stories):
        boxes = []
        for story in group:
            parent = by_path.get(Path(str(story.record.get("parent"))))
            boxes.append(
                f'<div class="card"><small>stage {escape(story.stage)}</small><h3>{escape(story.name)}</h3>'
                f"{state(story)}{_left(story)}{_start(story, parent)}</div>"
            )
        columns.append(f"<div>{''.join(boxes)}</div>")
    return f'<div class="chain">{"<i aria-hidden=true>&#8594;</i>".join(columns)}</div>'


def state(story: Story) -> str:
    """What became of a run, as a badge."""
    name = story.line.state.name
    mark = {"done": "good", "failed": "bad", "stopped": "bad", "blocked": "bad"}.get(name, "soft")
    steps = f"{story.curves.last:,} of {story.line.state.steps:,}" if story.line.state.steps else "no"
    why = f"<p><small>{escape(story.line.state.reason)}</small></p>" if mark == "bad" else ""
    return f'<p><span class="badge {mark}">{escape(name)}</span> {steps} steps</p>{why}'


def _left(story: Story) -> str:
    if not story.handoff:
        return '<p class="soft"><small>no handoff yet</small></p>'
    digest, step = str(story.handoff["digest"]), story.handoff["step"]
    return f'<p><small>leaves step {step}</small> <code title="{digest}">{digest[:12]}</code></p>'


def _start(story: Story, parent: Story | None) -> str:
    named = story.handoff.get("parent")
    if not story.record.get("parent"):
        return "<p><small>starts from the backbone's own weights</small></p>"
    if not named or parent is None or not parent.handoff:
        return "<p><small>starts from the stage before</small></p>"
    code = f"<code>{escape(str(named)[:12])}</code>"
    if named == parent.handoff["digest"]:
        return f'<p><small class="good">&#10003; from {code}, as the stage before left it</small></p>'
    return f'<p><small class="bad">&#10007; from {code}, which the stage before no longer has</small></p>'


def training(stories: Sequence[Story]) -> str:
    """The curves, stage by stage; the runs of a sweep share their axes."""
    return "".join(_stage(group) for group in stages(stories) if any(story.curves.cells for story in group))


def _stage(group: Sequence[Story]) -> str:
    one = len(group) == 1
    marks = [
        (float(attempt.first), str(attempt.number), _restart(story, attempt))
        for story in group
        for attempt in story.tries
        if attempt.number > 1 and attempt.world
    ]
    marks = marks if len(marks) <= MARKS else []  # they would hide the curves; the table of attempts has them
    figures = []
    for title, name, unit, zero in (("loss", "loss", "", False), *PANELS):
        if title == "cross entropy" and not any(story.curves.layers for story in group):
            continue  # the loss is nothing else
        series = [
            Series(story.point or ("" if one else story.name), story.curves.of(name), n)
            for n, story in enumerate(group)
        ]
        if name in ("aux", "mfu", "padding") and not any(p.high for s in series for _, p in s.points):
            continue
        wide = name == "loss"
        size = (1060.0, 250.0) if wide else (340.0, 170.0)
        figures.append(curve(title, series, marks=marks, zero=zero, unit=unit, size=size, wide=wide))
    heading = f"<h3>{escape(group[0].experiment)} <small>stage {escape(group[0].stage)}</small></h3>"
    key = "" if one else _key([story.point or story.name for story in group])
    facts = "".join(f"<p><small>{escape(text)}</small></p>" for text in _times(group))
    return f'<div class="card">{heading}{key}<div class="panels">{"".join(figures)}</div>{facts}</div>'


def _restart(story: Story, attempt: Try) -> str:
    before = story.tries[attempt.number - 2].ended
    point = f"{story.point}: " if story.point else ""
    return f"{point}attempt {attempt.number} goes on from step {attempt.first}; the one before {before}"


def _key(names: Sequence[str]) -> str:
    swatch = '<svg viewBox="0 0 26 8"><path class="line c{} d{}" d="M1 4H25"/></svg>'
    spans = [f"<span>{swatch.format(n % 6, n // 6 % 3)}{escape(name)}</span>" for n, name in enumerate(names)]
    return f'<div class="key">{"".join(spans)}</div>'


def _times(group: Sequence[Story]) -> list[str]:
    lines = []
    for story in group:
        marks = [(name, story.curves.percentile(share)) for name, share in
                 (("median", 0.5), ("95th", 0.95), ("99th", 0.99), ("longest", 1.0))]  # fmt: skip
        if marks[0][1] is None:
            continue
        words = ", ".join(f"{name} {plain(value)} s" for name, value in marks if value is not None)
        bad = story.curves.unusable
        lost = f"; the loss of {bad} step{'s' * (bad > 1)} was no number" if bad else ""
        lines.append(f"{story.point + ': ' if story.point else ''}step time {words}{lost}")
    return lines


def routers(stories: Sequence[Story]) -> str:
    """Of each sparse layer the load of its experts, its evenness, and what capacity dropped."""
    parts = []
    for story in stories:
        if not (layers := story.curves.layers):
            continue
        panels, named = [], _named(story, layers)
        for layer in layers:
            even = story.curves.evenness(layer)
            end = sum(value for _, value in even[-10:]) / len(even[-10:])
            lost = story.curves.mean(f"moe/layer{layer}/dropped")
            dropped = "" if lost is None else f", {lost:.2%} dropped"
            least = min(0.8, *(value for _, value in even))
            series = Series("evenness", [(step, Point(value)) for step, value in even])
            line = curve("", [series], size=(340, 84), values=(least, 1.0))
            drops = story.curves.of(f"moe/layer{layer}/dropped")
            if any(point.high for _, point in drops):
                line += curve("", [Series("dropped", drops, 1)], size=(340, 84), zero=True)
            panels.append(
                f"<figure><figcaption>{named[layer]} <small>evenness at the end {end:.3f}{dropped}</small></figcaption>"
                f"{heat(story.curves, layer)}{line}</figure>"
            )
        heading = f"<h3>{escape(story.name)}</h3>"
        image = folder_picture(story)
        parts.append(f'<div class="card">{heading}<div class="panels">{"".join(panels)}</div>{image}</div>')
    if not parts:
        return ""
    bounds = ["0", *(f"{bound:g}" for bound in BOUNDS)]
    names = [*(f"{low} to {high}" for low, high in pairwise(bounds)), f"over {bounds[-1]}"]
    swatches = "".join(f'<span><i class="q{n}"></i>{name}</span>' for n, name in enumerate(names))
    text = (
        "<p>Colour: an expert's share of a layer's choices over the even share, a row an expert. The curve below is "
        "the evenness: the entropy of the shares over log E, 1 when all experts get the same. Where capacity drops "
        "choices, their share stands under it.</p>"
    )
    return f'{text}<div class="key">{swatches}</div>{"".join(parts)}'


def _named(story: Story, layers: Sequence[int]) -> dict[int, str]:
    """Metrics count the sparse layers from 0; by their places among all, where the evaluation noted these."""
    noted = read_json(story.folder.path / "routing.json") or {}
    places = sorted({int(share["layer"]) for share in noted.get("shares", [])})
    if len(places) == len(layers):
        return {layer: f"layer {place}" for layer, place in zip(layers, places, strict=True)}
    return {layer: f"sparse layer {layer}" for layer in layers}


def folder_picture(story: Story) -> str:
    """Which experts the held-out questions went to, drawn when the run was evaluated."""
    file = story.folder.path / "routing.png"
    if not file.is_file():
        return ""
    words = "which experts text and image tokens of held-out questions go to"
    return f"<details><summary>{words}</summary>{picture(file, whole=True)}</details>"


def goodput(stories: Sequence[Story]) -> str:
    """Where each run's time went."""
    bars, rows = [], []
    for story in stories:
        seconds = story.ledger.seconds
        share = "-" if story.ledger.goodput is None else f"{story.ledger.goodput:.1%}"
        parts = [(p, seconds[p], f"{p}: {brief(seconds[p])}, {WORDS[p]}") for p in PARTS]
        bars.append(f"<p>{escape(story.name)} <small>goodput {share}</small></p>{stack(parts)}")
        hours = f"{story.ledger.gpu_hours:,.1f}" if story.ledger.gpu_hours else "-"
        rows.append((escape(story.name), share, hours, *(brief(seconds[part]) for part in PARTS)))
    key = "".join(f'<span><i class="p-{p}"></i>{p}: {escape(WORDS[p])}</span>' for p in PARTS)
    head = ("run", "goodput", "GPU-hours", *PARTS)
    return (
        f'<div class="card">{"".join(bars)}<div class="key">{key}</div>'
        f"{table(head, rows, range(1, len(head)))}</div>"
    )


def attempts(stories: Sequence[Story]) -> str:
    """Each attempt and why it ended."""
    rows = [
        (
            escape(story.name), str(attempt.number), _clock(attempt.begun), brief(attempt.seconds),
            f"{attempt.first:,} to {attempt.last:,}" if attempt.world else "none",
            f"{attempt.world or '-'}", escape(attempt.node), escape(attempt.ended),
        )
        for story in stories
        for attempt in story.tries
    ]  # fmt: skip
    head = ("run", "attempt", "began", "took", "steps", "ranks", "on", "how it ended")
    return f'<div class="card">{table(head, rows, (1, 3, 4, 5))}</div>' if rows else ""


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if at else "-"
