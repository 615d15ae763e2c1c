"""A check's result as a terminal table, as JSON, and as one HTML page with pictures and histograms in it."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.checking import Report
from data.findings import KINDS
from data.images import ImageError, thumbnail
from data.inspection import paths_of, shown
from data.padding import fill
from data.whole import whole

MOST = 1 << 18  # samples, drawn at random, on whose lengths the ways of batching are compared
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 70rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .8rem; text-align: left; vertical-align: top }
tr:nth-child(even) { background: #f4f4f4 }
.lost { color: #b00020; font-weight: 600 }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem }
.sample { border: 1px solid #ddd; padding: .8rem; font-size: 13px; overflow-wrap: anywhere }
.sample img { max-width: 100% }
"""


def as_json(report: Report) -> dict[str, Any]:
    """All of a check but the findings themselves, in plain values."""
    lengths = np.frombuffer(report.lengths, dtype=np.int32) if report.lengths else np.empty(0, np.int32)
    result: dict[str, Any] = {
        "root": str(report.root),
        "template": report.options.template,
        "max_length": report.options.max_length,
        "patches": report.options.patches,
        "records": sum(file.records for file in report.files),
        "lost": report.lost,
        "files": [{**vars(file), "kinds": dict(file.kinds)} for file in report.files],
        "found": dict(report.findings.counts),
        "pictures_by_longer_side": dict(sorted(report.sides.items())),
    }
    if len(lengths):
        signed = np.frombuffer(report.signed, dtype=np.int32)
        supervised, tokens = (
            sum(getattr(file, key) for file in report.files) for key in ("supervised", "tokens")
        )
        result |= {
            "lengths": {str(key): value for key, value in _histogram(lengths)},
            "length_mean": float(lengths.mean()),
            "length_quantiles": {
                str(q): int(np.quantile(lengths, q)) for q in (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
            },
            "supervised_share": supervised / tokens,
            "filled_slots": fill(*_some(lengths, signed), report.options.max_length),
        }
    return result


def as_text(report: Report, facts: dict[str, Any]) -> str:
    """The table for a terminal."""
    lines = [_row("data set", "records", "catalog", "pictures", "turns", "lost", "notes")]
    for file in report.files:
        lost = sum(count for kind, count in file.kinds.items() if KINDS[kind].lost)
        expected = f"{'' if file.exact else '~'}{file.expected:,}" if file.expected else "-"
        notes = sum(file.kinds.values()) - lost
        counts = (file.records, file.pictures, file.turns, lost, notes)
        records, pictures, turns, gone, noted = (f"{count:,}" for count in counts)
        lines.append(_row(file.name, records, expected, pictures, turns, gone, noted))
    if "lengths" in facts:
        spread = ", ".join(f"{float(q):.0%} {value}" for q, value in facts["length_quantiles"].items())
        lines += [
            "",
            f"tokens a sample, patches included: mean {facts['length_mean']:.0f}; {spread}",
            f"learnt tokens: {facts['supervised_share']:.1%}",
            "filled slots:",
            *(f"  {name:40} {share:.3f}" for name, share in facts["filled_slots"].items()),
        ]
    by_kind = report.findings.counts
    for kind in sorted(by_kind, key=lambda kind: (not KINDS[kind].lost, kind)):
        known = KINDS[kind]
        lines += ["", f"{'LOST' if known.lost else 'note'}  {kind}: {known.what} ({by_kind[kind]:,})"]
        lines += [f"      way out: {known.way_out}" + (f"; --fix {known.fix}" if known.fix else "")]
        for finding in report.findings.first[kind]:
            name = f" (id {finding.id})" if finding.id else ""
            where = f"record {finding.record}{name}" if finding.record >= 0 else "the file"
            lines.append(f"      {finding.file or report.root}, {where}: {finding.detail}".rstrip(": "))
        if (more := by_kind[kind] - len(report.findings.first[kind])) > 0:
            lines.append(f"      and {more:,} more")
    lines += ["", f"{report.lost:,} lost" if report.lost else "nothing would be lost"]
    return "\n".join(lines)


def as_html(report: Report, facts: dict[str, Any]) -> str:
    """One page, pictures and all."""
    lost = f'<span class="lost">{report.lost:,} lost</span>' if report.lost else "nothing would be lost"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Data check</title><style>{_STYLE}</style>",
        f"<h1>Data under {html.escape(str(report.root))}</h1><p>{facts['records']:,} records; {lost}.",
        _table(
            ("data set", "records", "catalog", "pictures", "turns"),
            [
                (
                    file.name,
                    f"{file.records:,}",
                    f"{file.expected:,}",
                    f"{file.pictures:,}",
                    f"{file.turns:,}",
                )
                for file in report.files
            ],
        ),
    ]
    if "lengths" in facts:
        filled = [(name, f"{share:.3f}") for name, share in facts["filled_slots"].items()]
        parts += [
            "<h2>Tokens a sample</h2>",
            f"<p>Image patches included; {facts['supervised_share']:.1%} of them are learnt.",
            _bars(facts["lengths"].items()),
            "<h2>Filled slots</h2>",
            _table(("batching", "share of slots with a token"), filled),
        ]
    if report.sides:
        parts += ["<h2>Pictures by their longer side</h2>", _bars(sorted(report.sides.items()))]
    parts.append("<h2>Findings</h2>")
    rows, counts = [], report.findings.counts
    for kind in sorted(counts, key=lambda kind: (not KINDS[kind].lost, kind)):
        known = KINDS[kind]
        examples = "; ".join(f"record {f.record}: {f.detail}" for f in report.findings.first[kind])
        rows.append(
            ("LOST" if known.lost else "note", known.what, f"{counts[kind]:,}", known.way_out, examples)
        )
    parts.append(_table(("", "what", "how often", "way out", "first ones"), rows))
    parts += ["<h2>Samples</h2><div class=samples>", *(_sample(report, *sample) for sample in report.samples)]
    return "\n".join([*parts, "</div></html>\n"])


def write(report: Report, folder: Path) -> dict[str, Any]:
    """Write check.json, which lists all findings, and check.html into a folder; the facts that as_text takes."""
    facts = as_json(report)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "check.json") as file:
        file.write(json.dumps(facts, indent=1).removesuffix("\n}") + ',\n "findings": [')
        for number, finding in enumerate(report.findings):
            file.write(("," if number else "") + "\n  " + json.dumps(finding._asdict()))
        file.write("\n ]\n}\n")
    with whole(folder / "check.html", errors="backslashreplace") as file:
        file.write(as_html(report, facts))
    return facts


def _some(lengths: np.ndarray, signed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(lengths) <= MOST:
        return lengths, signed
    chosen = np.sort(np.random.default_rng(0).choice(len(lengths), MOST, replace=False))
    return lengths[chosen], signed[chosen]


def _histogram(lengths: np.ndarray, bins: int = 24) -> list[tuple[int, int]]:
    width = max(1, -(-int(lengths.max()) // bins))
    counts = np.bincount(lengths // width, minlength=1)
    return [(at * width, int(count)) for at, count in enumerate(counts)]


def _row(name: str, *values: str) -> str:
    return f"{name:24}" + "".join(f"{value:>12}" for value in values)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', head)}</tr>{body}</table>"


def _bars(counts: Iterable[tuple[Any, int]]) -> str:
    """A histogram as SVG."""
    pairs = list(counts)
    most, width = max(count for _, count in pairs) or 1, 900 // max(1, len(pairs))
    shapes = []
    for at, (label, count) in enumerate(pairs):
        high = round(160 * count / most)
        left, word = at * width, html.escape(f"{label}: {count:,}")
        shapes.append(
            f'<rect x="{left}" y="{170 - high}" width="{width - 2}" height="{high}" fill="#3b6ea8">'
            f"<title>{word}</title></rect>"
            f'<text x="{left}" y="186" font-size="10">{html.escape(str(label))}</text>'
        )
    return f'<svg viewBox="0 0 910 195" width="910" role="img">{"".join(shapes)}</svg>'


def _sample(report: Report, source: str, record: dict[str, Any]) -> str:
    pictures = []
    for path in paths_of(record)[:2]:
        try:
            data = base64.b64encode(thumbnail(report.root / path, 256)).decode()
            pictures.append(f'<img alt="" src="data:image/jpeg;base64,{data}">')
        except (ImageError, OSError):
            pictures.append(f"<p class=lost>{html.escape(path)} cannot be read")
    turns = [
        f"<p><b>{html.escape(turn['from'])}</b> {html.escape(shown(turn['value']))}"
        for turn in record["conversations"][:6]
    ]
    return f"<div class=sample><i>{html.escape(source)}</i>{''.join(pictures)}{''.join(turns)}</div>"
