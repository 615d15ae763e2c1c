"""One line of progress for a run on this machine: stage, step, loss, samples a second, time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from launch.plan import Run


def span(seconds: float) -> str:
    """3 h 05 min, 4 min 10 s, 12 s."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"


class Progress:
    """Rewrites its line on a terminal; elsewhere prints one now and then."""

    def __init__(self, run: Run, every: float = 10.0) -> None:
        self.run = run
        self.every = every
        self.live = sys.stdout.isatty()
        self.shown = 0.0
        self.line = ""

    def __enter__(self) -> Progress:
        self.started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self.live and self.line:
            print(flush=True)

    def show(self, last: bool = False) -> None:
        """Print where the run is, if that is news."""
        now = time.monotonic()
        if not last and now - self.shown < (0.5 if self.live else self.every):
            return
        self.shown = now
        line = self._line()
        if line == self.line:
            return
        self.line = line
        print(f"\r\x1b[K{line}" if self.live else line, end="" if self.live else "\n", flush=True)

    def _line(self) -> str:
        head = f"{self.run.spec.stage:8} {self.run.name}"
        start = self.run.folder.last("start", "ended", "evaluating")
        row = self.run.folder.last_metrics()
        if not start or (start["event"] == "start" and row.get("time", 0.0) < start["time"]):
            return (
                f"{head}  starting ({span(time.monotonic() - self.started)})"
                if self.live
                else f"{head}  starting"
            )
        if start["event"] == "evaluating":
            return f"{head}  asking the held-out questions"
        step, steps = int(row.get("step", 0)), int(start.get("steps", 0) or row.get("steps", 0))
        text = f"{head}  step {step}"
        if start["event"] == "start":
            left = (steps - step) * float(row.get("step_seconds", 0.0))
            text = f"{head}  step {step}/{steps}"
        else:
            left = 0.0
        if "loss" in row:
            text += f"  loss {row['loss']:.3f}  {row.get('samples_per_second', 0.0):.0f} samples/s"
        return f"{text}  {span(left)} left" if left else text
