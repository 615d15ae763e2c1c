"""A trained model that can be asked: its checkpoint, tokenizer, template and way with pictures, on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.conversation import answer_end, prompt
from data.images import ImageFormat, load
from moe.generate import answer
from moe.interchange import open_checkpoint, run_spec
from moe.parallel import Groups
from moe.storage import CheckpointError, describe, found
from moe.vlm import VLM

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Model:
    """What `opened` gives."""

    vlm: VLM
    tokenizer: Any
    template: str
    aspect: Any  # data.images.Aspect
    format: ImageFormat
    device: torch.device

    def picture(self, path: Path) -> Tensor:
        """A picture as the model was trained on it, [3, size, size]; ImageError."""
        return load(path, self.format, self.aspect)

    def shown(self, pictures: Sequence[Tensor]) -> Tensor:
        """Those of one prompt, [n, 3, size, size]."""
        empty = torch.empty(0, 3, self.format.size, self.format.size)
        return torch.stack(list(pictures)) if pictures else empty

    def prompt(self, turns: Turns, pictures: int) -> list[int]:
        """The ids up to where the next answer starts; ConversationError."""
        return prompt(turns, self.tokenizer, self.template, has_image=bool(pictures))

    def say(self, prompts: list[list[int]], shown: list[Tensor], most: int) -> list[str]:
        """An answer a prompt, of `most` tokens at most."""
        end = answer_end(self.tokenizer, self.template)
        return answer(
            self.vlm, self.tokenizer, prompts, shown, end=end, max_new_tokens=most, groups=Groups.single()
        )


def template_of(checkpoint: Path, template: str = "") -> str:
    """The one a model is asked in: `template`, or the one its run was trained with. InterchangeError."""
    template = template or run_spec(checkpoint).get("data", {}).get("template", "v1")
    return "v1" if template == "plain" else template  # stage align's own has no questions


def opened(checkpoint: Path, template: str = "") -> Model:
    """The model of a checkpoint, to be asked in a template (`template_of`). ValueError, InterchangeError."""
    vlm, tokenizer = open_checkpoint(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vlm.to(device)
    look = vlm.vision
    format = ImageFormat(look.size, look.mean, look.std, look.resize)
    aspect = run_spec(checkpoint).get("data", {}).get("aspect", "pad")
    return Model(vlm, tokenizer, template_of(checkpoint, template), aspect, format, device)


def newest(path: Path) -> Path:
    """The newest complete checkpoint of a run folder; any other folder as it is. ValueError where it has none."""
    if not (path / "spec.json").is_file():
        return path
    for checkpoint in found(path / "checkpoints"):
        try:
            describe(checkpoint.path)
        except CheckpointError:
            continue  # being written, or torn
        return checkpoint.path
    raise ValueError(f"{path} has no complete checkpoint; runs.py status says how far the run is")
