"""How long a look at many runs takes: python tests/bench/status.py [RUNS] [--keep FOLDER]

Makes run folders as experiments leave them (a sweep of 100 points each, three in four of them done, journals of
dozens of lines, metrics of a hundred rows, a squeue with what is not), and times `runs.py status` from the start of
the interpreter to its end, in a process of its own, the first look and later ones apart.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
POINTS = 100


def make(root: Path, count: int) -> Path:
    """Fill `root` with runs; returns the folder of a squeue that knows those in the queue."""
    queue = []
    rows = "".join(
        json.dumps({"step": step, "time": 1e9 + step, "loss": 2.0, "moe/layer1/counts": [64] * 8}) + "\n"
        for step in range(1, 101)
    )
    shards = {f"shard_{i}.pt": {"size": 1 << 30, "digest": "0" * 64} for i in range(32)}
    for n in range(count):
        job, index = 1000 + n // POINTS, n % POINTS
        batch = root / "batches" / f"sweep{job}-0"
        if index == 0:
            batch.mkdir(parents=True)
            (batch / "batch.json").write_text(
                json.dumps({"state": "submitted", "token": batch.name, "job": str(job)})
            )
        folder = root / f"sweep{job}" / f"lr={index}e-5"
        folder.mkdir(parents=True)
        done, running = n % 4 != 0, n % 8 == 0
        facts = {
            "id": f"sweep{job}-{index}",
            "name": f"sweep{job}/lr={index}e-5",
            "stage": "moe",
            "parent": None,
        }
        (folder / "run.json").write_text(json.dumps(facts, indent=1))
        journal = [{"event": "submitting", "batch": str(batch), "index": index}]
        for attempt in range(3):
            name = f"{job}_{index}-{attempt}"
            journal.append({"attempt": name, "event": "start", "number": attempt, "steps": 1000})
            journal += [{"attempt": name, "event": "saved", "step": step} for step in range(10, 110, 10)]
            last = attempt == 2
            if not (last and running):
                verdict = "finished" if done and last else "error" if last else "preempted"
                journal.append(
                    {"attempt": name, "event": "verdict", "verdict": verdict, "reason": "", "again": not last}
                )
        lines = [json.dumps({**record, "time": 1e9 + i}, sort_keys=True) for i, record in enumerate(journal)]
        (folder / "attempts.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "metrics.jsonl").write_text(rows)
        if done:
            (folder / "handoff.json").write_text(
                json.dumps({"shards": shards, "step": 1000}, indent=1, sort_keys=True)
            )
        elif running:
            queue.append(f"{job}_{index}|RUNNING|None|n[1-4]|{batch.name}")
    slurm = root / ".slurm"
    slurm.mkdir()
    (slurm / "queue").write_text("\n".join(queue) + "\n")
    (slurm / "squeue").write_text(f"#!/bin/sh\ncat {slurm}/queue\n")
    (slurm / "squeue").chmod(0o755)
    return slurm


def look(root: Path, slurm: Path) -> tuple[float, float]:
    """Seconds of one `status` over all runs: on the clock, and of processor time."""
    command = [sys.executable, str(ROOT / "launch" / "runs.py"), "--runs", str(root), "status", "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": f"{slurm}:{os.environ['PATH']}"},
    )
    took = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    work = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = [row["name"] for row in json.loads(done.stdout)]
    expected = [("done" if n % 4 else "running" if n % 8 == 0 else "failed") for n in range(len(found))]
    assert sorted(found) == sorted(expected), "status is wrong, and its speed does not matter"
    return took, work


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("runs", nargs="?", type=int, default=10_000)
    options.add_argument("--repeat", type=int, default=7)
    options.add_argument("--keep", type=Path, help="make the runs here, or take those that are here")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = chosen.keep or Path(temporary) / "runs"
        slurm = root / ".slurm" if root.exists() else make(root, chosen.runs)
        first = look(root, slurm)
        times = [look(root, slurm) for _ in range(chosen.repeat)]
    print(
        f"status of {chosen.runs} runs, seconds on the clock (of processor time): first {first[0]:.2f} "
        f"({first[1]:.2f}), then median {statistics.median(t for t, _ in times):.2f} "
        f"({statistics.median(w for _, w in times):.2f}), best {min(times)[0]:.2f}, worst {max(times)[0]:.2f}"
    )


if __name__ == "__main__":
    main()
