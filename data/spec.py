"""What a run reads: the mixture, its template and its limits; standard library only, so that a login node can read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Complaint = tuple[str, str, str]


@dataclass(frozen=True)
class DataSpec:
    root: str = "$DATA_ROOT"  # the folder of image folders and annotation files; variables are expanded on the node
    mix: str | Mapping[str, float] = ""  # a group of data.catalog, a dataset, a .json file, or these with weights
    held_out: str = ""  # annotation file under root, asked after the stage
    template: str = "v1"  # a row of data.conversation.TEMPLATES
    aspect: Literal["square", "pad"] = "pad"
    max_length: int = 2048  # tokens of one sequence, image patches included
    group_by: Literal["none", "length", "modality"] = "modality"
    packing: bool = False  # samples packed into sequences of max_length
    workers: int = 4  # loader threads or processes a rank
    bad_samples: int = 0  # unreadable samples a run may replace before it stops

    def check(self) -> Iterator[Complaint]:
        if not self.mix:
            yield "mix", "names no data", "say mix: llava-pt, hybrid-ft, llava-ft, or a .json file under root"
        if isinstance(self.mix, Mapping):
            for name, weight in self.mix.items():
                if not weight > 0:
                    yield "mix", f"{name}: weight {weight} is not above 0", "leave the dataset out"
        if self.max_length < 2:
            yield "max_length", f"{self.max_length}: a sequence needs at least 2 tokens", ""
        if self.workers < 0:
            yield "workers", f"{self.workers} is below 0", "say 0 to load in the training process"
        if self.bad_samples < 0:
            yield "bad_samples", f"{self.bad_samples} is below 0", ""
