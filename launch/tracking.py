"""Where a run's numbers, tables and checkpoints are recorded: metrics.jsonl always, W&B when it can be had.

W&B follows the run folder. The trainer only writes files: rows to metrics.jsonl, everything else W&B is to
hold to wandb/wanted.jsonl. A process of its own (launch/mirror.py) reads them and talks to W&B, so that no
outage, full pipe or hanging client can hold up a step, and what W&B did not take is still there for the next
attempt or the syncer. The only file that imports wandb, and only in the functions that need it.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from launch import segments
from launch.metrics import JsonlTracker, NoTracker, scalars
from launch.record import append_line, write_json
from launch.redact import environment_secrets, redact, redact_text, secret_name
from launch.spec import WandbSpec

__all__ = ["JsonlTracker", "NoTracker", "Session", "Trackers", "WandbTracker", "trackers"]

INIT_SECONDS = 20  # wandb-core's wait for the server in init
FINISH_SECONDS = 30  # wandb-core's wait for the last uploads; without it finish() waits for ever
PATIENCE_SECONDS = {"preempted": 40.0}  # the trainer's wait for the mirror at the end; else:
LONGEST_PATIENCE_SECONDS = 75.0
LAG_SECONDS = 10.0  # from the server's taking rows to its showing them, at most
FLUSH_SECONDS = 2.0  # a killed node loses at most this much of an offline run's file
HISTOGRAM_EVERY = 50  # rows
EXIT_CODES = {"finished": 0, "preempted": 143, "failed": 1}


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

    def finish(self, outcome: str) -> None:
        for member in self.members:
            member.finish(outcome)


def trackers(
    run_dir: Path,
    run: Mapping[str, Any],
    config: Mapping[str, Any],
    spec: WandbSpec,
    *,
    rank: int,
    attempt: int,
    start_step: int,
) -> NoTracker:
    """What this rank records with; `run` has id, name, experiment, stage and perhaps tags."""
    if rank:
        return NoTracker()
    members: list[NoTracker] = [JsonlTracker(run_dir / "metrics.jsonl", start_step=start_step)]
    if spec.mode != "disabled" and os.environ.get("WANDB_MODE") != "disabled":
        tags = (*spec.tags, *run.get("tags", ()))
        identity = (str(run["id"]), str(run["name"]), str(run["experiment"]), str(run["stage"]), tags)
        members.append(WandbTracker(*identity, config, spec, run_dir, attempt=attempt, start_step=start_step))
    return Trackers(*members)


class WandbTracker(NoTracker):
    """The trainer's end of W&B: starts the mirror, leaves it files; never raises, waits only at the end.

    `folder` is the run folder. Rows are read from its metrics.jsonl, so a JsonlTracker must write that file.
    """

    command = (sys.executable, "-m", "launch.mirror")

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
    ) -> None:
        self.folder, self.attempt = folder.absolute(), attempt
        self._wanted = self.folder / "wandb" / "wanted.jsonl"
        self._process: subprocess.Popen[bytes] | None = None
        self._starts, self._next_look = 0, 0.0
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
            self._next_look = now + 30
            if self._process is None or self._process.poll() is not None:
                self._quietly(self._start)

    def publish(self, checkpoint: Any) -> None:
        self.summary({"checkpoint/step": checkpoint.step, "checkpoint/path": str(checkpoint.path)})

    def use(self, handoff: Mapping[str, Any]) -> None:
        self._quietly(lambda: self._want("use", artifact_name(handoff), digest=digest12(handoff)))

    def publish_handoff(self, handoff: Mapping[str, Any]) -> None:
        self._quietly(lambda: self._publish_handoff(handoff))

    def _publish_handoff(self, handoff: Mapping[str, Any]) -> None:
        # W&B reads the file when it uploads it, which may be days later: it gets a copy that nobody changes.
        copy = self.folder / "wandb" / "handoffs" / f"{digest12(handoff)}.json"
        write_json(copy, redact(dict(handoff)))
        self._want("handoff", artifact_name(handoff), digest=digest12(handoff), file=str(copy))

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        cells = [[_cell(value) for value in row] for row in rows]
        self._want("table", name, columns=list(columns), rows=cells)

    def summary(self, values: Mapping[str, object]) -> None:
        self._want("summary", "", values=redact(dict(values)))

    def finish(self, outcome: str) -> None:
        """Give W&B a bounded time to take what is left."""
        process, self._process = self._process, None
        self._next_look = float("inf")
        if process is None:
            return
        try:
            assert process.stdin is not None
            process.stdin.write(f"{outcome}\n".encode())
            process.stdin.close()
            process.wait(PATIENCE_SECONDS.get(outcome, LONGEST_PATIENCE_SECONDS))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            self._say("took too long to take the last rows; the next attempt or `runs.py sync` sends them")
        except OSError as error:
            self._say(
                f"its process ended early ({error}); the next attempt or `runs.py sync` sends what it left"
            )

    def _start(self) -> None:
        if self._starts >= 5:
            return
        self._starts += 1
        if self._process is not None:
            self._say("its process ended; starting it again")
            if self._process.stdin:
                self._process.stdin.close()
        with (self.folder / "wandb" / f"mirror_{self.attempt}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self.command, str(self.folder), str(self.attempt)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=Path(__file__).resolve().parents[1],  # `-m` looks there first: the code this process runs
                env=environment(self.folder),
                start_new_session=True,  # a Ctrl-C leaves it the time to send the rest
            )
        self._next_look = time.monotonic() + 30

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


def _cell(value: object) -> object:
    if isinstance(value, Path):
        return {"images": [str(value.absolute())]}
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Path) for item in value):
        return {"images": [str(item.absolute()) for item in value]}
    return value if isinstance(value, (int, float, bool)) or value is None else redact_text(str(value))


class Session:
    """One run opened in wandb, for as long as one process writes to it. Everything here may raise."""

    def __init__(self, job: Mapping[str, Any], folder: Path, *, online: bool, final: bool = True) -> None:
        """`final`: this session's end is the run's (a live view from elsewhere leaves the run running)."""
        import wandb

        self.online = online
        self._wandb, self._rows = wandb, 0
        self._seconds: deque[float] = deque(maxlen=200)
        if not online:
            recorded = segments.last_step(folder)
        settings = wandb.Settings(
            console="off",  # the cluster keeps the logs
            disable_git=True,  # remotes may hold a password
            disable_code=True,
            disable_job_creation=True,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            init_timeout=INIT_SECONDS,
            silent=True,
            x_disable_stats=not final,
            x_save_requirements=False,
            x_service_wait=60,
            x_stats_pid=job["trainer"],
            x_transaction_log_flush_interval=FLUSH_SECONDS,
            x_update_finish_state=final,
        )
        self.run = wandb.init(
            id=job["id"],
            name=job["name"],
            group=job["group"],
            job_type=job["job_type"],
            tags=job["tags"],
            config=job["config"],
            entity=job["entity"] or None,
            project=job["project"],
            dir=folder,
            mode="online" if online else "offline",
            resume="allow",
            settings=settings,
        )
        self.run.define_metric("train/step", hidden=True)
        self.run.define_metric("*", step_metric="train/step")
        self.step: int = int(self.run.starting_step) - 1 if online else recorded
        """The last step that W&B has: only later ones may be logged."""

    @property
    def segment(self) -> str:
        """The folder wandb keeps this session's file in."""
        return Path(self.run.settings.sync_dir).name

    def log(self, row: Mapping[str, Any]) -> None:
        """Send a row of metrics.jsonl; committed at once, or the last would wait for a next."""
        step = row["step"]
        values: dict[str, Any] = {**scalars(row), "train/step": step}
        self._rows += 1
        if isinstance(seconds := row.get("step_seconds"), (int, float)):
            self._seconds.append(seconds)
            if step % 10 == 0:
                ordered = sorted(self._seconds)
                for percent in (50, 95, 99):
                    index = min(len(ordered) - 1, len(ordered) * percent // 100)
                    values[f"train/step_seconds_p{percent}"] = ordered[index]
        if self._rows % HISTOGRAM_EVERY == 1:
            for key, counts in row.items():
                if key.endswith("/counts") and isinstance(counts, list) and 0 < len(counts) <= 512:
                    bars = (counts, list(range(len(counts) + 1)))
                    values[f"{key.removesuffix('/counts')}/experts"] = self._wandb.Histogram(
                        np_histogram=bars
                    )
        self.run.log(values, step=step, commit=True)
        self.step = step

    def hold(self, item: Mapping[str, Any]) -> bool:
        """Put a line of wanted.jsonl into the run (offline: summaries only); whether the server has it already."""
        if item["kind"] == "summary":
            self.run.summary.update(item["values"])
        elif item["kind"] == "table":
            rows = [[self._cell(value) for value in row] for row in item["rows"]]
            self.run.summary[item["name"]] = self._wandb.Table(columns=item["columns"], data=rows)
        elif item["kind"] == "handoff":
            return self._log_artifact(item)
        elif item["kind"] == "use":
            place = f"{self.run.entity}/{self.run.project}/{item['name']}:h-{item['digest']}"
            self.run.use_artifact(place)
            return True
        return False

    def _log_artifact(self, item: Mapping[str, Any]) -> bool:
        artifact = handoff_artifact(item)
        aliases = ["latest", f"h-{item['digest']}", f"step-{artifact.metadata['step']}"]
        logged = self.run.log_artifact(artifact, aliases=aliases)
        logged.wait(timeout=FINISH_SECONDS)
        return True

    def _cell(self, value: object) -> object:
        if not isinstance(value, dict):
            return value
        images = [self._wandb.Image(path) for path in value["images"] if Path(path).is_file()]
        return images[0] if len(images) == 1 else images or None

    def finish(self, outcome: str) -> None:
        """Send the rest and end; TimeoutError when the server did not take it in time."""
        if outcome == "preempted":
            self.run.mark_preempting()
        self.run.finish(exit_code=EXIT_CODES.get(outcome, 1))


def handoff_artifact(item: Mapping[str, Any]) -> Any:
    """The artifact that mirrors a handoff: the small file, and a reference to the checkpoint; no copy."""
    import wandb

    file = Path(item["file"])
    handoff = json.loads(file.read_text())
    folder = file.parents[2] / handoff["path"]
    facts = {key: handoff.get(key) for key in ("run", "experiment", "stage", "step", "digest", "parent")}
    artifact = wandb.Artifact(item["name"], type="model", metadata=facts | {"path": str(folder)})
    artifact.add_file(str(file), name="handoff.json", policy="immutable", skip_cache=True)
    if folder.is_dir():
        artifact.add_reference(folder.as_uri(), name="checkpoint", checksum=False)
    return artifact


def close() -> None:
    """Forget every session of this process, also one that hangs, so that a new one can be opened."""
    import wandb

    wandb.teardown()


def base_url() -> str:
    """The W&B server of this account."""
    import wandb

    return str(wandb.setup().settings.base_url)


@dataclass(frozen=True)
class OnServer:
    """What the server says of a run."""

    step: int = -1  # the last one
    rows: int = 0
    state: str = ""
    entity: str = ""


def ask(job: Mapping[str, Any], expected: int = -1) -> OnServer:
    """What the server has of a run; raises when it does not answer.

    What was sent may be shown a little later: a run without the `expected` step is asked for again.
    """
    end = time.monotonic() + LAG_SECONDS
    while (found := _ask(job)).step < expected and time.monotonic() < end:
        time.sleep(1)
    return found


def _ask(job: Mapping[str, Any]) -> OnServer:
    import wandb
    from wandb.apis.public import RunNotFoundError

    api = wandb.Api(timeout=20)
    entity = job["entity"] or api.default_entity
    try:
        run = api.run(f"{entity}/{job['project']}/{job['id']}")
        return OnServer(int(run.lastHistoryStep), int(run.historyLineCount), str(run.state), entity)
    except (RunNotFoundError, wandb.errors.CommError) as error:
        if not isinstance(getattr(error, "exc", error), RunNotFoundError):
            raise
        return OnServer(entity=entity)


def fetch_handoff(place: str) -> dict[str, Any]:
    """The handoff that the artifact `entity/project/name:alias` mirrors, with the run folder as `folder`.

    Only the small file is read: a reference's download would copy the whole checkpoint into a cache.
    """
    import wandb

    artifact = wandb.Api(timeout=60).artifact(place)
    with tempfile.TemporaryDirectory() as folder:
        file = artifact.get_entry("handoff.json").download(root=folder)
        handoff: dict[str, Any] = json.loads(Path(file).read_text())
    path = Path(str(artifact.metadata["path"]))
    return handoff | {"folder": str(Path(*path.parts[: len(path.parts) - len(Path(handoff["path"]).parts)]))}
