"""The real sparse model's checkpoint under other ranks, expert groups, ZeRO stages and dispatchers: the same losses."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from moe.checkpoint import Checkpoints
from moe.engine import Engine
from moe.parallel import Groups
from moe.spec import MoESpec
from moe.stages import STAGES
from moe.upcycle import upcycle
from moe.vlm import train_only
from tests.moe import standin, tiny
from tests.moe.test_train import parts
from tests.ranks import ranks


def losses(
    folder: Path, expert_parallel: int, zero: int, dispatcher: str, first: int
) -> list[dict[str, Any]]:
    """Two steps from the start, a save, then two steps; or these two alone, from what was saved."""
    groups = Groups.create(expert_parallel)
    spec = MoESpec(experts=4, expert_parallel=expert_parallel, dispatcher=dispatcher)  # type: ignore[arg-type]
    vlm = tiny.model(seed=3 if first == 0 else 4)  # nothing of a fresh model may be left
    upcycle(vlm, spec, groups, seed=first)
    train_only(vlm, STAGES["moe"].trains)
    train = standin.spec(zero=zero, global_batch=4, optim={"clip": 1.0, "lr": 1e-3})
    engine = Engine(vlm, train, groups, total_steps=6, moe=spec)
    checkpoints = Checkpoints(folder, groups)
    if first:
        found = checkpoints.resume(engine)
        assert found is not None
        assert (found[0].step, checkpoints.faults) == (2, [])
    rows = []
    for step in range(first, 4):
        if step == 2 and not first:
            checkpoints.save(2, engine, {})
        rows.append(engine.train_step(parts(groups, step)))
    return rows[-2:]


def test_four_ranks_with_an_expert_each_go_on_on_two_and_on_one(tmp_path: Path) -> None:
    tiny.model()  # what it imports, the ranks then need not
    tutel = "tutel" if importlib.util.find_spec("tutel") else "torch"
    want = ranks(4)(losses, tmp_path, 4, 2, tutel, 0)[0]
    assert want[0]["ce"] != want[1]["ce"]
    for world, expert_parallel, zero, dispatcher in ((2, 2, 1, tutel), (1, 1, 2, tutel), (1, 1, 1, "torch")):
        for rows in ranks(world)(losses, tmp_path, expert_parallel, zero, dispatcher, 2):
            for row, wanted in zip(rows, want, strict=True):
                for key in ("loss", "ce", "aux"):
                    assert row[key] == pytest.approx(wanted[key], rel=1e-6), (world, dispatcher, key)
                assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
                assert row["moe/layer1/counts"] == wanted["moe/layer1/counts"]
