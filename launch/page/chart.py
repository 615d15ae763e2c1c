"""Curves, heat maps and bars as SVG and HTML text; colours come from the page's style sheet, for both themes.

Nothing runs in the page: what a pointer shows of a step is the <title> of an invisible strip over it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from launch.page.facts import Cell, Curves, Point

STRIPS = 64  # that say their numbers under a pointer
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 12.0, 22.0
# Share of an expert over the even share; what lies below the first bound has the colour q0, and so on.
BOUNDS = (0.1, 0.4, 0.7, 0.9, 1.1, 1.4, 2.0, 3.0)


@dataclass(frozen=True)
class Series:
    """One curve: (step, number over its bin) in the order of steps."""

    label: str
    points: Sequence[tuple[float, Point]]
    place: int = 0  # which colour and dashes


def plain(value: float) -> str:
    """A number as an axis has it: 2e-5, 0.013, 1.2, 340, 12k, 3.1M."""
    size = abs(value)
    if size == 0:
        return "0"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    if size < 1e-3:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:.3g}" if size < 1000 else f"{value:,.0f}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between two, about `count` of them."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, int(high / step + 1e-9) + 1)]


def powers(low: float, high: float) -> list[float]:
    """Round numbers between two for an axis of logarithms."""
    span = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    whole = [10.0**n for n in span if low <= 10.0**n <= high]
    if len(whole) >= 2:
        return whole[:: -(-len(whole) // 5)]
    return [m * 10.0**n for n in span for m in (1, 2, 5) if low <= m * 10.0**n <= high]


@dataclass(frozen=True)
class Axes:
    """Where numbers lie in a picture."""

    width: float
    height: float
    steps: tuple[float, float]
    values: tuple[float, float]
    log: bool = False

    def x(self, step: float) -> float:
        first, last = self.steps
        return LEFT + (step - first) / max(last - first, 1e-9) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.values
        value = min(max(value, low), high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.height - BOTTOM - (value - low) / max(high - low, 1e-12) * (self.height - TOP - BOTTOM)

    def frame(self) -> str:
        """Grid and numbers."""
        parts = []
        tall = max(2, int((self.height - TOP - BOTTOM) / 32))
        for value in powers(*self.values) if self.log else ticks(*self.values, tall):
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{self.width - RIGHT:.0f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{plain(value)}</text>')
        for step in ticks(*self.steps, int(self.width / 75)):
            x = min(self.x(step), self.width - RIGHT - 8)
            parts.append(
                f'<text x="{x:.1f}" y="{self.height - 7:.0f}" text-anchor="middle">{plain(step)}</text>'
            )
        return "".join(parts)


def curve(
    title: str,
    series: Sequence[Series],
    *,
    marks: Iterable[tuple[float, str, str]] = (),
    size: tuple[float, float] = (340, 180),
    zero: bool = False,
    unit: str = "",
    values: tuple[float, float] | None = None,
    wide: bool = False,
) -> str:
    """Curves over steps with the spread of each bin, as a figure; `marks` are (step, label, words)."""
    series = [one for one in series if one.points]
    if not series:
        return ""
    points = [point for one in series for _, point in one.points]
    low, high = min(p.low for p in points), _top(series)
    log = not zero and low > 0 and high / low > 30
    if not log:
        low = 0.0 if zero or 0 < low < high * 0.4 else low
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = (low if low == 0 else low - room), high + room
    steps = min(one.points[0][0] for one in series), max(one.points[-1][0] for one in series)
    if values:
        low, high, log = *values, False
    axes = Axes(*size, (0.0 if steps[0] < steps[1] * 0.1 else steps[0], steps[1]), (low, high), log)
    parts = [axes.frame()]
    for step, label, words in marks:
        if axes.steps[0] < step <= axes.steps[1]:
            parts.append(_mark(axes, step, label, words))
    for one in series:
        if any(p.high > p.low for _, p in one.points) and len(series) < 4:
            above = [f"{axes.x(s):.1f} {axes.y(p.high):.1f}" for s, p in one.points]
            below = [f"{axes.x(s):.1f} {axes.y(p.low):.1f}" for s, p in reversed(one.points)]
            parts.append(f'<path class="band c{one.place % 6}" d="M{"L".join((*above, *below))}Z"/>')
    for one in series:
        line = "L".join(f"{axes.x(s):.1f} {axes.y(p.mean):.1f}" for s, p in one.points)
        dot = "" if len(one.points) > 1 else "h.01"
        parts.append(f'<path class="line c{one.place % 6} d{one.place // 6 % 3}" d="M{line}{dot}"/>')
    parts += _strips(axes, series, unit)
    picture = _svg(size, "".join(parts), f"{title} over steps")
    small = "".join(f" <small>{text}</small>" for text in (unit, "logarithmic" * log) if text)
    head = f"<figcaption>{escape(title)}{small}</figcaption>" if title else ""
    return f"<figure{' class=wide' * wide}>{head}{picture}</figure>"


def _top(series: Sequence[Series]) -> float:
    """The highest value, less the few that would press all else flat."""
    highs = sorted(point.high for one in series for _, point in one.points)
    usual = highs[min(len(highs) - 1, int(len(highs) * 0.98))]
    return highs[-1] if highs[-1] < usual * 3 or usual <= 0 else usual * 1.2


def _mark(axes: Axes, step: float, label: str, words: str) -> str:
    x = axes.x(step)
    return (
        f'<g class="mark"><title>{escape(words)}</title><path d="M{x:.1f} {TOP}V{axes.height - BOTTOM}"/>'
        f'<text x="{x + 3:.1f}" y="{TOP + 8}">{escape(label)}</text></g>'
    )


def _strips(axes: Axes, series: Sequence[Series], unit: str) -> Iterable[str]:
    """Invisible columns that say their numbers under a pointer."""
    longest = max(series, key=lambda one: len(one.points))
    every = -(-len(longest.points) // STRIPS)
    width = (axes.width - LEFT - RIGHT) / max(1, len(longest.points) / every)
    near = [dict(one.points) for one in series]
    for step, _ in longest.points[::every]:
        words = [f"step {step:,.0f}"]
        for one, found in zip(series, near, strict=True):
            if point := found.get(step):
                spread = f" ({plain(point.low)} to {plain(point.high)})" if point.high > point.low else ""
                name = f"{one.label}: " if one.label else ""
                words.append(f"{name}{plain(point.mean)}{unit and ' ' + unit}{spread}")
        x, tall = axes.x(step) - width / 2, axes.height - TOP - BOTTOM
        yield (
            f'<rect class="strip" x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{tall:.0f}">'
            f"<title>{escape(chr(10).join(words))}</title></rect>"
        )


def heat(curves: Curves, layer: int, *, width: float = 340) -> str:
    """Which expert of a layer got which share of the choices, a row an expert, over the steps."""
    cells = [(place, cell) for place, cell in curves.cells.items() if layer in cell.layers]
    experts = len(cells[0][1].layers[layer])
    tall = max(1.5, min(16.0, 150 / experts))
    wide = (width - LEFT - RIGHT) / len(cells)
    levels: dict[int, list[str]] = {}
    strips = []
    for column, (place, cell) in enumerate(cells):
        x = LEFT + column * wide
        for expert, level in enumerate(_levels(cell, layer)):
            levels.setdefault(level, []).append(
                f"M{x:.1f} {expert * tall:.1f}h{wide + 0.2:.1f}v{tall - 0.6:.1f}h-{wide + 0.2:.1f}z"
            )
        if column % (-(-len(cells) // STRIPS)) == 0:
            words = _shares(curves.step(place), cell.layers[layer])
            strips.append(
                f'<rect class="strip" x="{x:.1f}" y="0" width="{wide:.1f}" height="{experts * tall:.1f}">'
                f"<title>{words}</title></rect>"
            )
    names = range(experts) if tall > 9 else (0, experts - 1)
    texts = [
        f'<text x="{LEFT - 6}" y="{(n + 0.5) * tall + 3.5:.1f}" text-anchor="end">{n}</text>' for n in names
    ]
    bottom = experts * tall
    axes = Axes(width, bottom + BOTTOM, (0, curves.last), (0, 1))
    for step in ticks(0, curves.last, 4):
        texts.append(
            f'<text x="{min(axes.x(step), width - RIGHT - 8):.1f}" y="{bottom + 14:.1f}" text-anchor="middle">'
            f"{plain(step)}</text>"
        )
    paths = [f'<path class="q{level}" d="{"".join(found)}"/>' for level, found in sorted(levels.items())]
    return _svg(
        (width, bottom + BOTTOM - 4), "".join((*paths, *texts, *strips)), f"load of layer {layer}'s experts"
    )


def _levels(cell: Cell, layer: int) -> list[int]:
    counts = cell.layers[layer]
    even = max(1e-9, sum(counts) / len(counts))
    return [sum(count / even >= bound for bound in BOUNDS) for count in counts]


def _shares(step: float, counts: Sequence[int]) -> str:
    every = max(1, sum(counts))
    order = sorted(range(len(counts)), key=lambda n: -counts[n])
    named = [*order[:4], *order[-2:]] if len(order) > 8 else sorted(order)
    return f"step {step:,.0f}" + "".join(f"&#10;expert {n}: {counts[n] / every:.1%}" for n in named)


def stack(parts: Sequence[tuple[str, float, str]]) -> str:
    """A bar cut into parts of (name, size, words); the style sheet has a colour for each name."""
    every = sum(size for _, size, _ in parts) or 1.0
    spans = []
    for name, size, words in parts:
        share = size / every
        if share < 0.0005:
            continue
        inside = escape(name) if share > 0.08 else ""
        spans.append(
            f'<span class="p-{name}" style="width:{share:.3%}" title="{escape(words)}">{inside}</span>'
        )
    return f'<div class="stack">{"".join(spans)}</div>'


def meter(share: float, mark: float | None, words: str) -> str:
    """A bar of a share of one, with a mark to compare with."""
    line = f'<i style="left:{mark:.1%}"></i>' if mark is not None else ""
    return f'<div class="meter" title="{escape(words)}"><b style="width:{share:.1%}"></b>{line}</div>'


def _svg(size: tuple[float, float], inside: str, label: str) -> str:
    width, height = size
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">{inside}</svg>'
    )
