"""Where ranks keep what they compile: on their own node, by the code they run, unless someone has said where.

By default Triton, Inductor and CUDA write below the home, which a cluster shares: each rank of each run then locks and
reads the same small files over the network. What the hub loads stays shared, as nodes may have no way to it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

FOLDERS = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "cuda"}


def on_node(code: str, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables to set for ranks of this code (its snapshot's name); none where the node offers no folder."""
    top = Path(env.get("SLURM_TMPDIR") or env.get("TMPDIR") or "/tmp", f"moe-vlm-{os.getuid()}")
    try:
        top.mkdir(mode=0o700, exist_ok=True)
        found = top.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o40022 != 0o40000:
            return {}  # another user's, a link, or one that others may write to: nothing to load code from
    except OSError:
        return {}
    return {name: str(top / code / folder) for name, folder in FOLDERS.items() if name not in env}
