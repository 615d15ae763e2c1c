"""launch.job with a stand-in for launch.stage: ranks that start in no time and end as a test asks for.

`acts.json` in the run folder has a word for each attempt whose ranks start: `finish`, `run` (until warned), or
`stop 1`, `kill 1`, `raise 1` for what becomes of rank 1 after step 50.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import types
from collections.abc import Callable
from typing import Any

from launch import job
from launch.record import RunFolder
from launch.recovery.deadline import ends
from launch.recovery.pulse import Pulse

STEP = 0.02  # seconds


def run_stage(folder: RunFolder, place: job.Place, warned: Callable[[], bool], pulse: Pulse) -> str:
    """As launch.stage's, without the training."""
    acts = json.loads((folder.path / "acts.json").read_text())
    # All ranks must count alike, whatever the watch has said by now of attempts that had none; a successor's first
    # attempt is its run's second.
    before = {r["attempt"] for r in folder.journal if r["event"] == "launched"} - {place.attempt}
    number = len(before)
    act, _, rank = acts[min(number, len(acts) - 1)].partition(" ")
    facts: dict[str, Any] = {"attempt": place.attempt, "world": place.world, "node": place.node}
    if place.rank == 0:
        cache = os.environ.get("TRITON_CACHE_DIR", "")
        folder.note("start", **facts, number=number, ends=ends(), act=act, cache=cache)
    for step in range(1, 100_000):
        pulse("data", step)
        pulse("step", step)
        time.sleep(STEP)
        pulse("agree", step)
        if step == 50 and act in ("stop", "kill") and place.rank == int(rank):
            pulse._write()  # the last that the watch hears of it
            os.kill(os.getpid(), signal.SIGSTOP if act == "stop" else signal.SIGKILL)
        if step == 50 and act == "raise" and place.rank == int(rank):
            raise ValueError("shapes differ")
        while step == 51 and act in ("stop", "kill", "raise"):
            time.sleep(1)  # as in a collective with the rank that is gone
        if (warned() and act in ("run", "finish")) or (act == "finish" and step == 50):
            break
    outcome = "preempted" if warned() else "finished"
    if place.rank == 0:
        folder.note("saved", attempt=place.attempt, step=100 * number + step, seconds=0.5)
        folder.note("ended", attempt=place.attempt, outcome=outcome, reason=getattr(warned, "warned", ""))
        if outcome == "finished":
            folder.handoff_file.write_text(json.dumps({"step": step}, indent=1) + "\n")
    return outcome


if __name__ == "__main__":
    stage = types.ModuleType("launch.stage")
    stage.run_stage = run_stage  # type: ignore[attr-defined]
    sys.modules["launch.stage"] = stage
    os._exit(job.main(sys.argv[1:]))
