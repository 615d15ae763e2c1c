"""Where data, model, trainer and tracker are put together: one attempt at one run, on one rank."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from data.conversation import tokenizer_faults
from data.images import ImageFormat
from data.loader import Loader, texts
from launch import handoff, sampler, tracking
from launch.evaluate import evaluate
from launch.files import read_json, write_json
from launch.identity import plain
from launch.job import Place
from launch.meter import Meter
from launch.online.orders import Orders
from launch.preemption import Preemption
from launch.reader import Layers
from launch.record import RunFolder
from launch.recovery.deadline import Deadline
from launch.recovery.lease import Lease
from launch.recovery.pulse import Pulse
from launch.rendezvous import meet
from launch.spec import ExperimentSpec
from moe import backbones, lora, vlm
from moe.checkpoint import Checkpoint, Checkpoints, load_weights
from moe.engine import Engine
from moe.flops import Work
from moe.origin import fill
from moe.parallel import Groups
from moe.stages import STAGES
from moe.train import Outcome, Trainer
from moe.upcycle import upcycle


class StageError(RuntimeError):
    """A run cannot go on as it is; the text says why and what to do. Trying again would not help."""


class Journal(tracking.NoTracker):
    """The tracker that notes in the run's own journal which steps are safe, and stops where the lease is another's."""

    def __init__(self, folder: RunFolder, attempt: str, lease: Lease, saved: Callable[[float], None]) -> None:
        self.folder, self.attempt, self.lease, self.saved = folder, attempt, lease, saved

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        """Stop before the step is written to the other attempt's files."""
        self.lease.guard()

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        self.lease.guard()

    def summary(self, values: Mapping[str, object]) -> None:
        self.lease.guard()

    def publish(self, checkpoint: Checkpoint) -> None:
        """Note that a step is safe."""
        self.lease.guard()
        seconds = round(checkpoint.seconds, 3)
        self.folder.note("saved", attempt=self.attempt, step=checkpoint.step, seconds=seconds)
        self.saved(seconds)


def run_stage(folder: RunFolder, place: Place, warned: Callable[[], bool], pulse: Pulse) -> str:
    """Train the run's stage from where it is; returns how it ended: finished or preempted."""
    spec = Layers.read(folder.spec_file).build(ExperimentSpec)
    if folder.handoff_file.exists():
        # SLURM restarts a job that was preempted in its last seconds, when it had finished.
        if place.rank == 0:
            folder.note("ended", attempt=place.attempt, outcome="finished", reason="it had finished before")
        return "finished"
    _prepare(spec)
    meet(place, folder.logs(place.attempt), device=spec.cluster.device)
    stage = STAGES[spec.stage]
    groups = Groups.create(spec.moe.expert_parallel if stage.sparse else 1)
    pulse("load", 0)  # each part of it may take cluster.load_within
    record = folder.run
    parent = handoff.start(record, stage.after)
    tokenizer = _tokenizer(spec, folder, parent, groups)

    # Before it is looked where to go on: what an earlier attempt saves from now on would be lost to this one.
    lease = Lease(folder, place.attempt) if groups.rank == 0 else None
    checkpoints = Checkpoints(folder.checkpoints, groups, spec.train.keep)
    # Before the newest there may be rows missing: a crash of the node took them, or an attempt that was cut off saved
    # when the next one had already gone on from an earlier step. They are computed again.
    logged = folder.last_metrics().get("step", 0) + spec.train.log_every - 1
    resumed = checkpoints.newest(logged)
    if resumed is None and folder.last("saved"):
        raise StageError(_unreadable(folder))
    pulse("load", 0)
    model = _model(spec, len(tokenizer), None if resumed else parent, groups)
    counts = vlm.train_only(model, stage.parts(lora=spec.train.lora.rank > 0))
    vision = backbones.vision(spec.model)
    work = Work.of(model, vision.patches)  # of whole tensors: ZeRO 3 cuts them up
    image = ImageFormat(vision.size, vision.mean, vision.std, vision.resize)
    loader = Loader(
        spec.data,
        tokenizer,
        image,
        vision.patches,
        micro_batch=spec.micro_batch,
        accumulation=spec.accumulation,
        rank=groups.rank,
        world=groups.world,
        seed=spec.seed,
        replaced=folder.replaced,
    )
    steps = spec.train.steps or max(1, int(loader.samples * spec.train.epochs) // spec.train.global_batch)
    train = replace(spec.train, micro_batch=spec.micro_batch)
    engine = Engine(model, train, groups, total_steps=steps, moe=spec.moe if stage.sparse else None)
    pulse("load", 0)
    start_step = 0
    if resumed:
        # That one, or an older one where its bytes are not as written.
        found = checkpoints.resume(engine, logged)
        if found is None:
            raise StageError(_unreadable(folder))
        start_step = found[0].step
        loader.load_state_dict(found[1]["loader"])
    if lease:
        lease.guard()  # loading took minutes, and rows after start_step are about to go
    number = sum(1 for entry in folder.journal if entry["event"] == "start")
    groups.barrier()  # all have counted the attempts before this one is noted
    if groups.rank == 0:
        before = folder.last_metrics()  # rows after start_step are about to be dropped and computed again
        folder.note(
            "start",
            attempt=place.attempt,
            number=number,
            node=place.node,
            world=groups.world,
            steps=steps,
            step=start_step,
            last=before.get("step", 0),
            last_time=before.get("time", 0.0),
            trains=counts,
            samples=loader.samples,
        )
    deadline = Deadline(folder, warned, lambda: pulse.slowest) if groups.rank == 0 else None
    journal = Journal(folder, place.attempt, lease, deadline.saved) if deadline and lease else None
    tracker = _tracker(folder, record, spec, groups, number, start_step, parent, journal)
    if journal:
        tracker = Meter(work, groups.world, tracker)
    sampled = place.local_rank == 0 and spec.wandb.system == "node" and spec.wandb.mode != "disabled"
    sampling = sampler.start(folder.path, place.node) if sampled else None
    orders = Orders(deadline or warned, pulse, tracker, spec.train.save_every)
    trainer = Trainer(
        engine,
        loader,
        checkpoints,
        tracker,
        orders,
        spec.train,
        groups,
        start_step=start_step,
        total_steps=steps,
        heartbeat=orders.heartbeat,
        guard=lease.guard if lease else None,
    )
    try:
        outcome = trainer.fit()
    except BaseException:
        tracker.finish(lease.ending() if lease else "failed")
        raise
    finally:
        loader.close()
    if lease:
        lease.guard()  # since the last step
    if outcome is Outcome.PREEMPTED:
        orders.note(folder)
    if outcome is Outcome.FINISHED:
        pulse("evaluate", engine.step)
        if groups.rank == 0:
            folder.note("evaluating", attempt=place.attempt)
        if spec.data.held_out:
            evaluate(folder, model, tokenizer, spec, image, groups, tracker, pulse)
        pulse("end", engine.step)
        _hand_over(folder, checkpoints, parent, tracker, journal)
    if groups.rank == 0:
        report = loader.report()
        write_json(folder.data_file, report)
        tracker.summary({"data": report})
        tracker.table("data/sources", ["source", "samples"], report["sources"].items())
    groups.barrier()
    ended = outcome.value
    if groups.rank == 0:
        # Before W&B is waited for: the time after a warning is short, and what is saved is saved.
        folder.note("ended", attempt=place.attempt, outcome=ended, reason=deadline.warned if deadline else "")
    tracker.finish(ended, warned.left(int(spec.cluster.grace)) if isinstance(warned, Preemption) else None)
    if sampling:
        sampling.communicate()
    return ended


def _unreadable(folder: RunFolder) -> str:
    return (
        f"{folder.path} has history, and no checkpoint in it can be read; the run does not start again at step 0 "
        "by itself: put a checkpoint back, or remove the folder to train it anew"
    )


def _prepare(spec: ExperimentSpec) -> None:
    """Seed everything, and on a CPU compute in one fixed order: an attempt must repeat another's numbers."""
    if spec.cluster.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    random.seed(spec.seed)
    np.random.seed(spec.seed)
    torch.manual_seed(spec.seed)


def _tokenizer(
    spec: ExperimentSpec, folder: RunFolder, parent: tuple[RunFolder, dict[str, Any]] | None, groups: Groups
) -> Any:
    """The parent's tokenizer, else the backbone's own or one trained on the run's texts; kept in the run folder."""
    if not folder.tokenizer.is_dir() and groups.rank == 0:
        if parent:
            tokenizer = backbones.load_tokenizer(spec.model, parent[0].tokenizer)
        elif spec.model.tokenizer.startswith("train:"):
            tokenizer = backbones.train_tokenizer(texts(spec.data), int(spec.model.tokenizer[6:]))
        else:
            tokenizer = backbones.load_tokenizer(spec.model, None)
        beside = folder.tokenizer.with_name(f".tokenizer.{os.getpid()}")
        tokenizer.save_pretrained(beside)
        os.rename(beside, folder.tokenizer)
    groups.barrier()
    tokenizer = backbones.load_tokenizer(spec.model, folder.tokenizer)
    if faults := tokenizer_faults(tokenizer, spec.data.template):
        raise StageError("the tokenizer does not suit the template: " + "; ".join(faults))
    return tokenizer


def _model(
    spec: ExperimentSpec, vocabulary: int, parent: tuple[RunFolder, dict[str, Any]] | None, groups: Groups
) -> vlm.VLM:
    """The stage's model: the backbone, the parent's weights over it with its adapters merged, adapters, sparse FFNs."""
    dtype = torch.bfloat16 if spec.train.precision == "bf16" else torch.float32
    model = vlm.build(spec.model, vocab_size=vocabulary, seed=spec.seed, dtype=dtype)
    if parent:
        path = handoff.check(parent[0], parent[1], digests=groups.rank == 0)
        if parent[1].get("kind") == "hub":
            fill(path, model)
        else:
            lora.add(model, lora.told(read_json(parent[0].spec_file) or {}), sparse=False, seed=0)
            load_weights(path, model, Groups.single())  # a stage's start is dense, the same on every rank
            lora.merge(model)
    lora.add(model, spec.train.lora, sparse=STAGES[spec.stage].sparse, seed=spec.seed + 3)
    if STAGES[spec.stage].sparse:
        upcycle(model, spec.moe, groups, spec.seed)
    return model


def _hand_over(
    folder: RunFolder,
    checkpoints: Checkpoints,
    parent: tuple[RunFolder, dict[str, Any]] | None,
    tracker: tracking.NoTracker,
    journal: Journal | None,
) -> None:
    """Leave the handoff of a finished stage; all ranks read its checkpoint once more before anyone starts from it."""
    final = checkpoints.latest()
    if final is None:
        raise StageError(f"{folder.checkpoints} has lost the checkpoint of the last step")
    if journal:
        journal.lease.guard()
        tracker.publish_handoff(handoff.publish(folder, final.path, parent=parent[1] if parent else None))


def _tracker(
    folder: RunFolder,
    record: Mapping[str, Any],
    spec: ExperimentSpec,
    groups: Groups,
    number: int,
    start_step: int,
    parent: tuple[RunFolder, dict[str, Any]] | None,
    journal: Journal | None,
) -> tracking.NoTracker:
    run = {
        **{key: record[key] for key in ("id", "name", "experiment", "stage")},
        "tags": list(spec.wandb.tags),
    }
    found = tracking.trackers(
        folder.path,
        run,
        plain(spec),
        spec.wandb,
        rank=groups.rank,
        attempt=number,
        start_step=start_step,
        lease=journal.lease.token if journal else "",
    )
    if parent and journal:
        found.use(parent[1])
    return tracking.Trackers(journal, found) if journal else found
