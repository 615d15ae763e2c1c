"""The states of every source of random numbers in a process, as JSON."""

from __future__ import annotations

import base64
import hashlib
import random
from typing import Any

import numpy as np
import torch


def state() -> dict[str, Any]:
    """Python's, numpy's, torch's and, where there is one, the GPU's."""
    version, numbers, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state()
    states: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, _text(np.asarray(keys).tobytes()), int(place), int(has_gauss), float(cached)],
        "torch": _text(torch.get_rng_state().numpy().tobytes()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _text(torch.cuda.get_rng_state().numpy().tobytes())
    return states


def restore(states: dict[str, Any], step: int, rank: int) -> None:
    """Take up `states`, which are this rank's own if `own`; else draw new ones, each rank's different,
    from them.
    """
    if not states["own"]:
        drawn = hashlib.blake2b(f"{states['torch']} {step} {rank}".encode(), digest_size=4).digest()
        seed = int.from_bytes(drawn, "big")
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, place, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.frombuffer(_bytes(keys), dtype=np.uint32), place, has_gauss, cached))
    torch.set_rng_state(_tensor(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(states["cuda"]))


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(_bytes(text)), dtype=torch.uint8)
