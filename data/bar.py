"""Progress of bytes on a terminal."""

from __future__ import annotations

import sys
import time


class Bar:
    """Progress of bytes, on a terminal once a tenth of a second, else silent."""

    def __init__(self, name: str) -> None:
        self.name, self.started, self.last = name, time.monotonic(), 0.0
        self.live = sys.stderr.isatty()

    def show(self, done: int, size: int) -> None:
        """Draw it."""
        now = time.monotonic()
        if self.live and (now - self.last > 0.1 or done >= size):
            self.last, share = now, done / max(1, size)
            left = (now - self.started) * (1 - share) / max(share, 1e-9)
            full = "#" * round(30 * share)
            print(f"\r{self.name:18} [{full:30}] {share:6.1%} {left:6.0f} s left", end="", file=sys.stderr)

    def close(self) -> None:
        """End its line."""
        if self.live and self.last:
            print(file=sys.stderr)
