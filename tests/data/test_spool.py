"""What a check keeps of its records is all there, on the disk or in eight bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import checking, spool
from data.catalog import resolve
from data.findings import Finding
from data.spool import Findings, Seen, Spool, repeated

from .places import record, write


def test_findings_outlive_the_memory_they_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "IN_MEMORY", 1000)
    told = [Finding(("encoding", "rows")[at % 2], "a.json", at, "ü", "x" * at) for at in range(100)]
    findings = Findings()
    for number, finding in enumerate(told):
        findings.append(finding)
        assert number % 30 or list(findings) == told[: number + 1]  # reading in between disturbs nothing
    assert findings._spool._file._rolled  # type: ignore[attr-defined]
    assert len(findings) == 100
    assert findings.counts == {"encoding": 50, "rows": 50}
    assert findings.first["rows"] == told[1:10:2]


def test_a_value_is_found_at_its_place() -> None:
    kept = Spool()
    places = [kept.put([["image-missing", f"{at}.jpg"]]) for at in range(20)]
    for at in (7, 0, 19):
        assert kept.get(places[at]) == [["image-missing", f"{at}.jpg"]]
        assert kept.get(kept.put("one more")) == "one more"


@settings(max_examples=50, deadline=None, derandomize=True)
@given(keys=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9), max_size=200))
def test_a_key_is_new_once(keys: list[int]) -> None:
    seen, known = Seen(), set[int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "RECENT", 5)
        for key in keys:
            assert seen.new(key) is (key not in known)
            known.add(key)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(keys=st.lists(st.integers(0, 6), max_size=40))
def test_repetitions_name_the_first_of_their_value(keys: list[int]) -> None:
    want = [(at, keys.index(key)) for at, key in enumerate(keys) if key in keys[:at]]
    assert list(repeated(np.array(keys, dtype=np.uint64))) == want


def test_a_folder_is_searched_for_the_first_missing_pictures_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "AT_ONCE", 1)
    monkeypatch.setattr(checking, "WAITING", 1)
    monkeypatch.setattr(checking, "HINTS", 3)
    write(tmp_path, "a.json", [record("<image>\nA?", f"B{at}", image=f"no/{at}.jpg") for at in range(9)])
    found = checking.check(
        tmp_path, [each for each, _ in resolve("a.json")], checking.Options(), lambda *_: None
    )
    hinted = [
        finding.detail.endswith(f"(there is no folder {tmp_path / 'no'})") for finding in found.findings
    ]
    assert hinted == [True] * 3 + [False] * 6
