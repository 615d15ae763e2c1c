"""Make the demo's DATA_ROOT: crops of scikit-image's photos and drawn scenes, laid out as MoE-LLaVA's data.

`python data/demo.py FOLDER [--seed 0] [--scale 1]`. Folders, annotation schema, file names and prefixes of
image paths are those of the LanguageBind/MoE-LLaVA data set, so that the demo takes the path real data take.
A scene is one to three outlined shapes of one or two looks. Held-out scenes are drawn first and kept out of all
other files; colors, shapes, places and numbers are drawn evenly; no conversation tells what it asks later.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

Record = dict[str, Any]
Turn = tuple[str, str]  # question, answer
Item = tuple[str, str, str]  # place, shape, color

MARK = "demo.json"  # written last; a folder without it is not ours to touch
RECIPE = 1  # raise it when the same seed makes other data than before
SIDE = 96  # pixels of a picture
COLORS = {
    "red": (214, 40, 40),
    "green": (34, 160, 64),
    "blue": (38, 84, 214),
    "yellow": (242, 206, 32),
    "purple": (140, 52, 172),
    "white": (245, 245, 245),
}
OUTLINES: dict[str, tuple[tuple[int, int], ...]] = {  # corners, in thirds of the radius; a circle has none
    "circle": (),
    "square": ((-3, -3), (3, -3), (3, 3), (-3, 3)),
    "triangle": ((0, -3), (3, 3), (-3, 3)),
    "cross": (
        (-1, -3),
        (1, -3),
        (1, -1),
        (3, -1),
        (3, 1),
        (1, 1),
        (1, 3),
        (-1, 3),
        (-1, 1),
        (-3, 1),
        (-3, -1),
        (-1, -1),
    ),
}
SHAPES = tuple(OUTLINES)
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
PLACES = {  # column and row, in thirds
    f"{row} {column}".strip() or "center": (x, y)
    for y, row in enumerate(("top", "", "bottom"))
    for x, column in enumerate(("left", "", "right"))
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPPOSITES = (("top", "bottom"), ("left", "right"), ("yes", "no"), ("up", "down"))
KINDS = ("color", "shape", "place", "count", "exists")
# Near the mean that CLIP subtracts: in brighter paper, a tower that was never trained drowns the shapes.
PAPERS = ((122, 116, 104), (114, 110, 100), (130, 122, 110))
PHOTOS = {
    "astronaut.png": "an astronaut",
    "brick.png": "a brick wall",
    "camera.png": "a man with a camera",
    "chelsea.png": "a cat",
    "coffee.png": "a cup of coffee",
    "coins.png": "coins",
    "grass.png": "grass",
    "gravel.png": "gravel",
    "hubble_deep_field.jpg": "galaxies",
    "moon.png": "the moon",
    "motorcycle_left.png": "a motorcycle",
    "page.png": "printed text",
    "rocket.jpg": "a rocket",
}
DESCRIBE = "Describe the picture."
# The aligning stage discards what the human says; the tokenizer, which is trained on its texts, does not.
ASKS = (
    "Render a clear and concise summary of the photo.",
    "What color is the shape?",
    "What color are the circles, the squares, the triangles and the crosses?",
    DESCRIBE,
    "What shape is at the center?",
    "Where is the shape?",
    "How many shapes are there?",
    "Is there a shape, yes or no?",
    "What does the photo show?",
)


class DemoError(Exception):
    """The demo data cannot be made here; the text says why and what to do."""


@dataclass(frozen=True)
class Scene:
    """What is drawn, by place. Items differ in both shape and color or in neither, so that each names a look."""

    items: tuple[Item, ...]

    def caption(self) -> str:
        return " and ".join(f"a {color} {shape} at the {place}" for place, shape, color in self.items)

    def alone(self) -> list[Item]:
        """The items whose look no other one has."""
        return [item for item in self.items if sum(other[1:] == item[1:] for other in self.items) == 1]

    def ask(self, kind: str, item: Item, rng: random.Random) -> Turn:
        """A question of one kind about one item, and its answer; a place is asked of an item that is alone."""
        place, shape, color = item
        if kind == "color":
            return (
                f"What color {f'is the {shape}' if item in self.alone() else f'are the {PLURALS[shape]}'}?",
                color,
            )
        if kind == "shape":
            return f"What shape is {color}?", shape
        if kind == "place":
            return f"Where is the {rng.choice((shape, f'{color} shape'))}?", place
        if kind == "count":
            return "How many shapes are there?", NUMBERS[len(self.items)]
        there = rng.random() < 0.5
        if not there:
            shape = rng.choice([name for name in SHAPES if all(name != other for _, other, _ in self.items)])
            color = rng.choice([name for name in COLORS if all(name != other for _, _, other in self.items)])
        return f"Is there a {color} {shape}?", "yes" if there else "no"

    def conversation(self, rng: random.Random) -> list[Turn]:
        """Questions of which no earlier one tells the answer: what is there and how many come first."""
        looks = {item[1:]: item for item in self.items}
        named = rng.choice(list(looks))
        there = self.ask("exists", looks[named], rng)
        if there[1] == "yes":  # which told this look
            del looks[named]
        first = [there] + [self.ask("count", self.items[0], rng)] * rng.randint(0, 1)
        rest = [self.ask("place", item, rng) for item in self.alone()]
        rest += [self.ask(rng.choice(("color", "shape")), item, rng) for item in looks.values()]
        rng.shuffle(first)
        rng.shuffle(rest)
        return (first if rng.random() < 0.75 else []) + rest or first

    def draw(self, rng: random.Random) -> Image.Image:
        """The picture; chance moves each shape by a pixel, sizes it, and chooses the paper."""
        picture = Image.new("RGB", (SIDE, SIDE), rng.choice(PAPERS))
        pen, third = ImageDraw.Draw(picture), SIDE // 3
        for place, shape, color in self.items:
            x, y = (third * at + third // 2 + rng.randint(-1, 1) for at in PLACES[place])
            r = rng.randint(12, 13)
            points = [(x + r * a / 3, y + r * b / 3) for a, b in OUTLINES[shape]]
            if points:
                pen.polygon(points, COLORS[color], "black", 3)
            else:
                pen.ellipse((x - r, y - r, x + r, y + r), COLORS[color], "black", 3)
        return picture


def sample_scene(rng: random.Random) -> Scene:
    """One to three items, evenly, of one look or, a third of the time, of two; in the order of the places."""
    count = rng.randint(1, 3)
    places = sorted(rng.sample(tuple(PLACES), count), key=tuple(PLACES).index)
    looks = list(zip(rng.sample(SHAPES, 2), rng.sample(tuple(COLORS), 2), strict=True))
    if count == 1 or rng.random() < 0.5:
        looks = looks[:1]
    worn = looks + [rng.choice(looks) for _ in range(count - len(looks))]
    rng.shuffle(worn)
    return Scene(tuple((place, *look) for place, look in zip(places, worn, strict=True)))


def text_turns(rng: random.Random, turns: int) -> list[Turn]:
    """Questions that need no picture."""
    asked: dict[str, str] = {}
    while len(asked) < turns:
        task, a = rng.randrange(4), rng.randrange(5)
        if task == 0:
            b = rng.randrange(5)
            asked[f"What is {NUMBERS[a]} plus {NUMBERS[b]}?"] = NUMBERS[a + b]
        elif task == 1:
            asked[f"Which number comes after {NUMBERS[a]}?"] = NUMBERS[a + 1]
        elif task == 2:
            word, opposite = rng.choice(OPPOSITES)[:: rng.choice((1, -1))]
            asked[f"What is the opposite of {word}?"] = opposite
        else:
            (one, two), (red, blue) = rng.sample(SHAPES, 2), rng.sample(tuple(COLORS), 2)
            wanted, answer = rng.choice(((one, red), (two, blue)))
            asked[f"There is a {red} {one} and a {blue} {two}. What color is the {wanted}?"] = answer
    return list(asked.items())


@dataclass
class Studio:
    """Makes pictures and records in one folder, from one source of chance."""

    folder: Path
    rng: random.Random
    kept_out: set[Scene] = field(default_factory=set)
    photos: dict[str, Image.Image] = field(default_factory=dict)
    made: int = 0

    def scene(self) -> Scene:
        """A scene that is not kept out."""
        while (scene := sample_scene(self.rng)) in self.kept_out:
            pass
        return scene

    def save(self, picture: Image.Image, path: str) -> str:
        """Write the picture under a numbered path: {n} is nine digits, {m} the first five of them."""
        name = path.format(n=f"{self.made:09d}", m=f"{self.made:09d}"[:5])
        self.made += 1
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target, quality=92)  # PNG has no quality and takes no notice
        return name

    def record(self, turns: list[Turn], image: str = "") -> Record:
        """A row of an annotation file; the first question carries the picture's place."""
        conversation = []
        for number, (question, answer) in enumerate(turns):
            mark = "<image>\n" if image and number == 0 else ""
            conversation += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
        place = {"image": image} if image else {}
        return {"id": f"{self.made:09d}", **place, "conversations": conversation}

    def drawn(self, path: str, kinds: tuple[str, ...] = ()) -> Record:
        """A scene and a conversation about it; or one question of one of `kinds`."""
        scene = self.scene()
        if not kinds:
            turns = scene.conversation(self.rng)
        else:
            kind = self.rng.choice(kinds)
            while kind == "place" and not scene.alone():
                scene = self.scene()
            turns = [scene.ask(kind, self.rng.choice(scene.alone() or scene.items), self.rng)]
        return self.record(turns, self.save(scene.draw(self.rng), path))

    def described(self, path: str) -> Record:
        scene = self.scene()
        return self.record([(DESCRIBE, scene.caption())], self.save(scene.draw(self.rng), path))

    def photo(self, path: str, caption: bool = False) -> Record:
        """A crop of at least four fifths of a photo's sides, so that it still shows what the photo shows."""
        name = self.rng.choice(tuple(PHOTOS))
        photo, what = self.photos[name], PHOTOS[name]
        width, height = (round(side * self.rng.uniform(0.8, 1)) for side in photo.size)
        left, top = self.rng.randint(0, photo.width - width), self.rng.randint(0, photo.height - height)
        crop = photo.resize((SIDE * width // max(width, height), SIDE * height // max(width, height)),
                            Image.Resampling.BICUBIC, (left, top, left + width, top + height))  # fmt: skip
        if caption:
            turns = [(self.rng.choice(ASKS), f"{what} in a photo")]
        else:
            other = self.rng.choice([name for name in PHOTOS.values() if name != what])
            turns = self.rng.choice(
                (
                    [("What does the photo show?", what)],
                    [(f"Does the photo show {what}?", "yes")],
                    [(f"Does the photo show {other}?", "no")],
                )
            )
        return self.record(turns, self.save(crop, path))

    def write(self, name: str, records: list[Record]) -> int:
        self.rng.shuffle(records)
        (self.folder / name).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        return len(records)


def build(folder: Path, seed: int, scale: float) -> dict[str, int]:
    """Fill an empty folder; the number of rows of each annotation file."""
    studio = Studio(folder, random.Random(seed))
    studio.photos = load_photos()
    rng, rows = studio.rng, {}

    def times(count: int) -> range:
        return range(max(1, round(count * scale)))

    asked = []
    for number in times(300):
        kind, scene = KINDS[number % len(KINDS)], studio.scene()
        while kind == "place" and not scene.alone():
            scene = studio.scene()
        studio.kept_out.add(scene)
        turn = scene.ask(kind, rng.choice(scene.alone() or scene.items), rng)
        record = studio.record([turn], studio.save(scene.draw(rng), "held_out/{n}.png"))
        asked.append({**record, "dataset": kind})  # so that the report tells the kinds apart
    rows["held_out.json"] = studio.write("held_out.json", asked)

    captions = []
    for _ in times(1200):
        scene = studio.scene()
        image = studio.save(scene.draw(rng), "llava_image/{m}/{n}.jpg")
        captions.append(studio.record([(rng.choice(ASKS), scene.caption())], image))
    captions += [studio.photo("llava_image/{m}/{n}.jpg", caption=True) for _ in times(240)]
    rows["llava_image_.json"] = studio.write("llava_image_.json", captions)

    la = [studio.drawn("mimicit_tune/LA/LA_IMG_{n}.png", KINDS) for _ in times(300)]
    la += [studio.photo("mimicit_tune/LA/LA_IMG_{n}.png") for _ in times(50)]
    rows["la_tune_256k.json"] = studio.write("la_tune_256k.json", la)
    lrv = [studio.drawn("lrv_tune/lrv-vg/{n}.jpg", ("exists",)) for _ in times(1200)]
    lrv += [studio.photo("lrv_tune/lrv-vg/{n}.jpg") for _ in times(50)]
    rows["lrv_tune_331k.json"] = studio.write("lrv_tune_331k.json", lrv)
    lvis = [studio.drawn("lvis_tune/coco/train2017/{n}.jpg") for _ in times(2000)]
    lvis += [studio.photo("lvis_tune/coco/train2017/{n}.jpg") for _ in times(50)]
    rows["lvis_tune_220k_.json"] = studio.write("lvis_tune_220k_.json", lvis)
    svit = [studio.described("svit_tune/VG_100K/{n}.jpg") for _ in times(1000)]
    svit += [studio.drawn("svit_tune/VG_100K/{n}.jpg") for _ in times(1000)]
    svit += [studio.photo("svit_tune/VG_100K/{n}.jpg") for _ in times(50)]
    rows["svit_tune_157k.json"] = studio.write("svit_tune_157k.json", svit)
    nlp = [studio.record(text_turns(rng, rng.randint(1, 4))) for _ in times(300)]
    rows["nlp_tune.json"] = studio.write("nlp_tune.json", nlp)

    tune = [studio.drawn("llava_image_tune/gqa/images/{n}.jpg") for _ in times(1200)]
    tune += [studio.drawn("llava_image_tune/vg/VG_100K/{n}.jpg") for _ in times(600)]
    tune += [studio.drawn("llava_image_tune/vg/VG_100K_2/{n}.jpg") for _ in times(600)]
    tune += [studio.described("llava_image_tune/coco/train2017/{n}.jpg") for _ in times(600)]
    tune += [studio.photo("llava_image_tune/coco/train2017/{n}.jpg") for _ in times(100)]
    rows["llava_image_tune_.json"] = studio.write("llava_image_tune_.json", tune)
    return rows


def load_photos() -> dict[str, Image.Image]:
    """The photos of the installed scikit-image, by file name, without importing it."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise DemoError(
            "scikit-image, whose photos the demo shows, is not installed: pip install scikit-image"
        )
    folder, photos = Path(spec.origin).parent / "data", {}
    for name in PHOTOS:
        if not (folder / name).is_file():
            raise DemoError(
                f"{folder} has no {name}: install scikit-image from its wheel, which has the photos"
            )
        with Image.open(folder / name) as photo:
            photos[name] = photo.convert("RGB")
    return photos


def make(folder: Path, seed: int = 0, scale: float = 1.0) -> bool:
    """Make the data in `folder`, all at once or not at all; False when they are there already.

    `scale` multiplies all counts. Seed, scale and the versions of Pillow and scikit-image decide every byte.
    Raises DemoError when the folder holds anything else.
    """
    wanted = {"recipe": RECIPE, "seed": seed, "scale": scale}
    if (folder / MARK).is_file():
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if {key: found.get(key) for key in wanted} == wanted:
            return False
        differs = ", ".join(
            f"{key} {found.get(key)} and not {value}"
            for key, value in wanted.items()
            if found.get(key) != value
        )
        raise DemoError(f"{folder} holds other demo data ({differs}): remove it, or name another folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DemoError(f"{folder} holds something else than demo data: name a new or an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        rows = build(scratch, seed, scale)
        mark = json.dumps({**wanted, "rows": rows}, indent=1) + "\n"
        (scratch / MARK).write_text(mark, encoding="utf-8")
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError as fault:
            if (folder / MARK).is_file():  # another process was faster
                return make(folder, seed, scale)
            raise DemoError(
                f"{folder} cannot be put in place ({fault}): name a new or an empty folder"
            ) from fault
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="data/demo.py", description="Make the demo's DATA_ROOT.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of samples")
    options = parser.parse_args(arguments)
    try:
        made = make(options.folder, options.seed, options.scale)
    except DemoError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    rows = json.loads((options.folder / MARK).read_text(encoding="utf-8"))["rows"]
    word = "made" if made else "already there, nothing to do"
    print(f"demo data: {word}: {sum(rows.values())} samples in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
