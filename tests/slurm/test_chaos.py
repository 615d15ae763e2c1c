"""A short, seeded piece of the chaos: a sweep of two on a private SLURM, four faults, and nothing to show for them.

The whole of it, three stages and more than a hundred faults of every kind, is `make chaos`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.record import RunFolder
from launch.recovery import lifeline
from tests.chaos import measure
from tests.chaos.drive import Event, drive, schedule
from tests.chaos.events import Kind
from tests.chaos.world import Shape, World, small_disk
from tests.slurm.cluster import PrivateSlurm, missing

SHAPE = Shape(steps=(16, 0, 0), points=2, save_every=4, pause=0.3, ranks=1, until="align")
FAULTS = ("preempted, grace 0", "rank SIGKILL", "disk full", "submitter SIGKILL")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    if reason := missing():
        pytest.skip(reason)
    with small_disk(tmp_path / "runs", 200) as folder:
        yield folder


@pytest.mark.slurm
@pytest.mark.slow
def test_after_faults_of_four_kinds_the_runs_are_those_of_a_quiet_night(
    disk: Path,  # before the nodes start
    private_slurm: Callable[..., PrivateSlurm],
    demo_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_CONF", "")
    slurm = private_slurm(kill_wait=30)
    calm = World(slurm, SHAPE, tmp_path / "calm", demo_data, tmp_path / "calm_scratch")
    world = World(slurm, SHAPE, disk, demo_data, tmp_path / "scratch")
    for folder in (calm.runs, calm.scratch, world.scratch):
        folder.mkdir()
    assert calm.submit().returncode == 0
    story = drive(world, 7, len(FAULTS), seconds=400, only=FAULTS)
    assert story.manual == []
    assert story.done, slurm.describe()
    assert {event.kind for event in story.events} == set(FAULTS)
    slurm.wait(
        lambda: {state.name for state in calm.states(calm.queue()).values()} == {"done"}, 200, every=0.5
    )

    assert measure.differences(calm, world) == []
    found = [b for name in world.folders for b in measure.breaks(name, world.runs_of(name), story.events)]
    assert found
    assert measure.over_the_bound(found, SHAPE.save_every) == []
    # Where the machine is slow, runs go on for long enough to have a job wait beside them.
    waiting = [id for id, job in slurm.jobs().items() if job.fields.get("Comment") == lifeline.NAME]
    ours = [id for id, job in slurm.jobs().items() if job.partition == "main" and id not in waiting]
    assert len(ours) == 4, ours  # nothing was submitted twice
    assert {id.partition("_")[2] for id in ours} == {"0", "1"}


def test_a_seed_gives_one_schedule_with_every_kind_in_it() -> None:
    kinds = [Kind(str(n), "none", n + 1) for n in range(6)]
    one, again, other = (schedule(seed, 40, 1000, kinds) for seed in (1, 1, 2))
    assert one == again != other
    assert {kind.name for _, kind in one} == {kind.name for kind in kinds}
    assert [place for place, _ in one] == sorted(place for place, _ in one)


@pytest.mark.parametrize("between", [12.0, 60.0, 3600.0])  # seconds of training from one fault to the next
def test_the_model_of_goodput_is_what_comes_of_it(between: float) -> None:
    dice, steps, step, stall, restart, every = random.Random(1), 40_000, 0.5, 0.2, 39.0, 10
    done = saved = trained = since = total = faults = unwarned = 0.0
    fault = dice.expovariate(1 / between)
    while done < steps:
        if trained + step > fault:
            faults, total, trained = faults + 1, total + restart + step * dice.random(), 0.0
            fault = dice.expovariate(1 / between)
            if dice.random() < 0.7:
                unwarned, done = unwarned + 1, saved
            else:
                total, saved = total + stall, done
            since = 0
            continue
        done, trained, since, total = done + 1, trained + step, since + 1, total + step
        if since == every:
            saved, since, total = done, 0, total + stall
    measured = steps * step / total
    model = measure.modelled(steps * step, every * step, stall, faults * restart, int(unwarned))
    assert model == pytest.approx(measured, abs=0.01)
    # For rare faults it is the sum of the shares, which at many faults counts saves that are never made.
    rare = 1 - stall / (every * step) - (restart + 0.7 * every * step / 2) * faults / total
    assert (abs(rare - model) < 0.01) == (between > 100)


def test_a_loss_is_put_down_to_what_hit_the_attempt_also_while_it_was_loading(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def noted(attempt: int, launched: float, start: float, step: int, last: int) -> None:
        folder.note("launched", attempt=f"7_0-{attempt}", time=launched)
        facts = {"number": attempt, "step": step, "last": last}
        folder.note("start", attempt=f"7_0-{attempt}", time=start, **facts)

    def fault(kind: str, warning: str, time: float, attempt: int | None = None, run: str = "x") -> Event:
        of = "" if attempt is None else f"7_0-{attempt}"
        return Event(0, kind, warning, 0, time, run if of else "", of)

    noted(0, 10, 20, step=0, last=0)
    noted(1, 40, 50, step=30, last=30)
    noted(2, 80, 90, step=30, last=39)
    folder.note("ended", attempt="7_0-2", time=98)
    noted(3, 100, 110, step=40, last=40)
    faults = [
        fault("walltime", "signalled", 30, 0),
        fault("slurmd", "unsignalled", 45, 1),  # it loads; SLURM finds the node lost half a minute later
        fault("preempted", "signalled", 60, 1),
        fault("disk full", "unsignalled", 95),  # and yet it could save
        fault("preempted", "signalled", 97, 2),
    ]
    found = measure.breaks("x", folder, faults)
    assert [(b.lost, b.warning, measure.blamed(b)) for b in found] == [
        (0, "signalled", "walltime"),
        (9, "unsignalled", "slurmd"),
        (0, "signalled", "preempted"),
    ]
    assert [len(b.causes) for b in found] == [1, 2, 2]
    assert measure.over_the_bound(found, 10) == []


def test_a_difference_of_one_bit_is_found(tmp_path: Path) -> None:
    worlds = [World(None, SHAPE, tmp_path / name, tmp_path, tmp_path) for name in ("a", "b")]  # type: ignore[arg-type]
    for world in worlds:
        for name, steps in SHAPE.runs:
            folder = world.runs_of(name)
            folder.path.mkdir(parents=True)
            lines = [f'{{"step": {step}, "loss": {1 / step}}}' for step in range(1, steps + 1)]
            folder.metrics_file.write_text("\n".join(lines) + "\n")
            folder.handoff_file.write_text('{"digest": "d"}')
    assert measure.differences(*worlds) == []
    one = worlds[1].runs_of(SHAPE.runs[0][0])
    one.handoff_file.write_text('{"digest": "e"}')
    one.metrics_file.write_text(one.metrics_file.read_text() + '{"step": 16, "loss": 0.0625}\n')
    found = measure.differences(*worlds)
    assert [line.partition(": ")[2] for line in found] == [
        "handoff differs",
        "history differs",
        "its rows are not steps 1 to 16, each once",
    ]
