"""Submit, die at the n-th thing done to the world, submit again; for every n.

With numbers, only every so manieth change while sending, and while the code is copied.
What changes the world, files opened to be written, renames, removals, locks and processes, is what Python's own audit
events tell; SIGKILL comes just before the n-th. Each trial is two forks of one process that has everything imported.
Prints a line of JSON a trial: where it died, and what was wrong after the second submission.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch import cli, snapshot, submission
from launch.batches import entry_of
from launch.cluster import Job
from launch.files import read_json
from launch.operating.status import state_of
from launch.record import find_runs, of_element
from tests.launch import chain

SPEC = "sweep: {train.optim.lr: [1e-5, 2e-5]}\n"
ELEMENTS = 4
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "fcntl.flock",
    "subprocess.Popen",
    "os.truncate",
}

# As chain.SBATCH, without a Python to start. `kills` in its folder has the number of the call that kills the submitter
# first, and hands the job over a little later.
SBATCH = """#!/bin/sh
here=${0%/*}; script=; for script; do :; done
while IFS= read -r line; do
  case $line in "#SBATCH --comment="*) comment=${line#*=};; "#SBATCH --array="*) array=${line#*=};; esac
done < "$script"
n=100; [ -e $here/count ] && read n < $here/count; echo $((n + 1)) > $here/count
kills=; [ -e $here/kills ] && read kills < $here/kills
[ "$kills" = $((n - 99)) ] && { kill -9 $PPID; sleep 0.2; }
array=${array%%%*}; i=${array%-*}
while [ $i -le ${array#*-} ]; do echo "${n}_$i|PENDING|Priority||$comment|" >> $here/queue; i=$((i + 1)); done
echo $n
"""
SQUEUE = """#!/bin/sh
[ -e ${0%/*}/queue ] && while IFS= read -r line; do echo "$line"; done < ${0%/*}/queue
exit 0
"""


def changes(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event is of something that changes the world."""
    if event == "open":
        return bool((arguments[2] or 0) & WRITES) and not str(arguments[0]).startswith("/dev/")
    return event in CHANGES


def run(act: Callable[[], int], die_at: int = 0) -> tuple[int, int, str]:
    """Do it in a fork that dies before change number `die_at`; (wait status, changes, the last one)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_RDWR)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if changes(event, arguments):
                count += 1
                os.write(writing, f"{event} {arguments[0]!s:.200}\n".encode())
                if count == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        os._exit(act())
    os.close(writing)
    with os.fdopen(reading) as pipe:
        seen = pipe.read().splitlines()
    return os.waitpid(child, 0)[1], len(seen), seen[-1] if seen else ""


def wrong(place: Path, slurm: Path) -> list[str]:
    """What is not as it should be: a run without an element or with two, an element that would find nothing to do.

    What the elements' jobs do first is done here: they make their folders.
    """
    found = []
    runs = place / "runs"
    batches = {}
    for path in runs.glob("batches/*/batch.json"):
        facts = read_json(path) or {}
        if facts.get("job"):
            batches[str(facts["job"])] = path.parent
    queue = [line.split("|")[0] for line in (slurm / "queue").read_text().splitlines()]
    listed = find_runs(runs)
    meant = []
    for id in queue:
        job, _, index = id.partition("_")
        if job not in batches:
            found.append("an element that no batch knows")
            continue
        folder = of_element(batches[job], index)
        meant.append(folder)
        state = state_of(folder, {id: Job(id, "PENDING", "Priority", "", "")})
        if (state.name, state.job) != ("queued", id):
            found.append(f"{folder.path} is {state}")
        folder.make(entry_of(str(batches[job]), index))
        first = folder.journal[:1]
        if not (read_json(folder.run_file) or {}).get("identity") or not read_json(folder.spec_file):
            found.append(f"{folder.path} is not whole")
        if [(r["event"], r["batch"], r["index"]) for r in first] != [
            ("submitting", str(batches[job]), int(index))
        ]:
            found.append(f"{folder.path} has begun with {first}")
    if len(queue) != ELEMENTS or len(set(meant)) != ELEMENTS or set(listed) != set(meant):
        found.append(f"{len(queue)} elements for {len(set(meant))} runs, of which {len(listed)} are listed")
    for batch in batches.values():
        code = Path((read_json(batch / "plan.json") or {}).get("code", ""))
        if snapshot.digest() != code.name or not (code / "launch" / "job.py").is_file():
            found.append(f"{code} is not the code")
    return found


def trials(root: Path, *, with_code: bool, every: int = 1) -> Iterator[dict[str, Any]]:
    """Every n-th change; `with_code`: the code is copied, else it is there already."""
    code = submission_code(root)
    at, kills = 1, 0
    while True:
        place = root / f"{'code' if with_code else 'sent'}_{at}_{kills}"
        slurm = place / "bin"
        slurm.mkdir(parents=True)
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
            (slurm / name).write_text(text)
            (slurm / name).chmod(0o755)
        if kills:
            (slurm / "kills").write_text(f"{kills}\n")
        file = chain.write(place, sweep3=SPEC)
        if not with_code:
            (place / "runs" / "code").mkdir(parents=True)
            (place / "runs" / "code" / code.name).symlink_to(code)
        os.environ["PATH"] = f"{slurm}:{os.environ['PATH'].partition(':')[2]}"
        status, _, where = run(lambda file=file: cli.main([str(file)]), 0 if kills else at)  # type: ignore[misc]
        died = os.WIFSIGNALED(status)
        if kills:
            (slurm / "kills").unlink()
            where = f"sbatch number {kills}"
        codes = [os.waitstatus_to_exitcode(run(lambda file=file: cli.main([str(file)]))[0]) for _ in (1, 2)]  # type: ignore[misc]
        found = wrong(place, slurm) + [f"submitting again ended with {c}" for c in codes if c]
        yield {"at": at, "where": where.replace(str(place), ""), "died": died, "wrong": found}
        if not found:
            shutil.rmtree(place)
        if not died and not kills:
            if with_code:
                return
            kills = 1  # all changes are through; now die within sbatch
        elif kills == 3:
            return
        elif kills:
            kills += 1
        else:
            at += every


def submission_code(root: Path) -> Path:
    """The snapshot that trials share."""
    return snapshot.take(root / "shared")


if __name__ == "__main__":
    assert submission.script.submitit  # imported here, once for all
    os.environ["PATH"] = f"/nonexistent:{os.environ['PATH']}"
    sending, copying = (*map(int, sys.argv[2:]), 1, 1)[:2]
    for words in ({"with_code": False, "every": sending}, {"with_code": True, "every": copying}):
        for trial in trials(Path(sys.argv[1]), **words):  # type: ignore[arg-type]
            print(json.dumps(trial), flush=True)
