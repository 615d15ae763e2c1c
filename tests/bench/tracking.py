"""What tracking costs and survives: python -m tests.bench.tracking cost | kills [N] | outage [SECONDS]

`cost`: the trainer's share of a step, memory and FLOPs measured, with the mirror offline and online. `kills`: N
attempts of one run, each ended by SIGKILL of everything, against the loopback server. `outage`: the server is away for
the middle part of a run; step times during it against those before.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from launch.meter import Meter
from moe.flops import Work
from tests.launch.tracked import is_online, kill_mirror, start, state, steps
from tests.wandb_server import WandbServer

STEP_SECONDS = 0.1
ROW = {
    name: random.random()
    for name in ["loss", "ce", "aux", "lr", "grad_norm", "tokens", "samples", "padding", "step_seconds"]
}
ROW |= {"positions": 4096, "images": 8}
ROW |= {f"moe/layer{layer}/dropped": 0.01 for layer in range(12)}
ROW |= {f"moe/layer{layer}/counts": [random.randrange(10_000) for _ in range(8)] for layer in range(12)}


def work(seconds: float) -> None:
    """A step's worth of Python that holds the interpreter, which is where a tracker in a thread would hurt."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        sum(range(1000))


def cost(folder: Path, count: int = 300) -> None:
    """Seconds in log() a step, and what the mirror takes from a step of pure Python."""
    for mode in ("disabled", "offline", "online"):
        tracker = Meter(Work(1.0, 1.0, 1.0, 1.0), 1, start(folder / mode, mode=mode))
        if mode == "online":
            while not is_online(folder / mode):
                time.sleep(0.1)
        spent, walls = [], []
        for step in range(1, count + 1):
            began = time.perf_counter()
            work(0.02)
            before = time.perf_counter()
            tracker.log(step, ROW)
            spent.append(time.perf_counter() - before)
            walls.append(time.perf_counter() - began)
        tracker.finish("finished")
        ordered = sorted(spent)
        median, p99 = statistics.median(spent), ordered[int(len(ordered) * 0.99)]
        share = statistics.mean(spent) / STEP_SECONDS
        print(
            f"{mode:8s} log() median {median * 1e6:6.0f} us, p99 {p99 * 1e6:6.0f} us, mean {share:.2%} of a 100 ms step"
        )


def kills(folder: Path, server: WandbServer, count: int) -> None:
    """One run over `count` attempts, each killed somewhere; rows on the server against the rows there should be."""
    rng, done = random.Random(0), 0
    for attempt in range(1, count + 2):
        tracker = start(folder, attempt=attempt, start_step=done, mode="online")
        reached = done + rng.randrange(3, 12)
        for step in range(done + 1, reached + 1):
            tracker.log(step, ROW)
        if attempt > count:
            tracker.finish("finished")
            break
        if rng.random() < 0.7:  # some die before W&B is up
            end = time.monotonic() + 60
            while not is_online(folder, attempt) and time.monotonic() < end:
                time.sleep(0.05)
            time.sleep(rng.random() * 0.5)
        kill_mirror(tracker)
        done = rng.randrange(done, reached + 1)  # the last checkpoint
    (run,) = server.runs.values()
    assert run.steps == steps(folder / "metrics.jsonl") == list(range(1, len(run.steps) + 1)), run.steps
    print(f"{count} kills: one run, {len(run.steps)} steps, each once and in order, state {run.state}")


def outage(folder: Path, server: WandbServer, seconds: float) -> None:
    """Steps of 10 ms before, during and after an outage."""
    tracker = start(folder, mode="online")
    while not is_online(folder):
        time.sleep(0.1)
    times: dict[str, list[float]] = {"before": [], "during": [], "after": []}
    step = 0
    for part, length in (("before", seconds / 2), ("during", seconds), ("after", 5.0)):
        server.down = part == "during"
        end = time.monotonic() + length
        while time.monotonic() < end:
            step += 1
            began = time.perf_counter()
            time.sleep(0.01)
            tracker.log(step, ROW)
            times[part].append(time.perf_counter() - began)
    tracker.finish("finished")
    (run,) = server.runs.values()
    for part, values in times.items():
        ordered = sorted(values)
        print(
            f"{part:6s} {len(values):6d} steps: median {statistics.median(values) * 1e3:.2f} ms, "
            f"p99 {ordered[int(len(values) * 0.99)] * 1e3:.2f} ms, longest {ordered[-1] * 1e3:.2f} ms"
        )
    print(f"on the server: {len(run.steps)} of {step} steps, delivered {state(folder).get('delivered')}")
    assert run.steps == list(range(1, step + 1)) or not state(folder).get("delivered")


def main(arguments: list[str]) -> None:
    what, number = arguments[0], float(arguments[1]) if len(arguments) > 1 else 0.0
    with tempfile.TemporaryDirectory() as name, WandbServer() as server:
        os.environ.update(server.environment(Path(name) / "home"))
        if what == "cost":
            cost(Path(name))
        elif what == "kills":
            kills(Path(name) / "run", server, int(number or 100))
        elif what == "outage":
            outage(Path(name) / "run", server, number or 36.0)
        assert not server.unknown, server.unknown


if __name__ == "__main__":
    main(sys.argv[1:])
