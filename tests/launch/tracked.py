"""What the tests of tracking share: a server, runs that log to it, and ways to kill them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from launch.metrics import NoTracker
from launch.online import session
from launch.spec import WandbSpec
from launch.tracking import Trackers, WandbTracker, trackers
from tests.wandb_server import WandbServer

RUN = {"id": "demo-align", "name": "align lr=1e-3", "experiment": "demo", "stage": "align", "tags": ["small"]}
HANDOFF = {"run": "demo-align", "experiment": "demo", "stage": "align", "step": 20, "digest": "ab" * 32}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    """A W&B server that this process's trackers use; no question of the client may go unanswered."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    with WandbServer() as server:
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        yield server
    assert server.unknown == set()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def hurried(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Shorten the mirror's waits; of launch.online.mirror and launch.online.session, by name."""
    lines = [f"{'t' if hasattr(session, name) else 'm'}.{name} = {value}" for name, value in seconds.items()]
    script = f"import launch.online.mirror as m, launch.online.session as t; {'; '.join(lines)}; m.main()"
    monkeypatch.setattr(WandbTracker, "command", (sys.executable, "-c", script))


def start(
    folder: Path,
    attempt: int = 1,
    start_step: int = 0,
    run: Mapping[str, Any] = RUN,
    lease: str = "",
    **spec: Any,
) -> NoTracker:
    config = {"model": {"backbone": "phi"}, "train": {"optim": {"lr": 2e-5}}}
    facts: dict[str, Any] = {"rank": 0, "attempt": attempt, "start_step": start_step, "lease": lease}
    return trackers(folder, run, config, WandbSpec(**spec), **facts)


def log(tracker: NoTracker, first: int, last: int, pause: float = 0.0) -> None:
    for step in range(first, last + 1):
        tracker.log(step, {"loss": 1 / step, "step_seconds": 0.1, "moe/layer0/counts": [step, 3, 2, 1]})
        time.sleep(pause)


def wait(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def state(folder: Path, attempt: int = 1) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "wandb" / f"mirror_{attempt}.json").read_text()))
    except FileNotFoundError:
        return {}


def is_online(folder: Path, attempt: int = 1) -> bool:
    found = state(folder, attempt)
    return bool(found.get("mode") == "online" and found["segments"])


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def descendants(pid: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = [pid]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return found


def kill_mirror(tracker: NoTracker) -> None:
    """What a node's end does: the mirror and wandb's own process die at once."""
    assert isinstance(tracker, Trackers)
    process = tracker.members[1]._process  # type: ignore[attr-defined]
    for pid in reversed(descendants(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
