"""The second door: what the runs are doing, their logs, and how to end them; by the run folders and one look at the queue."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from launch import cluster
from launch.record import RunFolder, find_runs
from launch.snapshot import REPOSITORY
from launch.status import OPEN, State, batch_of, children, state_of

OK, FAILED, USAGE, NO_SLURM = 0, 1, 2, 3


def parser() -> argparse.ArgumentParser:
    """The command line of launch/runs.py."""
    one = argparse.ArgumentParser(prog="python launch/runs.py", description="Look at runs and end them.")
    one.add_argument("--runs", type=Path, default=REPOSITORY / "runs", help="the folder of run folders")
    verbs = one.add_subparsers(dest="verb", required=True, metavar="list|status|logs|cancel|wait")
    help_ = "a run's name, or a part of it that only it has; or its SLURM id, 4242_3"

    def verb(name: str, text: str, runs: str) -> argparse.ArgumentParser:
        found = verbs.add_parser(name, help=text, description=text)
        found.add_argument("run", nargs=runs, help=help_)
        return found

    found = verb("list", "name the runs, one a line", "*")
    found.add_argument("--json", action="store_true")
    found = verb("status", "the state of each run: step, loss, attempts, where and why", "*")
    found.add_argument("--json", action="store_true")
    found.add_argument("--watch", action="store_true", help="again every 10 s")
    found.add_argument("--exit-code", action="store_true", help="exit with 1 unless all are done")
    found = verb("logs", "a run's log: the failed rank's, else rank 0's", "?")
    found.add_argument("-f", "--follow", action="store_true")
    found.add_argument(
        "--attempt", default="", help="an attempt's name or number from 0; default: the newest"
    )
    found.add_argument("--rank", type=int, default=None)
    found = verb("cancel", "end runs for good: they save if they can, and are not requeued", "+")
    found.add_argument("-y", "--yes", action="store_true", help="do not ask")
    found = verb("wait", "wait until the runs are done; exit code 1 when one cannot be", "*")
    return one


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = parser().parse_args(arguments)
    try:
        found = find_runs(options.runs)
        chosen = choose(found, options.runs, options.run or [] if options.verb != "logs" else [options.run])
    except LookupError as error:
        print(f"error: {error.args[0]}", file=sys.stderr)
        return USAGE
    try:
        if options.verb == "list":
            names = [name(folder, options.runs) for folder in chosen]
            print(json.dumps(names) if options.json else "\n".join(names))
            return OK
        if options.verb == "status":
            return status(chosen, options)
        if options.verb == "logs":
            return logs(chosen, options)
        if options.verb == "wait":
            return wait(chosen)
        return cancel(chosen, options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # `| head` closed it; Python would complain at its exit
        return OK


def name(folder: RunFolder, root: Path) -> str:
    """A run's name: its folder below the folder of runs."""
    return folder.path.relative_to(root).as_posix()


def choose(found: Sequence[RunFolder], root: Path, wanted: Sequence[str | None]) -> list[RunFolder]:
    """The runs that are meant; LookupError in words where a word means none or, for a single run, several."""
    if not [word for word in wanted if word]:
        return list(found)
    chosen: dict[Path, RunFolder] = {}
    for word in wanted:
        assert word is not None
        exact = [
            f for f in found if word in (name(f, root), name(f, root).removesuffix("/run"), f.run.get("id"))
        ]
        parts = exact or [f for f in found if word in name(f, root)]
        if not parts and word.replace("_", "").isdigit():
            for folder in found:
                batch = batch_of(folder)
                if batch and word in (batch[0].get("job"), f"{batch[0].get('job')}_{batch[1]}"):
                    parts.append(folder)
        if not parts:
            raise LookupError(f"{word}: no such run in {root}; see `runs.py list`")
        chosen |= {folder.path: folder for folder in parts}
    return list(chosen.values())


def look() -> tuple[Mapping[str, cluster.Job] | None, str]:
    """The queue, or None and why SLURM was not asked."""
    try:
        return cluster.jobs(), ""
    except cluster.SlurmError as error:
        return None, str(error)


def states(chosen: Sequence[RunFolder]) -> tuple[dict[Path, State], str]:
    """Each run's state, with at most one call to SLURM."""
    needed = any((batch := batch_of(folder)) and "job" in batch[0] for folder in chosen)
    queue, why = look() if needed else (None, "")
    return {folder.path: state_of(folder, queue) for folder in chosen}, why


def status(chosen: Sequence[RunFolder], options: argparse.Namespace) -> int:
    """Print the table, once or again and again."""
    while True:
        found, why = states(chosen)
        if options.json:
            rows = [
                {"run": name(f, options.runs), "id": f.run.get("id"), **asdict(found[f.path])} for f in chosen
            ]
            print(json.dumps(rows, indent=1))
        else:
            if options.watch and sys.stdout.isatty():
                print("\x1b[H\x1b[2J", end="")
            print(render(chosen, found, options.runs))
            if why:
                print(f"warning: {why}", file=sys.stderr)
        if not options.watch or all(state.name not in OPEN for state in found.values()):
            break
        time.sleep(10)
    if options.exit_code and any(state.name != "done" for state in found.values()):
        return FAILED
    return OK


def render(chosen: Sequence[RunFolder], found: Mapping[Path, State], root: Path) -> str:
    """The status table."""
    if not chosen:
        return f"no runs in {root}"
    rows = [("run", "stage", "state", "step", "loss", "attempts", "job", "")]
    for folder in chosen:
        state = found[folder.path]
        rows.append(
            (
                name(folder, root).removesuffix("/run"),
                str(folder.run.get("stage", "")),
                state.name,
                f"{state.step}/{state.steps}" if state.steps else "-",
                f"{state.loss:.3f}" if state.loss is not None else "-",
                str(state.attempts),
                state.job or "-",
                state.reason if state.name != "done" else "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def logs(chosen: Sequence[RunFolder], options: argparse.Namespace) -> int:
    """Print a log, and follow it when asked."""
    if len(chosen) != 1:
        names = ", ".join(name(folder, options.runs) for folder in chosen[:8])
        return _complain(f"logs shows one run, and {len(chosen)} are meant: {names}")
    folder = chosen[0]
    attempts = [entry["attempt"] for entry in folder.journal if entry["event"] == "start"]
    attempts += sorted(p.name for p in folder.path.glob("logs/*") if p.name not in attempts)
    if options.attempt.isdigit() and int(options.attempt) < len(attempts):
        attempt = attempts[int(options.attempt)]
    elif options.attempt and options.attempt not in attempts:
        return _complain(f"{options.attempt}: no such attempt; there are {', '.join(attempts) or 'none'}")
    else:
        attempt = options.attempt or (attempts[-1] if attempts else "")
    batch = batch_of(folder)
    outer = sorted(Path(batch[0]["folder"]).glob(f"slurm/*_{batch[1]}_*")) if batch else []
    if not attempt:
        if not outer:
            return _complain(f"{name(folder, options.runs)} has not started; there is no log yet")
        path = outer[-1]  # srun's own words, where no rank got as far as a log of its own
    else:
        failed = sorted(folder.logs(attempt).glob("failure_*.json"), key=lambda p: p.stat().st_mtime)
        rank = options.rank if options.rank is not None else int(failed[0].stem[8:]) if failed else 0
        path = folder.log_of(attempt, rank)
    if not path.is_file():
        return _complain(f"{path}: no such log")
    print(f"== {path}", file=sys.stderr)
    with open(path, encoding="utf-8", errors="replace") as file:
        while True:
            if text := file.read():
                print(text, end="", flush=True)
            elif not options.follow:
                return OK
            else:
                time.sleep(0.5)


def cancel(chosen: Sequence[RunFolder], options: argparse.Namespace) -> int:
    """End the runs that are open."""
    found, why = states(chosen)
    if why:
        print(f"error: {why}; nothing was cancelled", file=sys.stderr)
        return NO_SLURM
    open_ = [folder for folder in chosen if found[folder.path].name in OPEN]
    if not open_:
        print("nothing to cancel: none of these runs is running or queued")
        return OK
    for folder in open_:
        print(f"{name(folder, options.runs)}  {found[folder.path].name}  {found[folder.path].job}")
    if len(open_) > 1 and not options.yes:
        if not sys.stdin.isatty():
            return _complain(f"{len(open_)} runs would be cancelled; say -y")
        if input(f"cancel these {len(open_)} runs? [y/N] ").strip().lower() != "y":
            return OK
    elements = []
    for folder in open_:
        batch = batch_of(folder)
        assert batch is not None
        folder.note("cancelled", by=os.environ.get("USER", ""))
        if "pid" in batch[0]:
            for rank in children(int(found[folder.path].job)):
                os.kill(rank, signal.SIGTERM)
        else:
            elements.append(found[folder.path].job)
    if elements:
        try:
            cluster.call("scancel", *elements)
        except cluster.SlurmError as error:
            print(f"error: SLURM: {error}", file=sys.stderr)
            return NO_SLURM
    print(f"cancelled {len(open_)} run(s)")
    return OK


def wait(chosen: Sequence[RunFolder]) -> int:
    """Wait until no run is open."""
    while True:
        found, why = states(chosen)
        if why:
            print(f"warning: {why}", file=sys.stderr)
        elif all(state.name not in OPEN for state in found.values()):
            return OK if all(state.name == "done" for state in found.values()) else FAILED
        time.sleep(5)


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return USAGE
