"""Data to measure on: records shaped as the 665k mix, photo-like pictures, and a tokenizer of its texts."""

from __future__ import annotations

import contextlib
import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PICTURES = 48
WORDS = " ".join(topics.values()).split()
TEXT_ONLY = 0.061  # share of the mix


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 8,000 tokens, with the specials that template phi wants."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(topics.values(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>", unk_token="<|pad|>"
    )


def say(rng: random.Random, words: int) -> str:
    """So many words of running text."""
    at = rng.randrange(len(WORDS) - words)
    return " ".join(WORDS[at : at + words])


def records(path: Path, count: int, seed: int = 0, distinct: bool = False) -> None:
    """An annotation file of `count` records, written as it is made; `distinct` gives each a picture of its own.

    Those are further names of the same few files, beside them: they take no room on the disk.
    """
    rng = random.Random(seed)
    with path.open("w") as file:
        for at in range(count):
            alone = rng.random() < TEXT_ONLY
            rounds = rng.randint(2, 8) if alone else min(12, int(rng.lognormvariate(1.0, 0.8)) + 1)
            turns = []
            for turn in range(rounds):
                question = say(rng, rng.randint(5, 15))
                answer = say(
                    rng, int(rng.lognormvariate(4.5, 0.8)) % 500 + 5 if alone else rng.randint(2, 60)
                )
                head = "" if alone or turn else "<image>\n"
                turns += [{"from": "human", "value": head + question}, {"from": "gpt", "value": answer}]
            name = f"pictures/{at % PICTURES:03d}.jpg"
            if distinct and not alone:
                own = f"pictures/{at // 1000:05d}/{at:08d}.jpg"
                (path.parent / own).parent.mkdir(exist_ok=True)
                os.link(path.parent / name, path.parent / own)
                name = own
            image = {} if alone else {"image": name}
            file.write("[\n" if not at else ",\n")
            json.dump({"id": f"{at:012d}", **image, "conversations": turns}, file)
        file.write("\n]\n")


def pictures(folder: Path, seed: int = 0, tiny: bool = False) -> None:
    """JPEGs of 640 x 480 and its like, about as many bytes as COCO's; or tiny ones, where they do not matter."""
    rng = np.random.default_rng(seed)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for at in range(PICTURES):
        width, height = [(640, 480), (640, 427), (480, 640), (500, 375)][at % 4]
        coarse = rng.integers(0, 255, (height // 20, width // 20, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        grain = smooth + rng.normal(0, 14, smooth.shape)
        picture = Image.fromarray(grain.clip(0, 255).astype(np.uint8))
        if tiny:
            picture = picture.resize((16, 16))
        picture.save(folder / "pictures" / f"{at:03d}.jpg", quality=90)


@contextlib.contextmanager
def corpus(kept: Path | None, size: int, distinct: bool = False) -> Iterator[Path]:
    """A root with `size` records in mix.json and tiny pictures; under `kept` it stays for the next time."""
    with tempfile.TemporaryDirectory() as passing:
        root = kept / f"{'own' if distinct else 'shared'}-{size}" if kept else Path(passing)
        if not (root / "whole").exists():
            pictures(root, tiny=True)
            records(root / "mix.json", size, distinct=distinct)
            (root / "whole").touch()
        yield root
