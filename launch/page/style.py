"""The style sheet of a report: one column of cards, two themes, and paper.

Every colour has a name in THEMES, so that a test can measure its contrast: texts at least 4.5 to 1 on what
they lie on, lines and areas at least 3 to 1 (WCAG 2.2, 1.4.3 and 1.4.11). Curves differ in dashes too.
"""

from __future__ import annotations

THEMES: dict[str, dict[str, str]] = {
    "light": {
        "page": "#f4f5f7", "card": "#ffffff", "text": "#1c2430", "soft": "#566070", "rule": "#dde1e7",
        "good": "#17704a", "bad": "#b3312c", "link": "#1d5fa8", "mark": "#7a5c00", "on": "#ffffff",
        "c0": "#1f66b0", "c1": "#c4500f", "c2": "#1a7f5a", "c3": "#8547a6", "c4": "#94690a", "c5": "#566070",
        "q0": "#0b3f7a", "q1": "#3a76b8", "q2": "#8fb6de", "q3": "#cfe0f1", "q4": "#eceef1", "q5": "#fbdcc0",
        "q6": "#f0a867", "q7": "#d46f1f", "q8": "#8f3d06",
        "train": "#1a7f5a", "save": "#8547a6", "eval": "#1f66b0", "load": "#6a7586", "start": "#566070",
        "replay": "#c4500f", "lost": "#b3312c", "queue": "#94690a",
    },
    "dark": {
        "page": "#12161c", "card": "#1a2029", "text": "#e7ebf1", "soft": "#a3aebd", "rule": "#323b48",
        "good": "#5cc796", "bad": "#ff8a80", "link": "#82b8f5", "mark": "#e0b64a", "on": "#10141a",
        "c0": "#6cacf0", "c1": "#f5935a", "c2": "#52c295", "c3": "#c596e3", "c4": "#d8af4c", "c5": "#a3aebd",
        "q0": "#7db6f2", "q1": "#4d86c4", "q2": "#355f8e", "q3": "#2a4260", "q4": "#2b323d", "q5": "#553c28",
        "q6": "#8f5a26", "q7": "#cc7d33", "q8": "#ffb573",
        "train": "#52c295", "save": "#c596e3", "eval": "#6cacf0", "load": "#96a1b0", "start": "#a3aebd",
        "replay": "#f5935a", "lost": "#ff8a80", "queue": "#d8af4c",
    },
}  # fmt: skip

RULES = """
* { box-sizing: border-box }
html { background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  -webkit-print-color-adjust: exact; print-color-adjust: exact }
body { max-width: 1120px; margin: 0 auto; padding: 28px 20px 48px }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; overflow-wrap: anywhere }
h2 { font-size: 17px; margin: 34px 0 10px } h3 { font-size: 15px; margin: 0 0 2px; overflow-wrap: anywhere }
p { margin: 4px 0 } small, .soft { color: var(--soft) } small { font-size: 12px; font-weight: 400 }
a { color: var(--link) } code { font: 12.5px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  overflow-wrap: anywhere }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 16px 18px;
  margin: 0 0 14px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 10px;
  margin: 18px 0 0 }
.tiles div { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 10px 14px }
.tiles b { display: block; font-size: 22px; line-height: 1.25; font-variant-numeric: tabular-nums }
.tiles span { font-size: 12px; color: var(--soft) }
.chain { display: flex; flex-wrap: wrap; align-items: stretch; gap: 8px }
.chain > div { flex: 1 1 210px; min-width: 0; display: flex; flex-direction: column; justify-content: center;
  gap: 8px }
.chain .card { margin: 0; padding: 12px 14px }
.chain > i { align-self: center; flex: 0 0 auto; font-style: normal; color: var(--soft); font-size: 20px }
.badge { display: inline-block; border: 1px solid currentColor; border-radius: 99px; padding: 0 8px;
  font-size: 12px;
  line-height: 18px; white-space: nowrap }
.good { color: var(--good) } .bad { color: var(--bad) }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 14px 18px }
.wide { grid-column: 1 / -1 }
figure { margin: 0; min-width: 0 } figcaption { font-size: 13px; font-weight: 600; margin: 0 0 2px }
svg { display: block; width: 100%; height: auto } svg text { fill: var(--soft); font-size: 10.5px }
.wide svg text { font-size: 11px }
path.grid { stroke: var(--rule); fill: none; stroke-width: 1 }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round } .band { stroke: none;
  opacity: .17 }
.d1 { stroke-dasharray: 7 3 } .d2 { stroke-dasharray: 2 3 }
.mark path { stroke: var(--mark); stroke-dasharray: 3 3; fill: none }
  .mark text { fill: var(--mark) !important }
.strip { fill: transparent } .strip:hover { fill: var(--soft); opacity: .22 }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 12px; color: var(--soft); margin: 2px 0 8px }
.key span { display: inline-flex; align-items: center; gap: 6px } .key i { width: 12px; height: 12px;
  border-radius: 3px }
.key svg { width: 26px; height: 8px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 13.5px } th { text-align: left;
  color: var(--soft); font-weight: 600 }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top }
  tr:last-child td { border-bottom: 0 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.stack { display: flex; height: 26px; border-radius: 6px; overflow: hidden; background: var(--rule);
  margin: 4px 0 12px }
.stack span { color: var(--on); font-size: 11px; line-height: 26px; padding: 0 0 0 6px; overflow: hidden;
  white-space: nowrap;
  border-right: 1px solid var(--card) }
.meter { position: relative; height: 12px; border-radius: 4px; background: var(--rule); width: 280px }
@media (max-width: 720px) { .meter { width: 120px } }
.card h3 + .scroll { margin: 0 0 14px } .scroll + h3 { margin-top: 16px }
.meter b { display: block; height: 100%; border-radius: 4px; background: var(--c0) }
.meter i { position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--text) }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 12px }
.answers figure { border: 1px solid var(--rule); border-radius: 8px; padding: 10px; background: var(--card) }
.answers img { width: 100%; max-height: 150px; object-fit: contain; border-radius: 5px;
  background: var(--page); display: block;
  margin: 0 0 8px } .answers p { font-size: 13px; overflow-wrap: anywhere }
details { margin: 0 0 8px } details img { max-width: 100% }
summary { cursor: pointer; font-weight: 600; font-size: 14px; padding: 4px 0 }
footer { color: var(--soft); font-size: 12px; margin: 28px 0 0 }
@media (max-width: 720px) { .wide { overflow-x: auto } .wide svg { min-width: 620px }
  .chain > i { display: none } .panels { grid-template-columns: 1fr } }
.scores th:first-child { width: 36% } .scores th.n { width: 8% }
@media print { :root { --page: #fff } table { font-size: 10px } th, td { padding-right: 7px } .meter { width: 150px }
  body { max-width: none; padding: 0 } .card, figure, tr { break-inside: avoid }
  h2, h3 { break-after: avoid }
  .strip { display: none } .scroll { overflow: visible } html { font-size: 12px } }
"""


def sheet() -> str:
    """The whole style sheet."""
    light, dark = (_theme(THEMES[name]) for name in ("light", "dark"))
    marks = [f".c{n}{{stroke:var(--c{n})}}.band.c{n}{{fill:var(--c{n})}}" for n in range(6)]
    marks += [f".q{n}{{fill:var(--q{n})}}i.q{n}{{background:var(--q{n})}}" for n in range(9)]
    parts = ("train", "save", "eval", "load", "start", "replay", "lost", "queue")
    marks += [f".p-{name}{{background-color:var(--{name})}}" for name in parts]
    themes = f":root{{color-scheme:light dark;{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return themes + RULES.strip() + "".join(marks)


def _theme(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())
