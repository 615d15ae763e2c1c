"""The sections of a report about what was learnt and from what: answers, data, settings, places."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from launch.operating.compare import Difference, differences
from launch.page.chart import meter
from launch.page.embed import picture
from launch.page.facts import Story
from launch.page.parts import stages, table

SHOWN = 12  # answers, of different kinds, right and wrong


def same(said: str, answer: str) -> bool:
    """As launch.evaluate compares them."""
    return said.strip().rstrip(".").strip().lower() == answer.strip().rstrip(".").strip().lower()


def answers(stories: Sequence[Story]) -> str:
    """Held-out accuracy, all and by kind, and answers of the last run that has some, with pictures."""
    asked = [story for story in stories if story.held_out]
    if not asked:
        return ""
    rows = []
    for story in asked:
        result = story.held_out
        share = float(result["accuracy"])
        words = f"{share:.1%} of {result['questions']}; the commonest answer {result['majority']:.1%}"
        rows.append(
            (
                escape(story.name),
                f"{share:.1%}",
                meter(share, float(result["majority"]), words),
                str(result["questions"]),
            )
        )
    last = asked[-1]
    parts = [table(("run", "right", "", "questions"), rows, (1, 3)), _kinds(last)]
    cards = "".join(_card(row) for row in picked(last.held_out.get("answers", [])))
    return (
        f'<div class="card scores">{"".join(parts)}<p><small>Exact match. The line on a bar: what always giving the '
        f"commonest answer gets.</small></p></div><p>What {escape(last.name)} answers:</p>"
        f'<div class="answers">{cards}</div>'
    )


def _kinds(story: Story) -> str:
    by_kind = story.held_out.get("by_kind") or {}
    if len(by_kind) < 2:
        return ""
    truth: dict[str, Counter[str]] = {}
    for row in story.held_out.get("answers", []):
        truth.setdefault(str(row.get("kind", "")), Counter())[str(row["answer"]).strip().lower()] += 1
    rows = []
    for kind, found in by_kind.items():
        share, count = float(found["accuracy"]), int(found["questions"])
        common = truth[kind].most_common(1)[0][1] / max(1, count) if kind in truth else None
        rows.append((escape(kind), f"{share:.1%}", meter(share, common, f"{kind}: {share:.1%}"), str(count)))
    return f"<h3>{escape(story.name)}, by kind</h3>" + table(("kind", "right", "", "questions"), rows, (1, 3))


def picked(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Some answers, wrong ones among them: of each kind in turn, with pictures first."""
    piles: dict[tuple[str, bool], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: not row.get("images")):
        piles.setdefault((str(row.get("kind", "")), same(row["said"], row["answer"])), []).append(row)
    order = sorted(piles, key=lambda key: (key[1], key[0]))
    found: list[Mapping[str, Any]] = []
    while len(found) < SHOWN and any(piles.values()):
        found += [piles[key].pop(0) for key in order if piles[key]]
    return sorted(found[:SHOWN], key=lambda row: str(row.get("kind", "")))


def _card(row: Mapping[str, Any]) -> str:
    question = " ".join(str(row["question"]).replace("<image>", " ").split())
    pictures = "".join(picture(Path(path)) for path in list(row.get("images") or [])[:2])
    right = same(row["said"], row["answer"])
    mark = '<b class="good">&#10003;</b>' if right else '<b class="bad">&#10007;</b>'
    truth = "" if right else f'<p class="soft">right: {escape(str(row["answer"]))}</p>'
    kind = f"<small>{escape(str(row.get('kind', '')))}</small>"
    said = f"<p>{mark} {escape(str(row['said']) or '(nothing)')}</p>"
    return f"<figure>{pictures}<p>{escape(question)}</p>{said}{truth}{kind}</figure>"


def data(stories: Sequence[Story]) -> str:
    """What each run drew from its data."""
    rows = []
    for story in stories:
        found = story.data
        mix = found.get("sources") or {}
        spread = ", ".join(f"{escape(str(name))} {count:,}" for name, count in mix.items())
        rows.append((
            escape(story.name), f"{found.get('samples', 0):,}" if found else "-",
            f"{story.curves.samples:,}", spread or escape(_mix(story.spec)),
            _count(found, "cut"), _count(found, "dropped"), _count(found, "replaced_count"),
            f"{float(found['padding']):.1%}" if "padding" in found else "-",
        ))  # fmt: skip
    head = ("run", "samples there", "trained on", "drawn from", "cut", "left out", "replaced", "padding")
    return f'<div class="card">{table(head, rows, (1, 2, 4, 5, 6, 7))}</div>'


def _mix(spec: Mapping[str, Any]) -> str:
    mix = spec.get("data", {}).get("mix", "")
    return ", ".join(map(str, mix)) if isinstance(mix, (dict, list)) else str(mix)


def _count(found: Mapping[str, Any], key: str) -> str:
    return f"{int(found[key]):,}" if key in found else "-"


def settings(stories: Sequence[Story]) -> str:
    """What differs between the points of a sweep, and between each stage and the one before it."""
    parts = []
    by_path = {story.folder.path: story for story in stories}
    for group in stages(stories):
        if len(group) > 1:
            parts.append(_sweep(group))
        parent = by_path.get(Path(str(group[0].record.get("parent"))))
        if parent and parent.spec:  # a model of the hub has none
            found = list(differences(parent.spec, group[0].spec))
            words = (
                f"{escape(group[0].name)} beside {escape(parent.name)} <small>{len(found)} settings</small>"
            )
            parts.append(
                f"<details{' open' * (len(found) < 9)}><summary>{words}</summary>{_table(found)}</details>"
            )
    return f'<div class="card">{"".join(parts)}</div>' if parts else ""


def _sweep(group: Sequence[Story]) -> str:
    changed = dict.fromkeys(d.key for other in group[1:] for d in differences(group[0].spec, other.spec))
    if not changed:
        return ""
    rows = [
        (f"<code>{escape(key)}</code>", *(f"<code>{_value(_at(story.spec, key))}</code>" for story in group))
        for key in changed
    ]
    loss = [story.curves.tail("loss") for story in group]
    rows.append(("loss at the end", *("-" if value is None else f"{value:.3f}" for value in loss)))
    if any(story.held_out for story in group):
        right = [f"{s.held_out['accuracy']:.1%}" if s.held_out else "-" for s in group]
        rows.append(("held-out, right", *right))
    names = [story.point or story.name for story in group]
    return f"<h3>{escape(group[0].experiment)}, its points</h3>" + table(("setting", *names), rows)


def _table(found: Sequence[Difference]) -> str:
    rows = [
        (f"<code>{escape(d.key)}</code>", f"<code>{_value(d.was)}</code>", f"<code>{_value(d.now)}</code>")
        for d in found
    ]
    return table(("setting", "stage before", "here"), rows)


def _at(spec: Mapping[str, Any], key: str) -> Any:
    value: Any = spec
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _value(value: Any) -> str:
    return "-" if value is None else escape(json.dumps(value))


def places(stories: Sequence[Story]) -> str:
    """Where everything of the runs is."""
    return "".join(
        f'<div class="card"><h3>{escape(story.name)}</h3>{table(("what", "where"), list(_places(story)))}</div>'
        for story in stories
    )


def _places(story: Story) -> Iterator[tuple[str, str]]:
    def code(text: object) -> str:
        return f"<code>{escape(str(text))}</code>"

    folder = story.folder
    yield "run folder", code(folder.path)
    if story.handoff:
        yield "checkpoint handed on", code(folder.path / str(story.handoff["path"]))
        yield "its digest", code(story.handoff["digest"])
    if story.tries:
        yield "logs of the last attempt", code(folder.logs(story.tries[-1].name))
    yield "every step's numbers", code(folder.metrics_file)
    if story.record.get("code"):
        yield "code it ran", code(story.record["code"])
    yield (
        "W&B",
        f'<a href="{escape(story.url)}">{escape(story.url)}</a>'
        if story.url
        else code(story.record.get("id")),
    )
