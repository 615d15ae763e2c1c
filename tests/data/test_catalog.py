"""The catalog holds the reference's groups; a mix resolves to them, or says what there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data.catalog import DATASETS, GROUPS, CatalogError, annotation_path, resolve


def test_groups_read_the_references_files_in_its_order() -> None:
    files = {name: [DATASETS[member].annotation for member in members] for name, members in GROUPS.items()}
    assert files == {
        "llava-pt": ["llava_image_.json"],
        "hybrid-ft": [
            "la_tune_256k.json",
            "lrv_tune_331k.json",
            "lvis_tune_220k_.json",
            "svit_tune_157k.json",
            "nlp_tune.json",
        ],
        "llava-ft": ["llava_image_tune_.json", "nlp_tune.json"],
    }


def test_counts_are_the_published_ones() -> None:
    assert DATASETS["llava-558k"].rows == 558_128
    assert sum(DATASETS[name].rows for name in GROUPS["llava-ft"]) == 665_298
    nominal = sum(DATASETS[name].rows for name in GROUPS["hybrid-ft"] if name != "nlp")
    assert nominal == pytest.approx(964_000, rel=0.01)
    for dataset in DATASETS.values():
        assert dataset.page
        assert dataset.licence
        assert dataset.megabytes
        assert (dataset.archive is None) == (dataset.images == "")


def test_a_mix_resolves_to_data_sets_and_weights(tmp_path: Path) -> None:
    assert [(d.name, w) for d, w in resolve("llava-ft")] == [("llava-mix-image", 1.0), ("nlp", 1.0)]
    mix = {"llava-ft": 0.5, "nlp": 1.0, "mine.json": 2}
    assert [(d.name, w) for d, w in resolve(mix)] == [
        ("llava-mix-image", 0.5),
        ("nlp", 1.5),
        ("mine.json", 2.0),
    ]
    with pytest.raises(
        CatalogError, match=r"names 'llava-fx', which is not in the catalog \(llava-pt, hybrid-ft"
    ):
        resolve("llava-fx")


def test_annotations_are_found_where_the_archives_put_them(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"there is no a\.json, here or in train_json, pt_json, ft_json"):
        annotation_path(tmp_path, "a.json")
    (tmp_path / "ft_json").mkdir()
    (tmp_path / "ft_json" / "a.json").touch()
    assert annotation_path(tmp_path, "a.json") == tmp_path / "ft_json" / "a.json"
    (tmp_path / "a.json").touch()
    assert annotation_path(tmp_path, "a.json") == tmp_path / "a.json"
    assert annotation_path(tmp_path / "other", str(tmp_path / "a.json")) == tmp_path / "a.json"


def test_a_login_node_can_read_the_catalog() -> None:
    code = (
        "import sys; import data.catalog, data.conversation, data.findings, data.spec;"
        "print([m for m in ('torch', 'numpy', 'PIL', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
