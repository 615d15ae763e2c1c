"""A short, seeded piece of the chaos: a sweep of two on a private SLURM, four faults, and nothing to show for them.

The whole of it, three stages and more than a hundred faults of every kind, is `make chaos`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos import measure
from tests.chaos.drive import drive, schedule
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
    assert slurm.jobs().keys() >= {"1_0", "1_1", "2_0", "2_1"}
    assert sum(job.partition == "main" for job in slurm.jobs().values()) == 4  # nothing was submitted twice


def test_a_seed_gives_one_schedule_with_every_kind_in_it() -> None:
    kinds = [Kind(str(n), "none", n + 1) for n in range(6)]
    one, again, other = (schedule(seed, 40, 1000, kinds) for seed in (1, 1, 2))
    assert one == again != other
    assert {kind.name for _, kind in one} == {kind.name for kind in kinds}
    assert [place for place, _ in one] == sorted(place for place, _ in one)


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
