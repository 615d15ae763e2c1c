"""The bench of a whole step: its ways agree, and ours computes what the mathematics needs and no more."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.bench import stage3_counts, stage3_step
from tests.bench.stage3_parts import PACKED, PADDED, THEIRS


def test_a_packed_step_computes_no_more_than_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--tokens", "768", "--rounds", "1", "--json", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["stage3_step.py", *given])
    assert stage3_step.main() == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())["results"]
    assert 0.95 <= found["executed"][PACKED] <= 1.05
    assert found["executed"][PADDED] > 1.05
    assert found["executed"][THEIRS] > 3
    assert found["rows"][PACKED]["ce"] == pytest.approx(found["rows"][PADDED]["ce"], rel=1e-4)
    assert "met    tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        (
            "void cutlass::device_kernel<GemmUniversal<cutlass::gemm::GroupProblemShape<Shape>>>",
            "grouped matmul",
        ),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTT", "other matmul"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "the rest"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel: str, kind: str) -> None:
    assert stage3_counts.kind(kernel) == kind
