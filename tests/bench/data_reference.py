"""The reference's data path, written anew to be measured against: what it does, in the order in which it does it.

Facts: MoE-LLaVA, moellava/train/train.py (LazySupervisedDataset, preprocess_phi), moellava/mm_utils.py, and the
CLIP image processor of transformers 4.37, which is what it pins. It exists for the benchmarks alone.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data.conversation import IGNORED, IMAGE_ID
from data.images import ImageFormat

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Reference:
    """All records in memory; a sample is made whole, from its text on, each time it is asked for."""

    def __init__(
        self, annotation: Path, root: Path, tokenizer: Any, format: ImageFormat, processor: Any = None
    ):
        self.records = json.loads(annotation.read_text())
        for number, record in enumerate(self.records):
            record["id"] = number
        self.root, self.tokenizer, self.format, self.processor = root, tokenizer, format, processor

    def __len__(self) -> int:
        return len(self.records)

    def lengths(self) -> list[int]:
        """Words of each record, negative for text only; counted over all records at start."""
        found = []
        for record in self.records:
            words = sum(len(turn["value"].split()) for turn in record["conversations"])
            found.append(words if "image" in record else -words)
        return found

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        record = self.records[at]
        turns = copy.deepcopy(record["conversations"])
        sample = self.text(turns, "image" in record)
        if "image" in record:
            picture = Image.open(self.root / record["image"]).convert("RGB")
            picture = squared(picture, tuple(int(value * 255) for value in self.format.mean))
            if self.processor is None:
                sample["image"] = processed(picture, self.format)
            else:
                sample["image"] = self.processor.preprocess(picture, return_tensors="pt")["pixel_values"][0]
        return sample

    def text(self, turns: list[dict[str, str]], has_image: bool) -> dict[str, torch.Tensor]:
        """Ids of the whole prompt, then again of each round and of each question, to count what to mask."""
        prompt, end = SYSTEM + " ", "<|endoftext|>"
        for turn in turns:
            human = turn["from"] == "human"
            prompt += f"{'USER' if human else 'ASSISTANT'}: {turn['value']}{' ' if human else end}"
        ids = self.ids(prompt, has_image)
        labels = ids.clone()
        rounds = prompt.split(end)
        place = 0
        for text in rounds:
            if not text:
                break
            parts = text.split(" ASSISTANT: ")
            if len(parts) != 2:
                break
            length = len(self.ids(text, has_image)) + 1
            question = len(self.ids(parts[0] + " ASSISTANT: ", has_image)) - 1
            labels[place : place + question] = IGNORED
            place += length
        labels[place:] = IGNORED
        if place != len(ids):
            labels[:] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def ids(self, text: str, has_image: bool) -> torch.Tensor:
        """Token ids, -200 an image."""
        if not has_image:
            return torch.tensor(self.tokenizer(text).input_ids)
        found: list[int] = []
        for number, chunk in enumerate(text.split("<image>")):
            if number:
                found.append(IMAGE_ID)
            found += self.tokenizer(chunk).input_ids
        return torch.tensor(found)


def squared(picture: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square."""
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    square = Image.new("RGB", (side, side), background)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


def processed(picture: Image.Image, format: ImageFormat) -> torch.Tensor:
    """What the pinned image processor does, array by array."""
    array = np.array(picture)
    height, width = array.shape[:2]
    short, long = min(height, width), max(height, width)
    new = int(format.size * long / short)
    size = (format.size, new) if height > width else (new, format.size)
    array = np.array(Image.fromarray(array).resize(size, Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - format.size) // 2, (array.shape[1] - format.size) // 2
    array = array[top : top + format.size, left : left + format.size]
    array = (array * (1 / 255)).astype(np.float32)  # a float64 array in between, as in the original
    array = (array - np.array(format.mean, dtype=array.dtype)) / np.array(format.std, dtype=array.dtype)
    return torch.tensor(array.transpose(2, 0, 1))


def collated(samples: list[dict[str, torch.Tensor]], pad: int) -> dict[str, Any]:
    """A right-padded batch and its pictures, as the reference's collator makes it."""
    ids = torch.nn.utils.rnn.pad_sequence(
        [s["input_ids"] for s in samples], batch_first=True, padding_value=pad
    )
    labels = torch.nn.utils.rnn.pad_sequence(
        [s["labels"] for s in samples], batch_first=True, padding_value=IGNORED
    )
    images = [sample["image"] for sample in samples if "image" in sample]
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": ids.ne(pad),
        "pixel_values": torch.stack(images) if images else torch.empty(0),
    }


class Tensors:
    """The steps of transformers 5's processor where torchvision is there, which this project does without.

    torchvision scales bytes with the same kernel of torch's; facts: transformers, image_processing_backends.py.
    """

    def __init__(self, format: ImageFormat) -> None:
        self._size = format.size
        self._mean = torch.tensor(format.mean)[:, None, None] * 255
        self._std = torch.tensor(format.std)[:, None, None] * 255

    def preprocess(self, picture: Image.Image, return_tensors: str) -> dict[str, torch.Tensor]:
        """A square picture's values, in a batch of one."""
        planes = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        stacked = torch.stack([planes])
        scaled = F.interpolate(stacked, (self._size, self._size), mode="bicubic", antialias=True)
        return {"pixel_values": (scaled.to(torch.float32) - self._mean) / self._std}
