"""Scripted histories, each with the explanation that a person who knew all of it would give."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launch import cluster
from launch.files import append_line, write_json
from launch.operating import explain
from launch.operating.status import state_of
from launch.record import RunFolder

NOW = 1_700_000_000.0
MINUTE, HOUR = 60.0, 3600.0
E = "4242_3"  # the element


@dataclass
class History:
    """What was written and seen of one run; times of records are minutes before now."""

    name: str
    cause: str
    words: tuple[str, ...]  # all of them stand in the sentence
    journal: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)
    job: tuple[str, str, str] | None = None  # SLURM's state, reason, nodes
    start_in: float = 0.0  # minutes, as SLURM expects
    past: list[tuple[str, float, str, str]] = field(
        default_factory=list
    )  # state, ended minutes ago, by, nodes
    told: tuple[str, ...] = ()  # all of them stand in the events
    todo: str = ""
    parent: list[tuple[float, str, dict[str, Any]]] | None = None  # its journal
    parent_job: tuple[str, str, str] | None = None
    row: dict[str, Any] = field(default_factory=dict)
    failure: dict[str, Any] | None = None
    batch: dict[str, Any] = field(default_factory=lambda: {"state": "submitted", "job": "4242", "token": "t"})
    done: bool = False
    no_slurm: bool = False


def asked(ago: float) -> tuple[float, str, dict[str, Any]]:
    return ago, "submitting", {"batch": "BATCH", "index": 3}


def start(ago: float, restart: int = 0, step: int = 0, **more: Any) -> tuple[float, str, dict[str, Any]]:
    facts = {
        "attempt": f"{E}-{restart}",
        "node": "n1",
        "number": restart,
        "step": step,
        "steps": 5000,
        "world": 8,
    }
    return ago, "start", {**facts, **more}


def launched(ago: float, restart: int = 0) -> tuple[float, str, dict[str, Any]]:
    return ago, "launched", {"attempt": f"{E}-{restart}", "node": "n1"}


def saved(ago: float, step: int, restart: int = 0) -> tuple[float, str, dict[str, Any]]:
    return ago, "saved", {"attempt": f"{E}-{restart}", "step": step}


def verdict(
    ago: float, kind: str, reason: str = "", restart: int = 0, again: bool = False, **more: Any
) -> tuple[float, str, dict[str, Any]]:
    return (
        ago,
        "verdict",
        {"attempt": f"{E}-{restart}", "verdict": kind, "reason": reason, "again": again, **more},
    )


RUNNING = ("RUNNING", "None", "n[1-4]")
FAILED_ABOVE = [asked(300), start(290), verdict(200, "error", "ValueError: no")]
BEFORE = [asked(500), start(490), saved(400, 800)]

HISTORIES = [
    History("never submitted", "new", ("never submitted",), todo="submit.py"),
    History(
        "done", "done", ("finished at step 5000",), [asked(90), start(80), verdict(5, "finished")], done=True
    ),
    History(
        "priority", "priority", ("a higher priority go first",), [asked(20)], ("PENDING", "Priority", "")
    ),
    History(
        "resources, and when",
        "resources",
        ("nodes it needs are not free yet", "expects to start it in 2h00m"),
        [asked(20)],
        ("PENDING", "Resources", ""),
        start_in=120,
    ),
    History(
        "not looked at yet", "new in queue", ("has not looked at it",), [asked(0.1)], ("PENDING", "None", "")
    ),
    History(
        "the stage above runs",
        "dependency",
        ("starts when s2 (running, step 700/2000) has finished",),
        [asked(60)],
        ("PENDING", "Dependency", ""),
        parent=[asked(60), start(50, steps=2000)],
        parent_job=RUNNING,
        row={"step": 700},
    ),
    History(
        "the stage above failed, and SLURM keeps waiting",
        "blocked",
        ("waits for s2 (failed: error: ValueError: no)", "will never start"),
        [asked(300)],
        ("PENDING", "DependencyNeverSatisfied", ""),
        parent=FAILED_ABOVE,
        todo="resubmit",
    ),
    History(
        "the stage above failed, and SLURM cancelled this",
        "parent",
        ("SLURM cancelled it because s2 failed",),
        [asked(300)],
        parent=FAILED_ABOVE,
        todo="resubmit takes the run above",
    ),
    History(
        "the stage above was cancelled, and SLURM cancelled this",
        "parent",
        ("SLURM cancelled it because s2 was cancelled",),
        [asked(300)],
        ("CANCELLED", "DependencyNeverSatisfied", ""),
        parent=[
            asked(300),
            start(290),
            (250.0, "cancelled", {"by": "ada"}),
            verdict(249, "cancelled", "scancel"),
        ],
    ),
    History(
        "requeued after a preemption, in SLURM's delay",
        "begin time",
        ("only after a delay", "the last one was preempted by a job of higher priority"),
        [*BEFORE, verdict(2, "preempted", "SIGTERM", again=True)],
        ("PENDING", "BeginTime", ""),
        past=[("PREEMPTED", 2, "", "n1")],
        told=("was preempted by a job of higher priority; step 800 is saved; requeued",),
    ),
    History(
        "held back after an infrastructure failure",
        "begin time",
        ("only after a delay", "avoiding n7 for now", "waits 5m00s", "because of infrastructure"),
        [*BEFORE, verdict(2, "infrastructure", "NCCL timeout", again=True, excluded=["n7"], delay=300)],
        ("PENDING", "BeginTime", ""),
        told=("was lost to its nodes or the network: NCCL timeout",),
    ),
    History(
        "held by the user",
        "held",
        ("held by its user",),
        [asked(9)],
        ("PENDING", "JobHeldUser", ""),
        todo="requeue",
    ),
    History(
        "held by an administrator",
        "held by admin",
        ("administrator holds it",),
        [asked(9)],
        ("PENDING", "JobHeldAdmin", ""),
        todo="ask the administrators",
    ),
    History(
        "launches failed",
        "launch failed",
        ("could not launch it",),
        [asked(9)],
        ("PENDING", "launch failed requeued held", ""),
        todo="requeue",
    ),
    History(
        "requeued and held by the site's RequeueExitHold",
        "held",
        ("requeued and is held",),
        [*BEFORE, verdict(2, "error", "ValueError: x", again=True)],
        ("REQUEUE_HOLD", "RequeueHold", ""),
    ),
    History(
        "the array's throttle",
        "throttle",
        ("the array's own limit",),
        [asked(9)],
        ("PENDING", "JobArrayTaskLimit", ""),
        todo="throttle",
    ),
    History(
        "an account's limit",
        "limit reached",
        ("AssocGrpGRES", "starts when other jobs end"),
        [asked(9)],
        ("PENDING", "AssocGrpGRES", ""),
    ),
    History(
        "a user's limit of the QOS",
        "limit reached",
        ("QOSMaxJobsPerUserLimit", "when other jobs end"),
        [asked(9)],
        ("PENDING", "QOSMaxJobsPerUserLimit", ""),
    ),
    History(
        "more than the QOS allows one job",
        "over a limit",
        ("QOSMaxNodePerJobLimit", "never start"),
        [asked(9)],
        ("PENDING", "QOSMaxNodePerJobLimit", ""),
    ),
    History(
        "a walltime over the partition's",
        "over partition limit",
        ("walltime is longer", "never start"),
        [asked(9)],
        ("PENDING", "PartitionTimeLimit", ""),
        todo="cluster.walltime",
    ),
    History(
        "maintenance",
        "maintenance",
        ("reserved for maintenance",),
        [asked(9)],
        ("PENDING", "ReqNodeNotAvail, Reserved for maintenance", ""),
        todo="shorter cluster.walltime",
    ),
    History(
        "nodes down",
        "nodes unavailable",
        ("down, drained or reserved", "UnavailableNodes:n7"),
        [asked(9)],
        ("PENDING", "ReqNodeNotAvail, UnavailableNodes:n7", ""),
    ),
    History(
        "an account that the partition refuses",
        "refused",
        ("InvalidAccount",),
        [asked(9)],
        ("PENDING", "InvalidAccount", ""),
    ),
    History(
        "a reason of a later SLURM",
        "other",
        ("SLURM says PhaseOfTheMoon",),
        [asked(9)],
        ("PENDING", "PhaseOfTheMoon", ""),
    ),
    History(
        "running",
        "running",
        ("Attempt 1 has been running for 1h30m",),
        [asked(100), launched(95), start(90)],
        RUNNING,
        row={"step": 100, "time": NOW - 5, "step_seconds": 5.0},
        told=("attempt 1 began on n1 from step 0, after 5m00s in the queue",),
    ),
    History(
        "running again after a walltime",
        "running",
        ("Attempt 2 has been running for 10m00s", "came near its walltime and left after a save"),
        [
            *(
                asked(1500),
                launched(1495),
                start(1490),
                saved(56, 900),
                verdict(55, "preempted", "SIGUSR2", again=True),
            ),
            *(launched(12, 1), start(10, 1, 900, last=900)),
        ],
        RUNNING,
        row={"step": 950, "time": NOW - 5, "step_seconds": 5.0},
        told=("attempt 2 began on n1 from step 900",),
    ),
    History(
        "running again after its node died, with steps to do again",
        "running",
        ("ended with its node (n3), which failed",),
        [
            *(*BEFORE, verdict(60, "preempted", "requeued by SLURM before a save", again=True)),
            *(launched(31, 1), start(30, 1, 800, last=812)),
        ],
        RUNNING,
        past=[("NODE_FAIL", 60, "", "n3")],
        row={"step": 900, "time": NOW - 5, "step_seconds": 5.0},
        told=(
            "attempt 2 began on n1 from step 800, after 29m00s in the queue; 12 step(s) are computed again",
        ),
    ),
    History(
        "taken off its nodes, without accounting",
        "running",
        ("was taken off its nodes by SLURM before it could save",),
        [*BEFORE, verdict(60, "preempted", "requeued by SLURM before a save", again=True), start(30, 1, 800)],
        RUNNING,
        row={"step": 900, "time": NOW - 5, "step_seconds": 5.0},
    ),
    History(
        "requeued on request",
        "running",
        ("was requeued on request of ada",),
        [
            *(*BEFORE, (62.0, "requeued", {"by": "ada"}), verdict(60, "preempted", "SIGUSR2", again=True)),
            start(30, 1, 800),
        ],
        RUNNING,
        row={"step": 900, "time": NOW - 5, "step_seconds": 5.0},
        told=("ada asked to requeue it",),
    ),
    History("starting", "starting", ("its ranks have not spoken",), [asked(9)], RUNNING),
    History("loading", "loading", ("loading for 4m00s",), [asked(9), launched(4)], RUNNING),
    History(
        "silent",
        "silent",
        ("has not taken a step for 50m00s", "one takes 5.0 s", "may hang"),
        [asked(100), start(90)],
        RUNNING,
        row={"step": 100, "time": NOW - 50 * MINUTE, "step_seconds": 5.0},
        todo="requeue --now",
    ),
    History(
        "being cancelled",
        "being cancelled",
        ("being cancelled",),
        [asked(100), start(90), (0.2, "cancelled", {"by": "ada"})],
        RUNNING,
        told=("ada asked to cancel it",),
    ),
    History(
        "a bug, twice",
        "error",
        ("ValueError: expert 9 of 8", "moe/router.py:88 forward", "2 attempts ended so", "not tried again"),
        [
            *(asked(90), start(80), verdict(70, "error", "ValueError: expert 9 of 8", again=True)),
            *(start(60, 1), verdict(50, "error", "ValueError: expert 9 of 8", 1)),
        ],
        failure={"where": ["a.py:1 main", "moe/router.py:88 forward"], "rank": 2, "time": 1.0},
        told=("attempt 1 failed with an error: ValueError: expert 9 of 8; requeued", "attempt 2 failed"),
        todo="rank_2.log",
    ),
    History(
        "a bad spec",
        "bad spec",
        ("cannot run as it was asked to", "some.json is not there"),
        [asked(90), launched(80), verdict(79, "bad spec", "some.json is not there")],
        todo="correct the spec",
    ),
    History(
        "infrastructure, over its budget",
        "infrastructure",
        ("lost to its nodes", "6 attempts ended so"),
        [
            asked(999),
            *(verdict(900 - i, "infrastructure", "a node or a rank was lost", i, i < 5) for i in range(6)),
        ],
    ),
    History(
        "a hang",
        "hang",
        ("hung", "rank 23 was silent"),
        [asked(90), start(80), verdict(20, "hang", "rank 23 was silent for 420 s")],
        todo="stacks of all ranks",
    ),
    History(
        "out of memory on the GPU",
        "out of memory",
        ("ran out of memory", "CUDA"),
        [asked(90), start(80), verdict(79, "out of memory", "CUDA out of memory on rank 3 at step 1")],
        todo="train.micro_batch",
    ),
    History(
        "divergence",
        "divergence",
        ("diverged",),
        [asked(90), start(80), verdict(9, "divergence", "loss is nan")],
        todo="lr",
    ),
    History(
        "no progress",
        "no progress",
        ("no step more",),
        [asked(90), start(80), verdict(9, "no progress", "step 12 thrice")],
    ),
    History(
        "requeue refused",
        "held",
        ("could not go back into the queue", "disabled"),
        [
            asked(90),
            start(80),
            verdict(9, "held", "requeue refused: Requested operation is presently disabled"),
        ],
        todo="runs.py requeue",
    ),
    History(
        "cancelled by its user",
        "cancelled",
        ("was cancelled",),
        [
            asked(90),
            start(80),
            saved(50, 40),
            (40.0, "cancelled", {"by": "ada"}),
            verdict(39, "cancelled", "on request"),
        ],
        told=("ada asked to cancel it", "attempt 1 was cancelled; step 40 is saved"),
        todo="--only cancelled",
    ),
    History(
        "cancelled with scancel by another",
        "cancelled",
        ("scancel by user 1007",),
        [asked(90)],
        past=[("CANCELLED", 80, "1007", "")],
    ),
    History(
        "killed at its walltime before it could save",
        "timeout",
        ("reached its walltime, and was killed",),
        [asked(1500), start(1490)],
        past=[("TIMEOUT", 50, "", "n1")],
        todo="resubmit",
    ),
    History(
        "preempted where the site cancels, before its ranks were up",
        "preempted",
        ("the site cancels such jobs",),
        [asked(90)],
        ("PREEMPTED", "None", "n1"),
        todo="resubmit",
    ),
    History(
        "killed for its node's memory, seen in the queue",
        "out of memory",
        ("more memory than its node gave",),
        [asked(90), start(80)],
        ("OUT_OF_MEMORY", "OutOfMemory", "n1"),
    ),
    History(
        "left without a word, and nobody knows",
        "no verdict",
        ("left the queue before a verdict",),
        [asked(90), start(80)],
    ),
    History(
        "SLURM does not answer", "no slurm", ("whether it runs is not known",), [asked(90)], no_slurm=True
    ),
    History(
        "refused by sbatch",
        "refused",
        ("invalid partition specified",),
        [asked(90)],
        batch={
            "state": "refused",
            "token": "t",
            "reason": "sbatch: error: invalid partition specified: main",
        },
    ),
    History(
        "its submitter was killed",
        "not sent",
        ("submitter ended",),
        [asked(90)],
        batch={"state": "intent", "token": "t"},
    ),
    History(
        "on another machine",
        "elsewhere",
        ("runs on elsewhere",),
        [asked(90)],
        batch={"state": "submitted", "pid": 7, "host": "elsewhere"},
    ),
    History(
        "submitted again after a failure",
        "priority",
        ("higher priority",),
        [*FAILED_ABOVE, (10.0, "released", {}), asked(10)],
        ("PENDING", "Priority", ""),
        told=("submitted again",),
    ),
]


def build(history: History, root: Path) -> tuple[RunFolder, dict[str, cluster.Job] | None]:
    """The run folder, its parent's, and the queue, as the history says."""

    def make(name: str, journal: list[tuple[float, str, dict[str, Any]]], batch: dict[str, Any]) -> RunFolder:
        folder = RunFolder(root / name / "run")
        place = root / "batches" / name
        write_json(place / "batch.json", batch)
        write_json(folder.run_file, {"name": f"{name}/run", "stage": "moe", "parent": None})
        for ago, event, facts in journal:
            facts = {key: str(place) if value == "BATCH" else value for key, value in facts.items()}
            append_line(folder.journal_file, {"event": event, "time": NOW - ago * MINUTE, **facts})
        if history.row:
            folder.metrics_file.parent.mkdir(parents=True, exist_ok=True)
            folder.metrics_file.write_text(json.dumps(history.row) + "\n")
        return folder

    folder = make("s3", history.journal, history.batch)
    write_json(folder.spec_file, {"cluster": {"walltime": "24h", "grace": "10m"}})
    queue = {}
    if history.parent is not None:
        above = make("s2", history.parent, {"state": "submitted", "job": "4100", "token": "u"})
        write_json(folder.run_file, {"name": "s3/run", "stage": "moe", "parent": str(above.path)})
        if history.parent_job:
            queue["4100_3"] = cluster.Job("4100_3", *history.parent_job, "u")
    if history.done:
        write_json(folder.handoff_file, {"step": 5000})
    if history.failure:
        attempt = [r["attempt"] for r in folder.journal if "attempt" in r][-1]
        write_json(folder.logs(attempt) / "failure_2.json", history.failure)
    if history.job:
        queue[E] = cluster.Job(
            E, *history.job, "t", NOW + history.start_in * MINUTE if history.start_in else 0.0
        )
    return folder, None if history.no_slurm else queue


@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.name)
def test_each_history_has_its_explanation(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, queue = build(history, tmp_path)
    rows = [
        cluster.Past(E, state, by, "0:0", 0.0, NOW - (ago + 30) * MINUTE, NOW - ago * MINUTE, nodes)
        for state, ago, by, nodes in history.past
    ]
    monkeypatch.setattr(cluster, "past", lambda elements: {E: rows} if rows else {})
    story = explain.tell(explain.sight(folder, state_of(folder, queue), queue), NOW)
    events = "\n".join(text for _, text in story.events)
    assert story.cause == history.cause, story
    assert [words for words in history.words if words not in story.why] == [], story.why
    assert [words for words in history.told if words not in events] == [], events
    assert history.todo in story.todo, story.todo
    assert story.why[0].isupper() or story.why[0].isdigit()
    assert story.why.endswith((".", "!"))
    assert "None" not in story.why.replace("None:", "")


def test_there_are_thirty_and_more() -> None:
    assert len({history.name for history in HISTORIES}) >= 30


def test_times_are_of_today_or_have_their_date() -> None:
    now = time.mktime((2026, 3, 5, 12, 0, 0, 0, 0, -1))
    assert explain.clock(now - 3600, now) == "11:00"
    assert explain.clock(now - 26 * 3600, now) == "Mar 04 10:00"
