"""What this project asks of wandb, and the only file that imports it.

Everything here may raise, hang for as long as it says, or leave its process with hooks and helpers: it runs in
mirror.py and sync.py beside it, which are processes of their own. wandb is imported where it is needed.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.metrics import scalars
from launch.online import segments
from launch.online.reach import ORDERS

INIT_SECONDS = 20  # wandb-core's wait for the server in init
FINISH_SECONDS = 30  # wandb-core's wait for the last uploads; without it finish() waits for ever
LAG_SECONDS = 10.0  # from the server's taking rows to its showing them, at most
FLUSH_SECONDS = 2.0  # a killed node loses at most this much of an offline run's file
HISTOGRAM_EVERY = 50  # rows
EXIT_CODES = {"finished": 0, "preempted": 143, "failed": 1}


class Session:
    """One run opened in wandb, for as long as one process writes to it."""

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
        """Put a line of wanted.jsonl into the run (offline: summaries); whether the server has it already."""
        if item["kind"] == "summary":
            self.run.summary.update(item["values"])
        elif item["kind"] == "table":
            rows = [[self._cell(value) for value in row] for row in item["rows"]]
            self.run.summary[item["name"]] = self._wandb.Table(columns=item["columns"], data=rows)
        elif item["kind"] == "handoff":
            return self._log_artifact(item)
        elif item["kind"] == "use":
            own = f"{self.run.entity}/{self.run.project}/" if "/" not in item["name"] else ""
            self.run.use_artifact(f"{own}{item['name']}:h-{item['digest']}")
            return True
        elif item["kind"] == "origin":
            self.run.use_artifact(self._origin(item), aliases=["latest", f"h-{item['digest']}"])
            return True
        return False

    def _log_artifact(self, item: Mapping[str, Any]) -> bool:
        artifact = handoff_artifact(item)
        aliases = ["latest", f"h-{item['digest']}", f"step-{artifact.metadata['step']}"]
        logged = self.run.log_artifact(artifact, aliases=aliases)
        logged.wait(timeout=FINISH_SECONDS)
        return True

    def _origin(self, item: Mapping[str, Any]) -> Any:
        """A model that came from the hub, as an artifact that refers to it; no copy."""
        facts = {"path": item["path"], "digest": item["digest"]}
        artifact = self._wandb.Artifact(item["name"], type="model", metadata=facts)
        artifact.add_reference(Path(item["path"]).as_uri(), name="model", checksum=False)
        return artifact

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


def died(error: Exception) -> bool:
    """Whether it says that wandb-core, the process behind wandb, is gone."""
    from wandb.sdk.mailbox.mailbox_handle import HandleAbandonedError

    return isinstance(error, (ConnectionError, HandleAbandonedError))


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
    tags: tuple[str, ...] = ()


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
        facts = (int(run.lastHistoryStep), int(run.historyLineCount), str(run.state), entity)
        return OnServer(*facts, tuple(run.tags or ()))
    except (RunNotFoundError, wandb.errors.CommError) as error:
        if not isinstance(getattr(error, "exc", error), RunNotFoundError):
            raise
        return OnServer(entity=entity)


def take_orders(job: Mapping[str, Any], keep: Callable[[Iterable[str]], None]) -> set[str]:
    """The orders among the run's tags; `keep` has them before they are taken off the page, so that none is lost.

    They are taken off so that the next attempt does not obey again.
    """
    import wandb

    api = wandb.Api(timeout=20)
    run = api.run(f"{job['entity'] or api.default_entity}/{job['project']}/{job['id']}")
    found = ORDERS & set(run.tags or ())
    if found:
        keep(found)
        run.tags = [tag for tag in run.tags if tag not in found]
        run.update()
    return set(found)


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
