"""The demo's pictures and records, made from one source of chance: drawn scenes, and crops of scikit-image's photos."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from data.scenes import KINDS, SIDE, Scene, Turn, sample_scene, text_turns

Record = dict[str, Any]

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
