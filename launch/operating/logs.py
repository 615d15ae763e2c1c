"""logs: what an attempt's ranks said; the rank that failed first, for its traceback is the one that
explains.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.exits import OK, USAGE
from launch.files import read_json
from launch.operating.address import name
from launch.operating.status import batch_of
from launch.record import RunFolder


class NoLog(LookupError):
    """There is no such log; the text says why."""


def logs(chosen: Sequence[RunFolder], options: argparse.Namespace) -> int:
    """Print a log, and follow it when asked."""
    if len(chosen) != 1:
        names = ", ".join(name(folder, options.runs) for folder in chosen[:8])
        meant = f"{len(chosen)} are meant: {names}" if chosen else f"there are none in {options.runs}"
        return complain(f"logs shows one run, and {meant}")
    try:
        path = find(chosen[0], name(chosen[0], options.runs), options.attempt, options.rank)
        wanted = re.compile(options.grep or "")
    except NoLog as error:
        return complain(error.args[0])
    except re.error as error:
        return complain(f"--grep {options.grep}: {error}")
    if options.json:
        print(json.dumps({"run": name(chosen[0], options.runs), "log": str(path)}))
        return OK
    print(f"== {path}", file=sys.stderr)
    with open(path, encoding="utf-8", errors="replace") as file:
        while True:
            if lines := file.readlines():
                print("".join(line for line in lines if wanted.search(line)), end="", flush=True)
            elif not options.follow:
                return OK
            else:
                time.sleep(0.5)


def find(folder: RunFolder, title: str, attempt: str = "", rank: int | None = None) -> Path:
    """The log of an attempt (its name, or its number from 0; else the newest) and a rank; raises NoLog."""
    attempts = list(
        dict.fromkeys(e["attempt"] for e in folder.journal if e["event"] in ("launched", "start"))
    )
    attempts += sorted(p.name for p in folder.path.glob("logs/*") if p.name not in attempts)
    if attempt.isdigit() and int(attempt) < len(attempts):
        attempt = attempts[int(attempt)]
    elif attempt and attempt not in attempts:
        raise NoLog(f"{attempt}: no such attempt; there are {', '.join(attempts) or 'none'}")
    attempt = attempt or (attempts[-1] if attempts else "")
    if not attempt:
        # srun's own words, where no rank got as far as a log of its own
        batch = batch_of(folder)
        outer = sorted(Path(batch[0]["folder"]).glob(f"slurm/*_{batch[1]}_*")) if batch else []
        if not outer:
            raise NoLog(f"{title} has not started; there is no log yet")
        return outer[-1]
    if rank is None:
        rank = first_failed(folder, attempt) or 0
    path = folder.log_of(attempt, rank)
    if not path.is_file():
        raise NoLog(f"{path}: no such log")
    return path


def first_failed(folder: RunFolder, attempt: str) -> int | None:
    """The rank that failed first; those that failed after it waited for it in vain."""
    failures = {
        int(path.stem.removeprefix("failure_")): (read_json(path) or {}).get("time", 1e12)
        for path in folder.logs(attempt).glob("failure_*.json")
    }
    return min(failures, key=lambda rank: failures[rank]) if failures else None


def complain(message: str) -> int:
    """Say what is wrong with the command; returns its exit code."""
    print(f"error: {message}", file=sys.stderr)
    return USAGE
