"""Ways to deal with thousands of runs at a time: nothing computed twice, nothing looked through for nothing.

The points of a sweep share the sections of their specs that the sweep leaves alone, so that a thousand are read,
checked and named in little more than the time of what differs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


def once(function: Callable[[Any], T]) -> Callable[[Any], T]:
    """The function of a frozen dataclass, which keeps with the instance what it returned; nobody may change that."""
    key = f"_{function.__module__}.{function.__name__}"

    def kept(instance: Any) -> T:
        known: dict[str, Any] = vars(instance)
        if key not in known:
            known[key] = function(instance)
        found: T = known[key]
        return found

    return kept


@contextmanager
def uncollected() -> Iterator[None]:
    """Without looks for rings: among a million small values there are none, and looking takes a third of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
