"""What ranks compile is kept on the node, where that is safe and nobody has said otherwise."""

from __future__ import annotations

import os
from pathlib import Path

from launch.caches import on_node


def test_compilers_write_to_the_node_by_code_unless_told_where(tmp_path: Path) -> None:
    own = tmp_path / f"moe-vlm-{os.getuid()}"
    found = on_node("abc", {"TMPDIR": str(tmp_path), "CUDA_CACHE_PATH": "/elsewhere"})
    assert found == {
        "TRITON_CACHE_DIR": f"{own}/abc/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{own}/abc/inductor",
    }
    assert own.stat().st_mode & 0o777 == 0o700
    job = tmp_path / "job"
    job.mkdir()
    assert on_node("abc", {"TMPDIR": str(tmp_path), "SLURM_TMPDIR": str(job)})["CUDA_CACHE_PATH"] == (
        f"{job}/moe-vlm-{os.getuid()}/abc/cuda"
    )


def test_a_folder_that_others_may_write_to_or_none_at_all_is_not_used(tmp_path: Path) -> None:
    own = tmp_path / f"moe-vlm-{os.getuid()}"
    own.mkdir()
    own.chmod(0o777)
    assert on_node("abc", {"TMPDIR": str(tmp_path)}) == {}
    own.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    own.symlink_to(tmp_path / "elsewhere")
    assert on_node("abc", {"TMPDIR": str(tmp_path)}) == {}
    assert on_node("abc", {"TMPDIR": str(tmp_path / "nowhere")}) == {}
