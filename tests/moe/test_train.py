"""The loop: what it reports and saves, and that all ranks leave it at the same step."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moe.checkpoint import Checkpoint, CheckpointError, Checkpoints
from moe.engine import DivergedError, Engine
from moe.parallel import Groups
from moe.spec import MoESpec
from moe.stages import STAGES
from moe.storage import found
from moe.train import Outcome, Trainer
from moe.upcycle import upcycle
from moe.vlm import train_only
from tests.moe import standin, tiny
from tests.ranks import alone, ranks


class Recorder:
    def __init__(self):
        self.rows, self.published, self.beats = [], [], []

    def log(self, step, metrics):
        self.rows.append((step, dict(metrics)))

    def publish(self, checkpoint):
        assert (checkpoint.path / "COMPLETE").exists()
        self.published.append(checkpoint.step)

    def finish(self, outcome):
        raise AssertionError("the loop's caller says how it ended")


def run(folder, groups, *, total=6, stop_at=None, stop_rank=0, **changes):
    """One attempt: resumes if it can; asks for a stop on one rank after `stop_at` steps."""
    spec = standin.spec(save_every=2, **changes)
    engine, loader = Engine(standin.Model(groups), spec, groups, total_steps=6), standin.Loader(groups)
    checkpoints = Checkpoints(folder, groups, spec.keep)
    resumed = checkpoints.latest()
    if resumed:
        loader.load_state_dict(checkpoints.restore(resumed, engine)["loader"])
    recorder = Recorder()
    trainer = Trainer(
        engine,
        loader,
        checkpoints,
        recorder,
        lambda: groups.rank == stop_rank and stop_at is not None and engine.step >= stop_at,
        spec,
        groups,
        start_step=engine.step,
        total_steps=total,
        heartbeat=lambda phase, step: recorder.beats.append((phase, step)),
    )
    outcome = trainer.fit()
    weights = {name: p.detach().float().numpy().copy() for name, p in engine.vlm.named_parameters()}
    return outcome, recorder, weights


def interrupted(folder):
    groups = Groups.create(2)
    straight = run(Path(folder) / "straight", groups)
    attempts = [
        run(Path(folder) / "parts", groups, stop_at=1, stop_rank=1),
        run(Path(folder) / "parts", groups, stop_at=4, save_async=True),
        run(Path(folder) / "parts", groups),
    ]
    over = run(Path(folder) / "parts", groups)
    return straight, attempts, over


def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path):
    for straight, attempts, over in ranks(2)(interrupted, tmp_path):
        outcome, recorder, weights = straight
        assert outcome is Outcome.FINISHED
        assert [step for step, _ in recorder.rows] == [1, 2, 3, 4, 5, 6]
        assert recorder.beats[:7] == [
            *(("data", 1), ("step", 1), ("agree", 1), ("data", 2), ("step", 2), ("agree", 2)),
            ("save", 2),
        ]
        assert [step for phase, step in recorder.beats if phase == "save"] == [2, 4, 6]
        assert recorder.published == [2, 4, 6]
        assert [a[0] for a in attempts] == [Outcome.PREEMPTED, Outcome.PREEMPTED, Outcome.FINISHED]
        # Both ranks left after the same steps, whichever was asked; each step was taken once.
        assert [[step for step, _ in a[1].rows] for a in attempts] == [[1], [2, 3, 4], [5, 6]]
        assert [a[1].published for a in attempts] == [[1], [2, 4], [6]]
        joined = [row for a in attempts for row in a[1].rows]
        for (_, one), (_, other) in zip(recorder.rows, joined, strict=True):
            same = (
                "loss",
                "ce",
                "aux",
                "lr",
                "grad_norm",
                "tokens",
                "samples",
                "padding",
                "moe/layer1/counts",
            )
            assert [one[key] for key in same] == [other[key] for key in same]
        last = attempts[-1][2]
        assert all(np.array_equal(weights[name], last[name]) for name in weights)
        assert (over[0], over[1].rows, over[1].published) == (Outcome.FINISHED, [], [])
    assert [c.step for c in found(tmp_path / "parts")] == [6, 4]


@alone
def test_what_a_step_reports(tmp_path):
    _, recorder, _ = run(tmp_path, Groups.single(), log_every=4)
    assert [step for step, _ in recorder.rows] == [4, 6]
    row = recorder.rows[-1][1]
    assert set(row) == {
        "loss", "ce", "aux", "lr", "grad_norm", "tokens", "samples", "padding", "step_seconds",
        "samples_per_second", "tokens_per_second", "positions", "images",
        "moe/layer0/counts", "moe/layer1/counts", "moe/layer0/dropped", "moe/layer1/dropped",
    }  # fmt: skip
    json.dumps(row)
    assert row["samples"] == 8
    assert row["padding"] == 0.0
    assert row["loss"] == pytest.approx(row["ce"] + 0.1 * row["aux"], rel=1e-6)
    assert sum(row["moe/layer0/counts"]) == row["positions"] == 8 * standin.LENGTH
    assert row["images"] == 0
    # The stand-in loses one choice a pass in its first layer and two in its second, in eight passes.
    lost = [row[f"moe/layer{layer}/dropped"] * 8 * standin.LENGTH for layer in (0, 1)]
    assert lost == pytest.approx([8, 16])
    assert row["samples_per_second"] == pytest.approx(8 / row["step_seconds"])
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["step_seconds"])
    # The sixth of six updates, after ceil(0.2 * 6) of warm-up.
    assert row["lr"] == pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi * 3 / 4)))


@alone
def test_a_stop_at_the_last_step_is_the_end(tmp_path):
    outcome, recorder, _ = run(tmp_path, Groups.single(), total=3, stop_at=3)
    assert outcome is Outcome.FINISHED
    assert recorder.published == [2, 3]


@alone
def test_saving_in_the_background_loses_nothing(tmp_path):
    _, recorder, weights = run(tmp_path / "async", Groups.single(), save_async=True)
    assert recorder.published == [2, 4, 6]
    _, _, same = run(tmp_path / "sync", Groups.single())
    assert all(np.array_equal(weights[name], same[name]) for name in weights)


@alone
def test_a_guard_ends_the_run_before_anything_is_published(tmp_path):
    groups = Groups.single()
    spec = standin.spec(save_every=2)
    engine = Engine(standin.Model(groups), spec, groups, total_steps=6)
    recorder = Recorder()

    def guard():
        raise PermissionError("attempt 2 holds the lease")

    trainer = Trainer(
        engine, standin.Loader(groups), Checkpoints(tmp_path, groups), recorder, lambda: False, spec, groups,
        start_step=0, total_steps=6, guard=guard,
    )  # fmt: skip
    with pytest.raises((PermissionError, CheckpointError), match="attempt 2 holds the lease"):
        trainer.fit()
    assert [step for step, _ in recorder.rows] == [1, 2]
    assert recorder.published == []
    assert found(tmp_path) == []


@alone
def test_a_run_that_diverges_keeps_what_was_saved_before_and_saves_nothing_of_it(tmp_path):
    groups = Groups.single()
    spec = standin.spec(save_every=2, diverged_after=4)
    engine = Engine(standin.Model(groups), spec, groups, total_steps=20)
    recorder = Recorder()

    def spoil(phase, step):
        if (phase, step) == ("data", 5):
            engine.vlm.tower.bias.data.fill_(math.nan)

    trainer = Trainer(
        engine, standin.Loader(groups), Checkpoints(tmp_path, groups), recorder, lambda: False, spec, groups,
        start_step=0, total_steps=20, heartbeat=spoil,
    )  # fmt: skip
    with pytest.raises(
        DivergedError, match=r"each of the last 4 steps .*newest checkpoint, step 4, is from before"
    ):
        trainer.fit()
    assert [step for step, _ in recorder.rows] == [1, 2, 3, 4, 5, 6, 7]
    assert recorder.published == [2, 4]
    assert DivergedError.verdict == "divergence"


# --- with the real model ---


def sparse(groups, zero, dispatcher="torch"):
    moe = MoESpec(dispatcher=dispatcher, expert_parallel=groups.expert_parallel, capacity_factor=0.0)
    vlm = tiny.model()
    upcycle(vlm, moe, groups, seed=0)
    train_only(vlm, STAGES["moe"].trains)
    spec = standin.spec(zero=zero, global_batch=4, optim={"clip": 1.0, "lr": 1e-3})
    return Engine(vlm, spec, groups, total_steps=6, moe=moe)


def parts(groups, step):
    """Four micro-batches of unequal lengths and numbers of images, cut over the ranks."""
    each = 4 // groups.world
    lengths = [([11, 6], [1, 0]), ([5], [0]), ([9, 8, 14], [2, 1, 0]), ([7], [1])]
    mine = range(groups.rank * each, (groups.rank + 1) * each)
    return [tiny.batch(*lengths[place], seed=10 * step + place) for place in mine]


def real(expert_parallel, folder, save, zero):
    groups = Groups.create(expert_parallel)
    engine = sparse(groups, zero)
    checkpoints = Checkpoints(folder, groups)
    if not save:
        checkpoints.restore(Checkpoint(Path(folder) / "step_00000002", 2), engine)
    rows = []
    for step in range(engine.step, 4):
        if save and step == 2:
            checkpoints.save(2, engine, {})
        rows.append(engine.train_step(parts(groups, step)))
    return rows


def test_the_real_sparse_model_trains_alike_on_one_rank_and_four_and_moves_between(tmp_path):
    tiny.model()  # what it imports, the ranks then need not
    one = ranks(1)(real, 1, tmp_path / "one", True, 0)[0]
    assert one[1]["ce"] != one[0]["ce"]
    for rows in ranks(4)(real, 2, tmp_path / "four", True, 2):
        for a, b in zip(one, rows, strict=True):
            assert b["ce"] == pytest.approx(a["ce"], rel=2e-6)
            assert b["tokens"] == a["tokens"]
    four = rows
    for world, expert_parallel, zero in ((2, 2, 1), (1, 1, 2), (2, 1, 3)):
        for rows in ranks(world)(real, expert_parallel, tmp_path / "four", False, zero):
            for a, b in zip(four[2:], rows, strict=True):
                assert b["ce"] == pytest.approx(a["ce"], rel=2e-6)
