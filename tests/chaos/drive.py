"""The driver: faults at seeded places of the work, until all runs are done or help would be needed."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field

from launch.operating.status import BROKEN
from tests.chaos.events import Chaos, Kind, Target
from tests.chaos.world import World
from tests.slurm.daemons import SlurmError

PATIENCE = 45.0  # seconds that a run may look broken: SLURM says NODE_FAIL for a while before it requeues
HELD = 240.0  # that one may be held: others' watches let it go, at their next look


@dataclass
class Event:
    """A fault as it happened."""

    number: int
    kind: str
    warning: str
    due: int  # at how many steps over all runs
    time: float = 0.0  # seconds since 1970
    run: str = ""
    attempt: str = ""  # which of the run's was hit
    step: int = 0  # where that run was
    words: str = ""


@dataclass
class Story:
    """All that happened."""

    seed: int
    events: list[Event] = field(default_factory=list)
    manual: list[str] = field(default_factory=list)  # what a person would have had to do
    began: float = 0.0
    seconds: float = 0.0
    done: bool = False

    def plain(self) -> dict[str, object]:
        return asdict(self)


def schedule(seed: int, count: int, total: int, kinds: list[Kind]) -> list[tuple[int, Kind]]:
    """Which fault comes after how many steps; the same for the same seed. Each kind comes once first."""
    dice = random.Random(seed)
    chosen = dice.sample(kinds, min(count, len(kinds)))
    chosen += dice.choices(kinds, [kind.weight for kind in kinds], k=count - len(chosen))
    places = sorted(dice.randrange(2, max(3, int(total * 0.96))) for _ in chosen)
    return list(zip(places, chosen, strict=True))


def drive(
    world: World,
    seed: int,
    count: int,
    *,
    seconds: float,
    only: Collection[str] = (),
    say: Callable[[str], None] = print,
) -> Story:
    """Submit, disturb, wait; raises nothing for what goes wrong, the story has it. `only`: these kinds of fault."""
    os.environ["SLURM_CONF"] = str(world.slurm.place.conf)  # for the queue, asked in this process
    chaos = Chaos(world, random.Random(seed))
    story = Story(seed, began=time.time())
    kinds = [kind for kind in chaos.kinds() if kind.name in only or not only]
    pending = schedule(seed, count, world.shape.total, kinds)
    broken: dict[str, float] = {}
    world.submit_and_die(chaos.dice.uniform(0.1, 1.5))
    if (done := world.submit()).returncode:
        story.manual.append(f"submit: {done.stderr}")
        return story
    end, looked = time.monotonic() + seconds, 0.0
    while time.monotonic() < end:
        chaos.tend()
        reached = sum(world.reached().values())
        up = "slurmctld" not in chaos.away
        if up and time.monotonic() - looked > 2:
            looked = time.monotonic()
            story.done = _look(world, story, broken, say)
            if story.done:
                break
        if pending and reached >= pending[0][0]:
            due, kind = pending[0]
            if not (kind.lonely and chaos.away):
                event = Event(len(story.events), kind.name, kind.warning, due)
                try:
                    happened = _happen(world, chaos, kind, event)
                except SlurmError as error:
                    happened, event.words = False, str(error).splitlines()[0]
                if happened:
                    pending.pop(0)
                    story.events.append(event)
                    if "; submitted" in event.words and "; submitted 0 new" not in event.words:
                        story.manual.append(f"a run was gone, and submitted anew: {event.words}")
                    say(
                        f"{time.time() - story.began:6.0f} s  {reached:5d} steps  {kind.name:20s} "
                        f"{event.run.removeprefix('demo/'):24s} {event.words}"
                    )
                    continue
        time.sleep(0.3)
    chaos.settle()
    story.seconds = time.time() - story.began
    return story


def _happen(world: World, chaos: Chaos, kind: Kind, event: Event) -> bool:
    """Do it, if there is something to do it to."""
    event.time = time.time()
    if kind.everyone:
        event.words = kind.everyone()
        return True
    queue = world.queue()
    running = [
        (name, state.job)
        for name, state in world.states(queue).items()
        if queue and state.name == "running" and queue[state.job].state == "RUNNING"
    ]
    if not running:
        return False
    event.run, element = chaos.dice.choice(running)
    job = world.slurm.job(element)
    nodes = job.nodes
    if not nodes or chaos.away & set(nodes):
        return False
    event.attempt = f"{element}-{job.restarts}"
    event.step = world.seen.get(event.run, 0)
    assert kind.one is not None
    event.words = kind.one(Target(event.run, element, nodes))
    return bool(event.words)


def _look(world: World, story: Story, broken: dict[str, float], say: Callable[[str], None]) -> bool:
    """Spare requeued jobs SLURM's two minutes, and see whether all is done, or something waits for a person."""
    try:
        world.slurm.nudge()
    except SlurmError:
        return False
    queue = world.queue()
    states = world.states(queue)
    now = time.monotonic()
    for name, state in states.items():
        bad = queue is not None and state.name in (*BROKEN, "held")
        since = broken.setdefault(name, now) if bad else now
        if not bad:
            broken.pop(name, None)
        elif now - since > (HELD if state.name == "held" else PATIENCE):
            story.manual.append(f"{name}: {state.name}: {state.reason}")
            say(f"{time.time() - story.began:6.0f} s  HELP {story.manual[-1]}")
            broken.pop(name)
            world.slurm.run(
                ["scontrol", "release", state.job] if state.name == "held" else world.command(),
                env=world.environment(),
                cwd=world.scratch,
                timeout=180,
                check=False,
            )
    return all(state.name == "done" for state in states.values())
