"""What people ask of a run by a tag on its W&B page, obeyed where a checkpoint is due: stop-after-save and requeue.

The mirror takes a tag off the page as it passes it on, so that the next attempt does not obey it again. Whoever may
edit the run's page may end it; the journal, and so status and explain, say that a tag did it.
"""

from __future__ import annotations

from collections.abc import Callable

from launch.metrics import NoTracker
from launch.record import RunFolder

EVENTS = {"stop-after-save": "cancelled", "requeue": "requeued"}  # the first that is asked for counts


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
