"""The data sets of MoE-LLaVA's three stages: files, folders, counts, sources; standard library only.

Counts are exact where the publisher's card or a count of the file says so, else nominal. The text-only rows
are not in the reference's table of data but are in its scripts (scripts/v1/*/finetune.sh, finetune_moe.sh).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

HUB = "LanguageBind/MoE-LLaVA"  # data set id of annotations and archives on the Hugging Face hub
ANNOTATION_FOLDERS = ("", "train_json", "pt_json", "ft_json")  # under DATA_ROOT, in this order


@dataclass(frozen=True)
class Archive:
    """A file to download: `parts` and their gigabytes are joined in order, `into` is where it is unpacked
    under DATA_ROOT.

    `nested` names an archive inside that holds the pictures.
    """

    name: str
    gigabytes: float
    into: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    nested: str = ""


@dataclass(frozen=True)
class Dataset:
    """One annotation file and its pictures. `rows` 0: not known; `exact` False: nominal."""

    name: str
    annotation: str
    images: str = ""  # folder under DATA_ROOT; empty: text only
    rows: int = 0
    exact: bool = False
    megabytes: int = 0  # of the annotation file
    archive: Archive | None = None
    page: str = ""
    hub: str = ""  # the original publisher's data set id
    licence: str = ""  # what the publisher's page says; `terms` says where, and that nobody has verified it
    note: str = ""

    @property
    def terms(self) -> str:
        """Where to look up the licence, and what was read there."""
        place = f"https://huggingface.co/datasets/{self.hub}" if self.hub else self.page
        return f"not verified: look it up at {place} ({self.licence}); pictures have licences of their own"


_TUNE = Archive(
    "llava_image_tune_2.zip",
    72.4,
    parts={"llava_image_tune_2.zip.001": 41.9, "llava_image_tune_2.zip.002": 30.5},
    nested="llava_image_tune.zip",
)

_ROWS = (
    Dataset(
        "llava-558k",
        "llava_image_.json",
        "llava_image",
        558_128,
        exact=True,
        megabytes=192,
        archive=Archive("llava_image.zip", 27.4),
        page="https://github.com/haotian-liu/LLaVA/blob/main/docs/Data.md",
        hub="liuhaotian/LLaVA-Pretrain",
        licence="says 'other'; captions by BLIP",
    ),
    Dataset(
        "svit-157k",
        "svit_tune_157k.json",
        "svit_tune",
        157_712,
        megabytes=249,
        archive=Archive("svit_tune.zip", 12.4),
        page="https://github.com/BAAI-DCAI/Visual-Instruction-Tuning",
        hub="BAAI/SVIT",
        licence="says CC BY 4.0, and to keep to the rules of each source; made with GPT-4",
        note="the publisher's own images.zip was corrupt: take Visual Genome's images.zip and images2.zip",
    ),
    Dataset(
        "lvis-220k",
        "lvis_tune_220k_.json",
        "lvis_tune",
        222_711,
        megabytes=434,
        archive=Archive("lvis_tune.zip", 18.0),
        page="https://github.com/X2FD/LVIS-INSTRUCT4V",
        hub="X2FD/LVIS-Instruct4V",
        licence="names none; the code's is MIT; made with GPT-4V",
        note="alone it gives poor models; it is meant to be mixed",
    ),
    Dataset(
        "lrv-331k",
        "lrv_tune_331k.json",
        "lrv_tune",
        331_000,
        megabytes=137,
        archive=Archive("lrv_tune.zip", 3.02),
        page="https://github.com/FuxiaoLiu/LRV-Instruction",
        licence="the repository's is BSD 3-Clause; made with GPT-4",
    ),
    Dataset(
        "mimicit-256k",
        "la_tune_256k.json",
        "mimicit_tune/LA",
        256_000,
        megabytes=161,
        archive=Archive("LA.zip", 8.41, into="mimicit_tune"),
        page="https://github.com/Luodian/Otter/tree/main/mimic-it",
        hub="pufanyi/MIMICIT",
        licence="says MIT, in an agreement for scientific or research use only",
    ),
    Dataset(
        "nlp",
        "nlp_tune.json",
        rows=40_688,
        exact=True,
        megabytes=141,
        page="https://github.com/haotian-liu/LLaVA/blob/main/docs/Data.md",
        licence="ShareGPT conversations; names none for them",
        note="text only; the ShareGPT rows of the 665k mix, read in stage 2 and in stage 3",
    ),
    Dataset(
        "llava-mix-image",
        "llava_image_tune_.json",
        "llava_image_tune",
        624_610,
        exact=True,
        megabytes=926,
        archive=_TUNE,
        page="https://github.com/haotian-liu/LLaVA#visual-instruction-tuning",
        hub="liuhaotian/LLaVA-Instruct-150K",
        licence="says CC BY 4.0 of the GPT-4 part, and to keep to OpenAI's terms",
        note="the 665k mix less its text-only rows; 355 OCR-VQA pictures can no longer be downloaded singly",
    ),
)

DATASETS: dict[str, Dataset] = {row.name: row for row in _ROWS}

# In the order of the reference's scripts, which is the order of the concatenated records.
GROUPS: dict[str, tuple[str, ...]] = {
    "llava-pt": ("llava-558k",),
    "hybrid-ft": ("mimicit-256k", "lrv-331k", "lvis-220k", "svit-157k", "nlp"),
    "llava-ft": ("llava-mix-image", "nlp"),
}


class CatalogError(ValueError):
    """A mix that names something unknown or missing; the message says what there is."""


def resolve(mix: str | Mapping[str, float]) -> list[tuple[Dataset, float]]:
    """The data sets of a mix and their weights; a name that ends in .json or .jsonl is a user's own file.

    A weight is how often each sample comes in an epoch; without weights it is 1. A data set that is named
    twice gets the sum. Raises CatalogError for a name that is neither.
    """
    weights: dict[str, float] = {}
    found: dict[str, Dataset] = {}
    for name, weight in (mix if isinstance(mix, Mapping) else {mix: 1.0}).items():
        for dataset in _named(name):
            found[dataset.name] = dataset
            weights[dataset.name] = weights.get(dataset.name, 0.0) + float(weight)
    return [(dataset, weights[name]) for name, dataset in found.items()]


def _named(name: str) -> list[Dataset]:
    if name in GROUPS:
        return [DATASETS[member] for member in GROUPS[name]]
    if name in DATASETS:
        return [DATASETS[name]]
    if name.endswith((".json", ".jsonl")):
        return [Dataset(name, name)]
    known = [*GROUPS, *DATASETS]
    meant = get_close_matches(name, known, n=1)
    raise CatalogError(
        f"the mix names {name!r}, which is not in the catalog ({', '.join(known)}) and not a .json file"
        + (f"; did you mean {meant[0]!r}?" if meant else "")
    )


def annotation_path(root: Path, annotation: str) -> Path:
    """Where an annotation file lies; CatalogError names the places when it is in none of them."""
    places = [root / folder / annotation for folder in ANNOTATION_FOLDERS]
    for place in places:
        if place.is_file():
            return place
    below = ", ".join(folder for folder in ANNOTATION_FOLDERS if folder)
    raise CatalogError(
        f"{root}: there is no {annotation}, here or in {below}; "
        f"`python data/prepare.py plan --root {root}` says where to get it, and data.root names the folder"
    )
