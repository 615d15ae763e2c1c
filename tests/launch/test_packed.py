"""The demo's stages on packed sequences, two ranks: what they learn is what they would learn sample by sample."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  before ranks are forked: each would import it anew
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.images import ImageFormat
from data.loader import Loader, texts
from launch.plan import EXPERIMENTS, load
from launch.spec import ExperimentSpec
from moe import backbones, vlm
from moe.checkpoint import Checkpoints
from moe.engine import Engine
from moe.parallel import Groups
from moe.spec import MoESpec
from moe.stages import STAGES
from moe.train import Outcome, Trainer
from moe.upcycle import upcycle
from moe.vlm import IGNORE, VLM
from tests.ranks import ranks

STEPS = 4
FILES = {"instruct": "stage2_instruct", "moe": "stage3_moe"}


def spec_of(stage: str, root: Path) -> ExperimentSpec:
    """A demo stage, packed: two of the longest samples fit into a sequence; experts drop no token."""
    changes = ["data.packing=true", "data.max_length=200", "data.pack_length=400", f"data.root={root}"]
    changes += ["train.global_batch=8", "train.micro_batch=2", "moe.capacity_factor=0"]
    return load(EXPERIMENTS / "demo" / f"{FILES[stage]}.yaml", changes).points[0][1]


@functools.cache
def tokenizer(root: Path) -> Any:
    some = itertools.islice(texts(spec_of("instruct", root).data), 2000)
    return backbones.train_tokenizer(some, 560)


def loader(spec: ExperimentSpec, groups: Groups) -> Loader:
    seen = backbones.vision(spec.model)
    image = ImageFormat(seen.size, seen.mean, seen.std, seen.resize)
    batch = {"micro_batch": spec.micro_batch, "accumulation": spec.accumulation}
    place = {"rank": groups.rank, "world": groups.world, "seed": spec.seed}
    return Loader(spec.data, tokenizer(Path(spec.data.root)), image, seen.patches, **batch, **place)


def model(spec: ExperimentSpec, groups: Groups) -> VLM:
    made = vlm.build(spec.model, vocab_size=560, seed=0, dtype=torch.float32)
    if STAGES[spec.stage].sparse:
        upcycle(made, spec.moe, groups, 0)
    vlm.train_only(made, STAGES[spec.stage].trains)
    return made.train()


def engine(spec: ExperimentSpec, groups: Groups) -> Engine:
    moe: MoESpec | None = spec.moe if STAGES[spec.stage].sparse else None
    return Engine(model(spec, groups), spec.train, groups, total_steps=STEPS, moe=moe)


def unpacked(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same samples, a row each; their pictures are in order already."""
    rows: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for at, segments in enumerate(batch["segments"]):
        for number in range(1, int(segments.max()) + 1):
            for name, values in rows.items():
                values.append(batch[name][at][segments == number])
    fill = {"input_ids": 0, "labels": IGNORE, "attention_mask": False}
    apart = {name: pad_sequence(rows[name], True, value) for name, value in fill.items()}
    return {**apart, "pixel_values": batch["pixel_values"]}


def each(made: VLM, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy summed over each sample, and the gradients of all of it and of what the routers add."""
    made.zero_grad()
    output = made(**batch)
    assert output.labels is not None
    losses = F.cross_entropy(output.logits[:, :-1].mT, output.labels[:, 1:], reduction="none")
    spliced = made.splice(**batch).segments
    if spliced is None:
        found = losses.sum(1)
    else:
        width = int(spliced.max()) + 1
        own = torch.zeros(len(losses), width).scatter_add(1, spliced[:, 1:], losses.detach())
        found = own[:, 1:][own[:, 1:] > 0]
    output.loss.backward()
    return found.detach(), {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def losses_and_gradients(root: Path, stage: str) -> list[tuple[Tensor, Tensor, float]]:
    """Of each micro-batch of a step: each sample's loss packed and alone, and how far gradients are apart at most."""
    spec = spec_of(stage, root)
    groups = Groups.create(spec.moe.expert_parallel if STAGES[stage].sparse else 1)
    made, given = model(spec, groups), loader(spec, groups)
    found = []
    for batch in next(given.steps()):
        assert int(batch["segments"].max()) > 1
        (together, grads), (apart, wanted) = each(made, batch), each(made, unpacked(batch))
        assert len(apart) == int(batch["segments"].amax(1).sum())
        assert grads.keys() == wanted.keys()
        far = max(float((grads[name] - wanted[name]).abs().max()) for name in wanted)
        found.append((together, apart, far))
    given.close()
    return found


def steps_of_both(root: Path) -> list[list[dict[str, Any]]]:
    """What training reports of the same steps, packed and sample by sample."""
    spec = spec_of("moe", root)
    groups = Groups.create(spec.moe.expert_parallel)
    given = loader(spec, groups)
    steps = list(itertools.islice(given.steps(), STEPS))
    given.close()
    apart = [[unpacked(batch) for batch in step] for step in steps]
    rows = []
    for way in (steps, apart):
        trained = engine(spec, groups)
        rows.append([trained.train_step(step) for step in way])
    return rows


class Recorder:
    """The tracker that keeps what can be compared."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.rows.append({key: metrics[key] for key in ("loss", "grad_norm", "samples", "padding")})

    def publish(self, checkpoint: Any) -> None:
        pass

    def finish(self, outcome: str) -> None:
        pass


def stopped_and_resumed(root: Path, folder: Path) -> list[tuple[list[dict[str, Any]], list[bytes]]]:
    """Steps and last weights of a run, and of one that was stopped after a step and gone on with."""
    spec = spec_of("moe", root)
    groups = Groups.create(spec.moe.expert_parallel)

    def attempt(place: str, stop_at: int) -> tuple[Outcome, list[dict[str, Any]], list[bytes]]:
        trained, given = engine(spec, groups), loader(spec, groups)
        checkpoints, recorder = Checkpoints(folder / place, groups, 1), Recorder()
        if found := checkpoints.latest():
            given.load_state_dict(checkpoints.restore(found, trained)["loader"])

        def stop() -> bool:
            return trained.step >= stop_at

        hooks = (checkpoints, recorder, stop, spec.train, groups)
        trainer = Trainer(trained, given, *hooks, start_step=trained.step, total_steps=STEPS)
        outcome = trainer.fit()
        given.close()
        weights = [p.detach().numpy().tobytes() for p in trained.vlm.parameters()]
        return outcome, recorder.rows, weights

    whole = attempt("whole", STEPS)
    first, second = attempt("parts", 1), attempt("parts", STEPS)
    assert (first[0], second[0]) == (Outcome.PREEMPTED, Outcome.FINISHED)
    return [whole[1:], (first[1] + second[1], second[2])]


def everything(root: Path, folder: Path) -> dict[str, Any]:
    return {
        **{stage: losses_and_gradients(root, stage) for stage in FILES},
        "steps": steps_of_both(root),
        "resumed": stopped_and_resumed(root, folder),
    }


@pytest.fixture(scope="module")
def done(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found; starting them is most of the time that these tests take."""
    tokenizer(demo_data)
    return ranks(2)(everything, demo_data, tmp_path_factory.mktemp("packed"))


@pytest.mark.parametrize("stage", FILES)
def test_each_sample_has_its_own_loss_and_gradient(stage: str, done: list[dict[str, Any]]) -> None:
    for together, apart, far in done[0][stage] + done[1][stage]:
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
        assert far < 1e-5


def test_steps_on_packed_sequences_are_steps_on_their_samples(done: list[dict[str, Any]]) -> None:
    packed, apart = done[0]["steps"]
    assert packed == done[1]["steps"][0]  # both ranks tell the same
    for one, two in zip(packed, apart, strict=True):
        for key in ("loss", "ce", "aux", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=1e-5), key
        same = ("tokens", "samples", "lr", "moe/layer0/counts")
        assert [one[key] for key in same] == [two[key] for key in same]
        assert one["samples"] >= 16  # in 8 sequences
        assert one["padding"] < two["padding"]


def test_a_packed_run_that_was_stopped_ends_as_one_that_was_not(done: list[dict[str, Any]]) -> None:
    for whole, parts in (rank["resumed"] for rank in done):
        assert len(whole[0]) == STEPS
        assert whole == parts
