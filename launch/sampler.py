"""One node's load, beside the training: python -m launch.sampler FILE

W&B itself records the node of rank 0 alone, and several writers of one run are experimental in it. With
`wandb.system: node` each node has this process, which adds a line to a file of its own every few seconds; the
mirror of rank 0 takes the newest lines along. It ends when its input does: with the rank that started it.
"""

from __future__ import annotations

import json
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.files import newest_records

EVERY_SECONDS = 15.0
FRESH_SECONDS = 90.0  # an older sample says nothing of now
QUERY = "utilization.gpu,memory.used,power.draw,temperature.gpu"


def start(run_dir: Path, node: str) -> subprocess.Popen[bytes]:
    """Begin to sample this node; keep what is returned, its input is what keeps the process alive."""
    from launch.tracking import environment

    file = run_dir.absolute() / "wandb" / "nodes" / f"{node}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "launch.sampler", str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).resolve().parents[1],
        env=environment(run_dir.absolute()),
        start_new_session=True,  # a warning to the step is not for it
    )


def newest(run_dir: Path, now: float) -> dict[str, dict[str, float]]:
    """The newest sample of each node that has a fresh one, by the node's name."""
    found = {}
    for path in sorted((run_dir / "wandb" / "nodes").glob("*.jsonl")):
        sample = next(newest_records(path), {})
        if now - float(sample.get("time", 0.0)) < FRESH_SECONDS:
            found[path.stem] = {key: float(value) for key, value in sample.items()}
    return found


def processors(before: Sequence[int], after: Sequence[int]) -> float:
    """The share of processor time that was used between two readings of /proc/stat's first line."""
    spent = [b - a for a, b in zip(before, after, strict=True)]
    idle = spent[3] + spent[4]  # idle, iowait
    return round(1 - idle / max(1, sum(spent)), 4)


def memory() -> float:
    """GB in use on this node."""
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return round(
        sum(s * int(facts[n].split()[0]) for s, n in ((1, "MemTotal"), (-1, "MemAvailable"))) / 1e6, 3
    )


def graphics(program: str) -> dict[str, float]:
    """Of this node's GPUs: mean and least use, the fullest one's GB, watts of all, the hottest one's degrees."""
    command = [program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=EVERY_SECONDS, check=False).stdout
    columns: list[list[float]] = [[], [], [], []]
    for line in said.splitlines():
        for column, text in zip(columns, line.split(","), strict=False):
            try:
                column.append(float(text))
            except ValueError:
                continue  # [N/A]: this device does not say it
    use, full, watts, heat = columns
    found: dict[str, float] = {}
    if use:
        found |= {"gpu_use": round(sum(use) / len(use) / 100, 4), "gpu_use_min": min(use) / 100}
    if full:
        found["gpu_memory_gb"] = round(max(full) * 1.048576e-3, 3)  # it says MiB
    if watts:
        found["gpu_watts"] = round(sum(watts), 1)
    if heat:
        found["gpu_celsius"] = max(heat)
    return found


def _stat() -> list[int]:
    with open("/proc/stat", encoding="ascii") as file:
        return [int(word) for word in file.readline().split()[1:9]]


def main(arguments: list[str]) -> None:
    file, program, before = Path(arguments[0]), shutil.which("nvidia-smi"), _stat()
    every = float(arguments[1]) if len(arguments) > 1 else EVERY_SECONDS
    while not select.select([0], [], [], every)[0]:
        after = _stat()
        sample = {"time": round(time.time(), 1), "cpu": processors(before, after), "memory_gb": memory()}
        before = after
        try:
            sample |= graphics(program) if program else {}
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(sample) + "\n")
        except (OSError, subprocess.TimeoutExpired):
            continue  # a full disk or a sick driver is for others to tell


if __name__ == "__main__":
    main(sys.argv[1:])
