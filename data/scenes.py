"""The demo's drawn scenes: what they look like, what may be asked of them, and the answers."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

Turn = tuple[str, str]  # question, answer
Item = tuple[str, str, str]  # place, shape, color

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
