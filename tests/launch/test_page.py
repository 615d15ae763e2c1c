"""The report: one file that says what the run folders say, and that a browser shows without asking for more."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from launch.files import write_json
from launch.operating.verbs import main
from launch.page import chart
from launch.page.facts import CELLS, Curves
from launch.page.style import THEMES, sheet
from launch.record import RunFolder
from tests.browser import Browser, browser
from tests.launch.told import BEGAN, digest, experiments


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experiments(tmp_path_factory.mktemp("told"))


@pytest.fixture(scope="module")
def chain(root: Path) -> Path:
    """The page of the whole chain."""
    assert main(["--runs", str(root), "report", "s3"]) == 0
    return root / "s3" / "report.html"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


def text(page: Path) -> str:
    """What a reader sees of the page, without its pictures."""
    body = page.read_text().partition("<body>")[2]
    plain = re.sub(
        r"<(?:svg|title)[\s\S]*?</(?:svg|title)>|<[^>]*>", " ", body.replace("</code>,", "</code>")
    )
    return " ".join(unescape(plain).split())


def colours(picture: Path) -> tuple[int, float]:
    """How many colours a picture has, and the share of the commonest."""
    with Image.open(picture) as image:
        small = image.convert("RGB").reduce(2)
        found = small.getcolors(1 << 24)
        return len(found), max(count for count, _ in found) / (small.width * small.height)


def test_a_browser_shows_the_page_and_asks_for_nothing_else(
    chain: Path, tab: Browser, tmp_path: Path
) -> None:
    looks = {
        "light": {},
        "dark": {"dark": True},
        "phone": {"width": 390},
        "paper": {"media": "print", "width": 760},
    }
    dominant = {}
    for name, options in looks.items():
        seen = tab.open(chain, **options)  # type: ignore[arg-type]
        assert [url for url in seen.requests if not url.startswith("data:")] == [chain.as_uri()], name
        assert seen.complaints == [], name
        assert tab.script("document.documentElement.scrollWidth <= innerWidth"), f"{name} is too wide"
        number, dominant[name] = colours(tab.picture(tmp_path / f"{name}.png"))
        assert number > 100, name
        assert dominant[name] < 0.9, name
    with Image.open(tmp_path / "light.png") as light, Image.open(tmp_path / "dark.png") as dark:
        assert light.getpixel((2, 2)) == (0xF4, 0xF5, 0xF7, 255)[: len(light.getbands())]
        assert dark.getpixel((2, 2)) == (0x12, 0x16, 0x1C, 255)[: len(dark.getbands())]
    tab.open(chain)
    # Each picture of the page is there and has its place: no curve outside its frame, no answer without its scene.
    assert tab.script("[...document.images].every(i => i.naturalWidth > 0) && document.images.length") == 12
    inside = """[...document.querySelectorAll('svg')].every(svg => [...svg.querySelectorAll('path.line, path.band')]
        .every(p => { const b = p.getBBox(), v = svg.viewBox.baseVal;
                      return b.x >= 0 && b.y >= 0 && b.x + b.width <= v.width && b.y + b.height <= v.height }))"""
    assert tab.script(inside)


def test_the_browser_would_see_a_request_or_a_fault(tab: Browser, tmp_path: Path) -> None:
    """That the test above can fail."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<img src='http://localhost:1/x.png'><script>console.error('no'); undefined_name()</script>"
    )
    seen = tab.open(bad)
    assert "http://localhost:1/x.png" in seen.requests
    assert len(seen.complaints) >= 2
    empty = tmp_path / "empty.html"
    empty.write_text("")
    tab.open(empty)
    assert colours(tab.picture(tmp_path / "empty.png")) == (1, 1.0)


def test_the_page_says_what_happened(chain: Path) -> None:
    said, html = text(chain), chain.read_text()
    assert said.startswith("s3 4 runs, align → instruct → moe.")
    for stage, run in (
        ("align", "s1/run"),
        ("instruct", "s2/run"),
        ("moe", "s3/top_k=1"),
        ("moe", "s3/top_k=2"),
    ):
        assert f"stage {stage} {run.removesuffix('/run')} done" in said
        assert digest(run)[:12] in said
        assert digest(run) in said  # under "where things are"
    assert said.count("✓ from") == 3
    assert "33 to 73 4 n21 was lost to its nodes or the network: a node was lost: n21" in said
    assert "60 to 120 4 n22 finished" in said
    assert "attempt 3 goes on from step 60; the one before was lost to its nodes" in html
    assert re.search(r"layer 6 evenness at the end 0\.99\d, \d\.\d\d% dropped", said)
    assert (
        'class="line c1 d0"' in html.partition("Router balance")[2].partition("Held-out")[0]
    )  # drops, as a curve
    assert "llava<b> 3,000" in said
    assert "llava<b>" not in html
    assert "moe.top_k 1 2" in said
    assert "the loss of 1 step was no number" in said
    assert re.search(r"s2 57\.4% 0\.2 1m45s 15s 45s 1m54s 12s 0s 12s 0s", said)
    assert "<script" not in html
    assert not re.search(r"""(?:src|href)=["'](?!data:)|url\(|@import""", html)


def test_one_run_s_page_lies_in_its_folder_and_names_its_parents(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--runs", str(root), "report", "s2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == str(root / "s2" / "run" / "report.html")
    assert told["runs"] == ["s1", "s2"]
    out = tmp_path / "of two.html"
    assert main(["--runs", str(root), "report", "s1", "s2", "--out", str(out)]) == 0
    assert text(out).startswith("s2 2 runs")
    assert main(["--runs", str(root), "report", "s2", "--out", str(tmp_path / "of two.html" / "x")]) == 1
    assert "say --out FILE" in capsys.readouterr().err
    assert main(["--runs", str(root), "report", "s9"]) == 2
    assert main(["--runs", str(tmp_path), "report", "x"]) == 2


def test_a_chain_that_no_longer_fits_is_marked(tmp_path: Path, tab: Browser) -> None:
    root = experiments(tmp_path)
    handoff = RunFolder(root / "s1" / "run").handoff_file
    write_json(handoff, json.loads(handoff.read_text()) | {"digest": "f" * 64})
    for name in ("metrics.jsonl", "eval.json", "data.json", "handoff.json", "attempts.jsonl"):
        (root / "s3" / "top_k=1" / name).unlink()  # planned, and never started
    (root / "pictures" / "red.png").write_bytes(b"no picture")
    (root / "pictures" / "blue.png").unlink()
    out = tmp_path / "page.html"
    assert main(["--runs", str(root), "report", "s3", "--out", str(out)]) == 0
    said = text(out)
    assert f"✗ from {digest('s1/run')[:12]} which the stage before no longer has" in said
    assert "stage moe s3/top_k=1 new no steps" in said
    assert "red.png, 10 bytes, not shown" in said
    assert "blue.png is not readable here" in said
    seen = tab.open(out)
    assert seen.complaints == []


def test_a_chain_that_starts_from_elsewhere_names_what_it_starts_from(tmp_path: Path) -> None:
    root = experiments(tmp_path)
    for above in (root / ".origins" / "model-1", tmp_path / "others" / "run"):
        origin, child = RunFolder(above), RunFolder(root / "s2" / "run")
        write_json(
            origin.run_file, {"id": "m", "name": "hub:someone/model", "stage": "align", "parent": None}
        )
        write_json(
            origin.handoff_file, {"step": 0, "digest": digest("model"), "path": "/models/m", "parent": None}
        )
        write_json(child.run_file, child.run | {"parent": str(above)})
        write_json(
            child.handoff_file, (json.loads(child.handoff_file.read_text())) | {"parent": digest("model")}
        )
        assert main(["--runs", str(root), "report", "s2"]) == 0
        said = text(child.path / "report.html")
        assert said.startswith("s2 2 runs, align → instruct")
        assert "stage align hub:someone/model done" in said
        assert f"✓ from {digest('model')[:12]}" in said
        assert "Settings that differ" not in said


def test_the_page_needs_no_torch_and_no_matplotlib(root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from launch.operating.verbs import main; main(sys.argv[1:]);"
        "print([m for m in ('torch', 'matplotlib', 'numpy', 'wandb') if m in sys.modules])"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "--runs",
        str(root),
        "report",
        "s3",
        "--out",
        str(tmp_path / "p.html"),
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# ---- curves


def test_a_long_run_is_binned_and_nothing_of_it_is_lost() -> None:
    curves = Curves()
    for step in range(1, 20_001):
        curves.add(
            {"step": step, "time": BEGAN, "loss": float(step), "samples": 2, "moe/layer3/counts": [3, 1]}
        )
    points = curves.of("loss")
    assert CELLS / 2 <= len(points) <= CELLS
    assert sum(point.count for _, point in points) == 20_000
    assert sum(point.sum for _, point in points) == sum(range(1, 20_001))
    assert all(point.low <= step <= point.high and step == point.mean for step, point in points[:-1])
    assert (curves.samples, curves.layers, curves.last) == (40_000, [3], 20_000)
    assert sum(sum(cell.layers[3]) for cell in curves.cells.values()) == 80_000
    assert curves.evenness(3)[0][1] == pytest.approx(0.8112781)  # of 3/4 and 1/4
    assert curves.mean("moe/layer3/dropped") is None


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (2e-5, "2e-5"), (1.25e-4, "1.25e-4"), (0.0131, "0.0131"), (340, "340"), (4096, "4,096"),
     (12_500, "12.5k"), (3.1e6, "3.1M"), (2e14, "200T"), (-0.5, "-0.5")],
)  # fmt: skip
def test_numbers_on_an_axis_are_short(value: float, words: str) -> None:
    assert chart.plain(value) == words


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.37, 0.41), (0, 12345), (-3, 7), (1e-6, 2e-5)])
def test_an_axis_has_a_few_round_numbers_inside(low: float, high: float) -> None:
    found = chart.ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-9 <= value <= high * (1 + 1e-9) for value in found)
    assert chart.powers(0.5, 800) == [1, 10, 100]
    assert chart.powers(0.3, 0.9) == pytest.approx([0.5])


# ---- colours


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", THEMES)
def test_texts_and_curves_stand_out(theme: str) -> None:
    colours = THEMES[theme]
    for name in ("text", "soft", "good", "bad", "link", "mark"):
        for ground in ("page", "card"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for name in ("c0", "c1", "c2", "c3", "c4", "c5", "q0", "q8"):
        assert contrast(colours[name], colours["card"]) >= 3, name
    for name in ("train", "save", "eval", "load", "start", "replay", "lost", "queue"):
        assert contrast(colours[name], colours["card"]) >= 3, name
        assert contrast(colours[name], colours["on"]) >= 4.5, name  # the word inside
    order = [luminance(colours[f"q{n}"]) for n in range(9)]
    middle = order.index(max(order) if theme == "light" else min(order))
    assert middle == 4  # both ways from even get darker (lighter): seen without colours too


def test_every_colour_that_is_used_is_there() -> None:
    names = set(re.findall(r"var\(--([\w]+)\)", sheet()))
    assert names <= set(THEMES["light"])
    assert set(THEMES["light"]) == set(THEMES["dark"])
