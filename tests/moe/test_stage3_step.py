"""The bench of a whole step: its ways agree, and ours computes what the mathematics needs and no more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import stage3_counts
from tests.bench.stage3_parts import PACKED, PADDED, THEIRS


def test_a_packed_step_computes_no_more_than_it_must(tmp_path: Path) -> None:
    given = ["--tokens", "768", "--rounds", "1", "--json", str(tmp_path / "found.json")]
    bench = Path(__file__).parents[1] / "bench" / "stage3_step.py"
    done = subprocess.run([sys.executable, str(bench), *given], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "found.json").read_text())["results"]
    assert 0.95 <= found["executed"][PACKED] <= 1.05
    assert found["executed"][PADDED] > 1.05
    assert found["executed"][THEIRS] > 3
    assert found["rows"][PACKED]["ce"] == pytest.approx(found["rows"][PADDED]["ce"], rel=1e-4)
    assert "met    tiny" in done.stdout


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
