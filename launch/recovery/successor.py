"""A new job for a run whose old one may not be requeued: one alone, and what waited for the old waits for it.

Sites that switch requeueing off refuse it also for a job that asked for it. The dying job then submits the script it
was started by once more, for its own element alone, and moves the jobs that depend on it while SLURM still counts it as
not ended: afterwards they would be cancelled. With `cluster.spare` the successor is submitted when the job starts, and
waits for it to fail: for sites that take a node away and leave no time for that.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
from collections.abc import Iterable
from pathlib import Path

from launch import cluster
from launch.files import read_json, write_json
from launch.record import RunFolder


def place_of(batch: Path, element: str) -> Path:
    """The batch folder of an element's successor; `batch` may be a successor's own."""
    return batch.with_name(f"{batch.name.partition('.after-')[0]}.after-{element}")


def take_over(folder: RunFolder, place: Path, element: str) -> None:
    """Note that the run goes on in the successor of `element`; once."""
    newest = folder.last("submitting") or {}
    if newest.get("batch") != str(place):
        code = Path((read_json(place / "plan.json") or {}).get("code", "")).name
        index = int(element.partition("_")[2])
        folder.note("submitting", batch=str(place), index=index, code=code, after=element)


def submit(batch: Path, element: str, *options: str) -> str:
    """Submit the element's successor and return its id; raises SlurmError. Asked again, it finds the first."""
    place = place_of(batch, element)
    token, index, file = place.name, element.partition("_")[2], place / "batch.json"
    if facts := read_json(file):
        job = str(facts.get("job", "")) or _found(token)
    else:
        plan = read_json(batch / "plan.json") or {"runs": {}}
        runs = {number: run for number, run in plan["runs"].items() if number == index}
        new = {number: run for number, run in plan.get("new", {}).items() if number == index}
        write_json(place / "plan.json", {**plan, "runs": runs, "new": new})
        write_json(file, {"state": "intent", "token": token})
        job = ""
    if not job:
        command = ["sbatch", "--parsable", f"--array={index}", f"--comment={token}", *options]
        try:
            said = cluster.call(*command, str(batch / "script.sbatch"), timeout=60, env=cluster.environment())
            job = said.strip().partition(";")[0]
        except cluster.SlurmError as error:
            if not (job := _found(token)):
                write_json(file, {"state": "refused", "token": token, "reason": str(error)})
                raise
    write_json(file, {"state": "submitted", "token": token, "job": job})
    return f"{job}_{index}"


def _found(token: str) -> str:
    """The array of this token, if SLURM has one."""
    try:
        return cluster.array_of(token, cluster.jobs())
    except cluster.SlurmError:
        return ""


def moved(dependency: str, waiting: str, old: str, new: str) -> str:
    """The element `waiting`'s dependency, as squeue shows it, with `new` in the place of `old`; empty if not in it."""
    array, _, index = old.partition("_")
    terms, found = re.split(r"([,?])", dependency), False
    for i in range(0, len(terms), 2):
        kind, _, rest = re.sub(r"\(\w+\)", "", terms[i]).partition(":")
        ids = rest.split(":")
        if kind == "aftercorr" and waiting.partition("_")[2] == index and f"{array}_*" in ids:
            kind, ids, found = "afterok", [new if id == f"{array}_*" else id for id in ids], True
        elif old in ids:
            ids, found = [new if id == old else id for id in ids], True
        terms[i] = ":".join([kind, *ids]) if rest else kind
    return "".join(terms).replace("_*", "") if found else ""


def dependents(old: str, new: str) -> Iterable[tuple[str, str]]:
    """The jobs of this user that wait for `old`, each with what it should wait for instead; raises SlurmError.

    A spare, which waits for its failure, is none of them.
    """
    user = pwd.getpwuid(os.getuid()).pw_name
    for line in cluster.call("squeue", "-h", "-r", "-t", "PENDING", "-u", user, "-o", "%i|%E").splitlines():
        waiting, _, dependency = line.partition("|")
        if (
            waiting != new
            and "afternotok" not in dependency
            and (wanted := moved(dependency, waiting, old, new))
        ):
            yield waiting, wanted


def move(old: str, new: str) -> list[str]:
    """Have what waits for `old` wait for `new`; what SLURM would not do, in words."""
    refused = []
    try:
        for waiting, wanted in list(dependents(old, new)):
            try:
                cluster.call("scontrol", "update", f"JobId={waiting}", f"Dependency={wanted}", timeout=20)
            except cluster.SlurmError as error:
                refused.append(f"{waiting}: {error}")
    except cluster.SlurmError as error:
        refused.append(str(error))
    return refused


def prepare(batch: Path, folder: RunFolder, element: str) -> None:
    """Take over, where this job was a spare, and submit the next; what waits for the element is content with either.

    What SLURM refuses of it is noted.
    """
    from launch.recovery.late import bereft

    attempt = f"{element}-0"
    try:
        token = cluster.show(element).get("Comment", "")
        if ".after-" in token:
            if cancelled(before := token.partition(".after-")[2]):
                folder.note("cancelled", by=by(before), job=before)
                cluster.call("scancel", element.partition("_")[0], timeout=30)
                return
            take_over(folder, batch.with_name(token), before)  # first: the run is found by it
            if not bereft(batch.parent.parent, folder, before):
                cluster.call("scancel", element.partition("_")[0], timeout=30)
                return
        job = submit(batch, element, f"--dependency=afternotok:{element}")
        for waiting, same in list(dependents(element, element)):
            if "," not in same and job not in same:  # SLURM has no mixture of "and" and "or"
                either = f"Dependency={same}?afterok:{job}"
                cluster.call("scontrol", "update", f"JobId={waiting}", either, timeout=20)
    except cluster.SlurmError as error:
        folder.note("refused", attempt=attempt, what="a spare job", reason=str(error))


def cancelled(element: str) -> bool:
    """Whether the job before was cancelled, and not lost: its spare, which waits for its failure, starts then, too."""
    try:
        return cluster.show(element).get("JobState", "").startswith("CANCELLED")
    except cluster.SlurmError:
        return False  # so long ago that SLURM forgot it


def by(element: str) -> str:
    """Who cancelled a job, where accounting knows it."""
    rows = cluster.past([element]).get(element, [])
    with contextlib.suppress(ValueError, KeyError):
        return pwd.getpwuid(int(rows[-1].by)).pw_name if rows else ""
    return ""


def drop(batch: Path, element: str) -> None:
    """Take a spare back: the run is over, and it would start when the job ends with an error."""
    facts = read_json(place_of(batch, element) / "batch.json") or {}
    if array := facts.get("job"):
        with contextlib.suppress(cluster.SlurmError):
            cluster.call("scancel", str(array), timeout=20)  # by the array: see launch.arrays.named
