"""Where a run's numbers, tables and checkpoints are recorded: metrics.jsonl always, W&B when it can be had.

W&B follows the run folder. The trainer only writes files: rows to metrics.jsonl, everything else W&B is to
hold to wandb/wanted.jsonl. A process of its own (launch/online/mirror.py) reads them and talks to W&B, so that no
outage, full pipe or hanging client can hold up a step, and what W&B did not take is still there for the next
attempt or the syncer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from launch.files import append_line, write_json
from launch.metrics import JsonlTracker, NoTracker
from launch.online.reach import ORDERS
from launch.redact import environment_secrets, redact, redact_text, secret_name
from launch.spec import WandbSpec

__all__ = ["JsonlTracker", "NoTracker", "Trackers", "WandbTracker", "trackers"]

PATIENCE_SECONDS = {"preempted": 40.0}  # the trainer's wait for the mirror at the end; else:
LONGEST_PATIENCE_SECONDS = 75.0
LOOK_SECONDS = 30.0  # between the trainer's looks at the mirror


class Trackers(NoTracker):
    """Several trackers as one, in order; metrics.jsonl comes first, as the others read it."""

    def __init__(self, *members: NoTracker) -> None:
        self.members = members

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        for member in self.members:
            member.log(step, metrics)

    def publish(self, checkpoint: Any) -> None:
        for member in self.members:
            member.publish(checkpoint)

    def use(self, handoff: Mapping[str, Any]) -> None:
        for member in self.members:
            member.use(handoff)

    def publish_handoff(self, handoff: Mapping[str, Any]) -> None:
        for member in self.members:
            member.publish_handoff(handoff)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        rows = list(rows)
        for member in self.members:
            member.table(name, columns, rows)

    def summary(self, values: Mapping[str, object]) -> None:
        for member in self.members:
            member.summary(values)

    def asked(self) -> frozenset[str]:
        return frozenset().union(*(member.asked() for member in self.members))

    def finish(self, outcome: str, within: float | None = None) -> None:
        for member in self.members:
            member.finish(outcome, within)


def trackers(
    run_dir: Path,
    run: Mapping[str, Any],
    config: Mapping[str, Any],
    spec: WandbSpec,
    *,
    rank: int,
    attempt: int,
    start_step: int,
    lease: str = "",
) -> NoTracker:
    """What this rank records with; `run` has id, name, experiment, stage and perhaps tags. `lease`: its token."""
    if rank:
        return NoTracker()
    members: list[NoTracker] = [JsonlTracker(run_dir / "metrics.jsonl", start_step=start_step)]
    if spec.mode != "disabled" and os.environ.get("WANDB_MODE") != "disabled":
        tags = (*spec.tags, *run.get("tags", ()))
        identity = (str(run["id"]), str(run["name"]), str(run["experiment"]), str(run["stage"]), tags)
        members.append(
            WandbTracker(
                *identity, config, spec, run_dir, attempt=attempt, start_step=start_step, lease=lease
            )
        )
    return Trackers(*members)


class WandbTracker(NoTracker):
    """The trainer's end of W&B: starts the mirror, leaves it files; never raises, waits only at the end.

    `folder` is the run folder. Rows are read from its metrics.jsonl, so a JsonlTracker must write that file.
    """

    command = (sys.executable, "-m", "launch.online.mirror")

    def __init__(
        self,
        run_id: str,
        name: str,
        group: str,
        job_type: str,
        tags: Iterable[str],
        config: Mapping[str, Any],
        spec: WandbSpec,
        folder: Path,
        *,
        attempt: int,
        start_step: int,
        lease: str = "",
    ) -> None:
        self.folder, self.attempt, self.lease = folder.absolute(), attempt, lease
        self._wanted = self.folder / "wandb" / "wanted.jsonl"
        self._process: subprocess.Popen[bytes] | None = None
        self._starts, self._next_look = 0, 0.0
        self._asked: frozenset[str] = frozenset()
        job = {
            "id": safe(run_id, 64),
            "name": name,
            "group": group,
            "job_type": job_type,
            "tags": sorted({tag[:64] for tag in tags if tag}),
            "config": redact(dict(config) | {"attempt": attempt}),
            "mode": spec.mode,
            "entity": spec.entity or os.environ.get("WANDB_ENTITY", ""),
            "project": spec.project,
            "attempt": attempt,
            "start_step": start_step,
            "trainer": os.getpid(),
            "host": socket.gethostname(),
        }
        self._quietly(lambda: write_json(self.folder / "wandb" / f"attempt_{attempt}.json", job))
        self._quietly(self._start)

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        """Look after the mirror now and then; the row itself is in metrics.jsonl already."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._quietly(self._listen)
            if self._process is None or self._process.poll() is not None:
                self._quietly(self._start)

    def asked(self) -> frozenset[str]:
        return self._asked

    def _listen(self) -> None:
        """Take what the mirror has said, without waiting for it."""
        if self._process is not None and self._process.stdout is not None:
            self._asked |= ORDERS & set((self._process.stdout.read() or b"").decode().split())

    def publish(self, checkpoint: Any) -> None:
        self.summary({"checkpoint/step": checkpoint.step, "checkpoint/path": str(checkpoint.path)})

    def use(self, handoff: Mapping[str, Any]) -> None:
        self._quietly(lambda: self._use(handoff))

    def _use(self, handoff: Mapping[str, Any]) -> None:
        if handoff.get("kind") == "hub":  # W&B has no artifact of it yet
            place = str(handoff["path"])
            self._want("origin", safe(f"hub-{handoff['run']}"), digest=digest12(handoff), path=place)
        else:
            self._want("use", handoff.get("artifact") or artifact_name(handoff), digest=digest12(handoff))

    def publish_handoff(self, handoff: Mapping[str, Any]) -> None:
        self._quietly(lambda: self._publish_handoff(handoff))

    def _publish_handoff(self, handoff: Mapping[str, Any]) -> None:
        # W&B reads the file when it uploads it, which may be days later: it gets a copy that nobody changes.
        copy = self.folder / "wandb" / "handoffs" / f"{digest12(handoff)}.json"
        write_json(copy, redact(dict(handoff)))
        self._want("handoff", artifact_name(handoff), digest=digest12(handoff), file=str(copy))

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        known = environment_secrets()
        cells = [[_cell(value, known) for value in row] for row in rows]
        self._want("table", name, columns=list(columns), rows=cells)

    def summary(self, values: Mapping[str, object]) -> None:
        self._want("summary", "", values=redact(dict(values)))

    def finish(self, outcome: str, within: float | None = None) -> None:
        """Give W&B a bounded time to take what is left."""
        process, self._process = self._process, None
        self._next_look = float("inf")
        if process is None:
            return
        with contextlib.suppress(OSError):  # it has ended already: seen below
            assert process.stdin is not None
            process.stdin.write(f"{outcome}\n".encode())
            process.stdin.close()
        try:
            patience = PATIENCE_SECONDS.get(outcome, LONGEST_PATIENCE_SECONDS)
            if process.wait(patience if within is None else min(patience, within)):
                self._say("its process failed; the next attempt or `runs.py sync` sends the rest")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            self._say("took too long to take the last rows; the next attempt or `runs.py sync` sends them")
        _hang_up(process)

    def _start(self) -> None:
        if self._starts >= 5:
            return
        self._starts += 1
        if self._process is not None:
            self._say("its process ended; starting it again")
            _hang_up(self._process)
        with (self.folder / "wandb" / f"mirror_{self.attempt}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self.command, str(self.folder), str(self.attempt), self.lease],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=Path(__file__).resolve().parents[1],  # `-m` looks there first: the code this process runs
                env=environment(self.folder),
                start_new_session=True,  # a Ctrl-C leaves it the time to send the rest
            )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._next_look = time.monotonic() + LOOK_SECONDS

    def _want(self, kind: str, name: str, **content: object) -> None:
        body = json.dumps([kind, name, content], sort_keys=True, default=str)
        item = {
            "key": sha256(body.encode()).hexdigest()[:16],
            "kind": kind,
            "name": name,
            **json.loads(body)[2],
        }
        self._quietly(lambda: append_line(self._wanted, item))

    def _quietly(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._say(f"{type(error).__name__}: {error}")

    def _say(self, text: str) -> None:
        print(f"W&B: {text} (training goes on; {self.folder / 'wandb'})", file=sys.stderr, flush=True)


def environment(folder: Path) -> dict[str, str]:
    """The environment for a process that runs wandb: without other secrets, with its folders beside the run.

    wandb uploads every variable whose name starts with SLURM_ (also SLURM_JWT, a login), and connects to the
    service of another process where WANDB_SERVICE says so.
    """
    keep = {}
    for name, value in os.environ.items():
        if name in ("WANDB_SERVICE", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_NAME", "PYTHONSAFEPATH"):
            continue
        if secret_name(name) and not name.startswith("WANDB_"):
            continue
        if name.startswith("SLURM_") and redact_text(value, environment_secrets()) != value:
            continue
        keep[name] = value
    for name in ("CACHE", "DATA", "ARTIFACT"):
        keep.setdefault(f"WANDB_{name}_DIR", str(folder / "wandb" / name.lower()))
    return keep | {"WANDB_ERROR_REPORTING": "false", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def safe(name: str, length: int = 128) -> str:
    """A name W&B takes, the same for the same `name`; what does not fit is replaced by a digest."""
    cleaned = re.sub(r"[^A-Za-z0-9_.-]", "-", name)
    return (
        cleaned
        if len(cleaned) <= length
        else f"{cleaned[: length - 13]}-{sha256(name.encode()).hexdigest()[:12]}"
    )


def digest12(handoff: Mapping[str, Any]) -> str:
    """What the artifact's alias names a checkpoint by: twelve digits of its digest."""
    return str(handoff["digest"]).rpartition(":")[2][:12]


def artifact_name(handoff: Mapping[str, Any]) -> str:
    """The artifact that a run's handoffs are versions of."""
    return safe(f"checkpoint-{handoff['run']}")


def _hang_up(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _cell(value: object, known: tuple[str, ...]) -> object:
    if isinstance(value, Path):
        return {"images": [str(value.absolute())]}
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Path) for item in value):
        return {"images": [str(item.absolute()) for item in value]}
    return value if isinstance(value, (int, float, bool)) or value is None else redact_text(str(value), known)
