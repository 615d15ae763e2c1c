"""Small data roots for tests: numbered pictures whose colour tells which one they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data.images import ImageFormat

FORMAT = ImageFormat(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash")
PATCHES = 4


def picture(root: Path, number: int) -> str:
    """A picture of one colour, the number's; its path under the root."""
    path = f"pictures/{number:05d}.png"
    (root / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (4, 4), (number % 256, number // 256, 7)).save(root / path)
    return path


def number_of(pixels: torch.Tensor) -> int:
    """Which picture these pixels are."""
    red, green, _ = pixels[:, 4, 4].tolist()
    return int(red + 256 * green)


def record(*texts: str, image: Any = None, id: str = "") -> dict[str, Any]:
    """A record in LLaVA's schema."""
    turns = [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]
    return {"id": id, **({"image": image} if image else {}), "conversations": turns}


def write(root: Path, name: str, records: list[Any]) -> Path:
    """An annotation file."""
    (root / name).write_text(json.dumps(records))
    return root / name


def mixed(root: Path, count: int = 40, name: str = "mixed.json", start: int = 0) -> list[dict[str, Any]]:
    """Records of which every third is text only; sample k says k words and shows picture k."""
    records = []
    for at in range(start, start + count):
        answer = f"Number {at}." + " very" * (at % 7)
        if at % 3 == 2:
            records.append(record(f"Tell {at}", answer, id=str(at)))
        else:
            records.append(record(f"<image>\nWhich {at}?", answer, image=picture(root, at), id=str(at)))
    write(root, name, records)
    return records
