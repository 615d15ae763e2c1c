"""What people ask of a run by a tag on its W&B page, obeyed where a checkpoint is due: stop-after-save and requeue.

The mirror takes a tag off the page as it passes it on, so that the next attempt does not obey it again. What was
taken is kept in the run folder until it is obeyed: an attempt that is killed before its save leaves the order to the
next one. Whoever may edit the run's page may end it; the journal, and so status and explain, say that a tag did it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from launch.files import read_json, write_json
from launch.metrics import NoTracker
from launch.record import RunFolder

EVENTS = {"stop-after-save": "cancelled", "requeue": "requeued"}  # the first that is asked for counts
KEPT = "wandb/orders.json"


class Orders:
    """The trainer's `should_stop` and `heartbeat`, with the orders beside the warning. Rank 0 alone hears any."""

    def __init__(
        self,
        warned: Callable[[], bool],
        pulse: Callable[[str, int], None],
        tracker: NoTracker,
        save_every: int,
    ) -> None:
        self.warned, self.pulse, self.tracker, self.save_every = warned, pulse, tracker, save_every
        self.step = 0
        self.obeyed = ""

    def heartbeat(self, doing: str, step: int) -> None:
        """Pass it on, and note where the trainer is."""
        self.step = step
        self.pulse(doing, step)

    def __call__(self) -> bool:
        """Whether to save and leave after this step."""
        if self.warned():
            return True
        if self.step % self.save_every == 0:
            asked = self.tracker.asked()
            self.obeyed = next((order for order in EVENTS if order in asked), "")
        return bool(self.obeyed)

    def note(self, folder: RunFolder) -> None:
        """Write down who ended the attempt, for the verdict; when the save is done."""
        if self.obeyed:
            folder.note(EVENTS[self.obeyed], by=f"the W&B tag {self.obeyed}")
            (folder.path / KEPT).unlink(missing_ok=True)


def keep(folder: RunFolder, orders: Iterable[str]) -> None:
    """Write down what a tag asks for, until it is obeyed."""
    write_json(folder.path / KEPT, {"orders": sorted(orders), "time": time.time()})


def kept(folder: RunFolder) -> list[str]:
    """What tags asked for and no attempt has obeyed; nothing of before the run was last submitted."""
    found, submitted = read_json(folder.path / KEPT), folder.last("submitting")
    if found is None or (submitted is not None and submitted["time"] > found["time"]):
        return []
    return list(found["orders"])
