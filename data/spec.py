"""What a run reads: the mixture, its template and its limits.

Standard library only, so that a login node can read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

Complaint = tuple[str, str, str]


@dataclass(frozen=True)
class DataSpec:
    root: str = "$DATA_ROOT"  # of image folders and annotations; variables are expanded on the node
    mix: str | Mapping[str, float] = ""  # groups or datasets of data.catalog, .json files, with weights
    held_out: str = ""  # annotation file under root, asked after the stage
    template: str = "v1"  # a row of data.conversation.TEMPLATES
    aspect: Literal["square", "pad"] = "pad"
    quick_pictures: bool = (
        False  # scale with torch instead of Pillow: under 1 % of values off by 1 or 2 of 255
    )
    max_length: int = 2048  # tokens of one sequence, image patches included
    group_by: Literal["none", "length", "modality"] = "modality"  # of no effect with packing
    packing: bool = False  # samples packed into sequences; global_batch and micro_batch then count sequences
    pack_length: int = 0  # tokens of a packed sequence; 0: max_length
    workers: int = 4  # loader threads or processes a rank
    bad_samples: int = 0  # unreadable samples that a run may replace, over all ranks, before it stops

    @property
    def capacity(self) -> int:
        """Tokens of a packed sequence; 0 without packing."""
        return (self.pack_length or self.max_length) if self.packing else 0

    def check(self) -> Iterator[Complaint]:
        from data.catalog import DATASETS, GROUPS
        from data.conversation import TEMPLATES

        if not self.mix:
            yield "mix", "names no data", "say mix: llava-pt, hybrid-ft, llava-ft, or a .json file under root"
        for name in (self.mix,) if isinstance(self.mix, str) else self.mix:
            known = [*GROUPS, *DATASETS]
            if name and name not in known and not name.endswith((".json", ".jsonl")):
                meant = get_close_matches(name, known, n=1)
                hint = f"did you mean {meant[0]!r}?" if meant else "your own files end in .json or .jsonl"
                field = "mix" if isinstance(self.mix, str) else f"mix.{name}"
                yield field, f"{name!r} is none of {', '.join(known)} and no .json file", hint
        if self.template not in TEMPLATES:
            meant = get_close_matches(self.template, list(TEMPLATES), n=1)
            hint = f"did you mean {meant[0]!r}?" if meant else ""
            yield "template", f"{self.template!r} is none of {', '.join(TEMPLATES)}", hint
        if isinstance(self.mix, Mapping):
            for name, weight in self.mix.items():
                if not weight > 0:
                    yield f"mix.{name}", f"weight {weight} is not above 0", "leave the dataset out"
                elif weight > 1000:
                    yield (
                        f"mix.{name}",
                        f"weight {weight}: so often each of its samples would come in one epoch",
                        "a share of the mix is written as 0.3; more passes over it are train.epochs",
                    )
        if self.max_length < 2:
            yield "max_length", f"{self.max_length}: a sequence needs at least 2 tokens", ""
        if self.pack_length and not self.packing:
            yield "pack_length", "nothing is packed", "say packing: true, or leave pack_length out"
        elif self.pack_length and self.pack_length < self.max_length:
            yield (
                "pack_length",
                f"{self.pack_length} is under max_length ({self.max_length}): the longest sample must fit in",
                f"say {4 * self.max_length}, or lower max_length",
            )
        if self.workers < 0:
            yield "workers", f"{self.workers} is below 0", "say 0 to load in the training process"
        if self.bad_samples < 0:
            yield "bad_samples", f"{self.bad_samples} is below 0", ""
