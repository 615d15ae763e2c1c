"""Bring to W&B what the compute nodes could not: runs.py sync, on a machine that has a network.

`wandb sync` ends with 0 and its mark of success when the server has refused the rows, and marks a run that
is still writing as done. So only closed files are sent, one at a time and in order; the server is then asked
what it has; what is missing is sent from metrics.jsonl; and what was done is kept in a ledger of our own.
Each run is handled by a process of its own (python -m launch.online.sync FOLDER), the only one that imports wandb.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from launch.files import read_json, read_lines, write_json
from launch.metrics import rows
from launch.online import segments
from launch.online.reach import Lock, account, reachable

COMMAND = (sys.executable, "-m", "launch.online.sync")
SEND_SECONDS = 1800  # for one file; wandb itself would try for hours
RUN_SECONDS = 4 * SEND_SECONDS
STALE_SECONDS = 120.0  # without a sign of life, an attempt or a syncer is dead


def sync_all(
    folders: Iterable[Path],
    *,
    running: Callable[[Path], bool] | None = None,
    live: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Bring W&B up to date with these run folders; one report a run that had something to send.

    A report has `run`, `notes` (what was done, in words), `step` (the last one on the server), and the flags
    `failed`, `waiting` (for another run's artifact) and `unreachable` (no server, no login: the rest waits).

    `running` says whether an attempt of the run may still be writing (SLURM knows); without it, the tracker's
    sign of life decides. `live` sends the rows of runs that are being trained offline, too: wandb's own files
    of these are then not sent any more (system metrics stay behind).
    """
    reports: dict[Path, dict[str, Any]] = {}
    # Older runs first: a stage's parent is older, and its artifact must be there before it can be named.
    todo = sorted((folder for folder in folders if pending(folder, live)), key=_begun)
    while todo:
        again = []
        for folder in todo:
            still = running(folder) if running else sign_of_life(folder)
            report = reports[folder] = _in_own_process(folder, still, live)
            say(f"{folder}: {'; '.join(report['notes']) or 'nothing to send'}")
            if report["unreachable"]:
                return list(reports.values())
            if report["waiting"]:
                again.append(folder)
        todo = again if len(again) < len(todo) else []
    return list(reports.values())


def pending(folder: Path, live: bool = False) -> bool:
    """Whether there may be something to send; read from the folder alone."""
    state = latest(folder, "mirror")
    if latest(folder, "attempt") is None:
        return False
    ledger = read_json(folder / "wandb" / "ledger.json") or {}
    if live or state is None or not state.get("delivered"):
        return ledger.get("complete") != _mark(folder)
    return any(item["key"] not in delivered(folder) for item in wanted(folder))


def wanted(folder: Path) -> list[dict[str, Any]]:
    """Tables, handoffs and the handoffs used, which W&B is to hold beside the rows."""
    return [item for item in read_lines(folder / "wandb" / "wanted.jsonl") if item["kind"] != "summary"]


def delivered(folder: Path) -> set[str]:
    """The keys of what W&B holds already."""
    files = [*(folder / "wandb").glob("mirror_*.json"), folder / "wandb" / "ledger.json"]
    return {key for path in files for key in (read_json(path) or {}).get("held", [])}


def latest(folder: Path, kind: str) -> dict[str, Any] | None:
    """The newest attempt's `attempt_K.json` or `mirror_K.json`."""
    found = [(int(path.stem.rpartition("_")[2]), path) for path in (folder / "wandb").glob(f"{kind}_*.json")]
    return read_json(max(found)[1]) if found else None


def sign_of_life(folder: Path) -> bool:
    """Whether an attempt's mirror has lately said that it is at work."""
    attempt, state = latest(folder, "attempt"), latest(folder, "mirror")
    if attempt is None or (state and state["closed"] and state["attempt"] == attempt["attempt"]):
        return False
    newest = max(path.stat().st_mtime for path in (folder / "wandb").glob("*_*.json"))
    return time.time() - newest < STALE_SECONDS


def _begun(folder: Path) -> float:
    return min(path.stat().st_mtime for path in (folder / "wandb").glob("attempt_*.json"))


def _mark(folder: Path) -> list[object]:
    """What changes when there is something new to send."""
    offline = [path for path in segments.find(folder) if path.parent.name.startswith("offline")]
    files = [folder / "metrics.jsonl", folder / "wandb" / "wanted.jsonl", *offline]
    attempt = latest(folder, "attempt") or {}
    return [attempt.get("attempt"), sum(path.stat().st_size for path in files if path.exists())]


def _in_own_process(folder: Path, running: bool, live: bool) -> dict[str, Any]:
    from launch.tracking import environment

    command = [*COMMAND, str(folder.absolute())]
    command += ["--running"] * running + ["--live"] * live
    root = Path(__file__).resolve().parents[2]
    log = folder / "wandb" / "sync.log"
    with log.open("ab") as errors:
        try:
            done = subprocess.run(
                command,
                cwd=root,
                env=environment(folder.absolute()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                timeout=RUN_SECONDS,
            )
            report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return report
        except (subprocess.TimeoutExpired, ValueError, IndexError):
            return _report(folder) | {"notes": [f"the syncer's process failed; see {log}"], "failed": True}


def _report(folder: Path) -> dict[str, Any]:
    return {
        "run": str(folder),
        "notes": [],
        "waiting": False,
        "failed": False,
        "unreachable": False,
        "step": -1,
    }


class Sync:
    """One run on its way to the server. Imports wandb: runs in a process of its own."""

    def __init__(self, folder: Path, *, running: bool, live: bool) -> None:
        from launch.online import session as client

        self.client, self.folder, self.running, self.live = client, folder, running, live
        attempt = latest(folder, "attempt")
        assert attempt is not None
        self.job: dict[str, Any] = attempt
        state = latest(folder, "mirror") or {}
        self.state = state if state.get("attempt") == attempt["attempt"] else {}
        self.ledger: dict[str, Any] = {"segments": {}, "held": []}
        self.ledger |= read_json(folder / "wandb" / "ledger.json") or {}
        self.report = _report(folder)
        self.server = client.OnServer()
        self.session: Any = None

    def run(self) -> dict[str, Any]:
        mark = _mark(self.folder)
        if self.running and self.state.get("mode") == "online":
            self.note("is online by itself")
            return self.report
        url = self.client.base_url()
        if not account(url):
            self.fail(f"no login for {url} here: run `wandb login`, or set WANDB_API_KEY")
            return self.report
        if not reachable(url):
            self.fail(f"{url} does not answer: try again later")
            return self.report
        self.server = self.client.ask(self.job)
        self.job = self.job | {"entity": self.server.entity}
        try:
            for path in segments.find(self.folder):
                if not self.segment(path):
                    break
            if self.live or not self.running:
                self.fill()
            self.hold()
            self.end()
        finally:
            self.client.close()
            self.verify()
            if not (self.report["failed"] or self.report["waiting"] or self.running):
                self.ledger["complete"] = mark
            self.save()
        return self.report

    def segment(self, path: Path) -> bool:
        """Deal with one of wandb's own files; False when it is still being written."""
        name = path.parent.name
        done = self.ledger["segments"].get(name)
        if done or not name.startswith("offline"):
            return True
        found = segments.scan(path)
        newest = path == segments.find(self.folder)[-1]
        if self.running and newest and not found.closed:
            return False
        if found.empty:
            outcome = "empty"
            self.note(f"{name} is empty: killed before its first rows were written")
        elif found.rows and found.first <= self.server.step:
            outcome = "superseded"  # the server has these rows from a later session or a live view
        else:
            if found.rows:
                self.fill(before=found.first)
            outcome = self.send(found)
        self.ledger["segments"][name] = outcome
        self.save()
        return True

    def send(self, found: segments.Segment) -> str:
        """Run `wandb sync` on one file and believe only the server."""
        self.leave()
        command = [sys.executable, "-m", "wandb", "sync", "--entity", self.server.entity]
        command += ["--project", self.job["project"], str(found.path.parent)]
        try:
            done = subprocess.run(
                command, cwd=self.folder, capture_output=True, text=True, timeout=SEND_SECONDS
            )
            said = done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            said = f"ERROR no end after {SEND_SECONDS} s"
        print(said, file=sys.stderr)
        self.server = self.client.ask(self.job, found.last)
        complaints = re.findall(r"(?m)^.*(?:ERROR|[Ff]atal).*$", said)
        for line in complaints:
            self.note(re.sub(r"^wandb:\s*", "", line.strip()))
        if found.rows and self.server.step < found.last:
            self.note(f"{found.path.parent.name}: the server has step {self.server.step} of {found.last}")
            return "refused"
        self.note(f"sent {found.path.parent.name} up to step {found.last}")
        return "sent"

    def fill(self, before: int | None = None) -> None:
        """Send the rows of metrics.jsonl that the server lacks, up to the one before `before`."""
        missing = list(rows(self.folder / "metrics.jsonl", self.server.step))
        if before is not None:
            missing = [row for row in missing if row["step"] < before]
        if not missing:
            return
        session = self.open()
        missing = [row for row in missing if row["step"] > session.step]
        for row in missing:
            session.log(row)
        if missing:
            self.note(f"sent steps {missing[0]['step']} to {missing[-1]['step']} from metrics.jsonl")
        if before is not None:
            self.leave()

    def hold(self) -> None:
        """Complete what the run logged and used: tables, handoffs, lineage."""
        done = delivered(self.folder)
        for item in wanted(self.folder):
            if item["key"] in done:
                continue
            try:
                self.open().hold(item)
                self.ledger["held"].append(item["key"])
                self.note(f"{item['kind']} {item['name']}")
            except Exception as error:
                self.note(f"{item['kind']} {item['name']} waits: {type(error).__name__}: {str(error)[:200]}")
                self.report["waiting"] = True

    def end(self) -> None:
        """Give the run the state it ended in."""
        outcome = self.state.get("outcome", "")
        if not self.running and outcome in ("finished", "preempted") and self.server.state != outcome:
            self.open()
        self.leave()

    def open(self) -> Any:
        if self.session is None:
            self.session = self.client.Session(self.job, self.folder, online=True, final=not self.running)
            for item in read_lines(self.folder / "wandb" / "wanted.jsonl"):
                if item["kind"] == "summary":
                    self.session.hold(item)
        return self.session

    def leave(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            session.finish(self.state.get("outcome") or "failed")
            self.client.close()
            self.server = self.client.ask(self.job, session.step)

    def verify(self) -> None:
        """Compare with metrics.jsonl what the server says it has."""
        self.report["step"] = self.server.step
        ours = [row["step"] for row in rows(self.folder / "metrics.jsonl")]
        if (self.live or not self.running) and ours and self.server.step < ours[-1]:
            self.note(f"the server has step {self.server.step} of {ours[-1]}")
            self.report["failed"] = True
        elif self.server.rows < sum(step <= self.server.step for step in ours):
            self.note(
                f"the server has {self.server.rows} rows up to step {self.server.step}: some are missing"
            )
            self.report["failed"] = True

    def fail(self, text: str) -> None:
        self.note(text)
        self.report |= {"failed": True, "unreachable": True}

    def note(self, text: str) -> None:
        self.report["notes"].append(text)

    def save(self) -> None:
        write_json(self.folder / "wandb" / "ledger.json", self.ledger)


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0])
    report = _report(folder)
    try:
        with Lock(folder):
            work = Sync(folder, running="--running" in arguments, live="--live" in arguments)
            report = work.report
            work.run()
    except FileExistsError:
        report["notes"].append("another syncer is at this run")
    except Exception as error:
        report["notes"].append(f"{type(error).__name__}: {error}")
        report["failed"] = True
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
