"""What one rank writes of a checkpoint, and when."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moe import randomness, storage
from moe.fragments import FROZEN, shared_out
from moe.pieces import PIECES, layout, runs, staged, uncollected

if TYPE_CHECKING:
    from moe.engine import Engine

Guard = Callable[[], None]
Written = tuple[Path, dict[str, Any], str]  # a file, its size and digest, and the digests of its pieces


class Save:
    """One rank's part of a save under way: written here and now, or from a copy in the background.

    `staging` is memory for the copy, kept for the next save; `earlier`: a file that holds the frozen weights already.
    """

    def __init__(
        self,
        step: int,
        engine: Engine,
        extra: dict[str, Any],
        guard: Guard | None,
        partial: Path,
        *,
        background: bool,
        staging: Tensor | None,
        earlier: Written | None,
    ) -> None:
        self.staging, self._earlier = staging, earlier
        self.step, self.guard, self.partial = step, guard, partial
        groups = engine.groups
        self.rank = groups.rank
        self.record = {
            "step": step,
            "world": groups.world,
            "updates": engine.updates,
            "layout": {
                "expert_parallel": groups.expert_parallel,
                "zero": engine.spec.zero,
                "precision": engine.spec.precision,
            },
            "extra": extra,
        }
        self.frozen: tuple[str, dict[str, Any], str] | None = None
        self._files: dict[str, Any] = {}
        self._error = ""
        self._thread: threading.Thread | None = None
        try:
            with uncollected():
                pieces = shared_out(engine.fragments())
                state = [piece for piece in pieces if piece.kind != FROZEN]
                # Widest elements first: each then begins at a multiple of its size.
                still = sorted(
                    (p for p in pieces if p.kind == FROZEN), key=lambda p: -p.tensor.element_size()
                )
                self._laid_out = state, still
                self._random = randomness.state()
            self._state: Iterable[memoryview] = runs(state)
            self._still = runs(still)
            if background:
                self.staging, self._state = staged(state, staging)
        except Exception as error:
            self._error = f"{type(error).__name__}: {error}"
            return
        if background:
            self._thread = threading.Thread(target=self._write, name=f"save step {step}", daemon=True)
            self._thread.start()
        else:
            self._write()

    def done(self) -> bool:
        """Whether this rank's files are written, or failed to be."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> tuple[dict[str, Any], str]:
        """The files written here, and what went wrong ("": nothing)."""
        if self._thread is not None:
            self._thread.join()
        return self._files, self._error

    def _name(self, kind: str) -> str:
        return f"{kind}_{self.rank:05d}.bin"

    def _write(self) -> None:
        name = ""
        try:
            with storage.Writer() as writer:
                name = self._name("state")
                self._files[name], state = writer.write(self.partial / name, self._state)
                name = self._name("frozen")
                self._files[name], frozen = self._write_frozen(writer, self.partial / name)
                self.frozen = (name, self._files[name], frozen)
                index = self._index() | {PIECES: {self._name("state"): state, name: frozen}}
                for kind, content in (("index", index), ("random", self._random)):
                    name = f"{kind}_{self.rank:05d}.json"
                    text = json.dumps(content, separators=(",", ":")).encode()
                    self._files[name], _ = writer.write(self.partial / name, [memoryview(text)])
                name = self.partial.name
        except OSError as error:
            self._error = f"{name}: {error.strerror or error}"
        except Exception as error:
            self._error = f"{name}: {type(error).__name__}: {error}"

    def _index(self) -> dict[str, Any]:
        """What lies where; made here, while the training loop goes on."""
        state, still = self._laid_out
        return layout(state, self._name("state")) | layout(still, self._name("frozen"))

    def _write_frozen(self, writer: storage.Writer, path: Path) -> tuple[dict[str, Any], str]:
        """Frozen weights never change, so the save before the last has them on disk already: one more name
        for that file.

        Not the last save's: two neighbouring checkpoints share no bytes, so that a corrupt one can fall
        back.
        """
        if self._earlier is not None:
            source, said, pieces = self._earlier
            with contextlib.suppress(OSError):
                os.link(source, path)
                return said, pieces
        return writer.write(path, self._still)
