"""A checkpoint to ask."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from moe.backbones import train_tokenizer
from moe.checkpoint import Checkpoints
from moe.engine import Engine
from moe.parallel import Groups
from moe.spec import MoESpec, OptimSpec, TrainSpec
from moe.upcycle import upcycle
from moe.vlm import build, train_only
from tests.moe.tiny import batch, spec
from tests.ranks import ranks


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of training, saved as a run's."""
    run = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(iter(["USER: What is this? ASSISTANT: A cat."] * 9), 270)
    tokenizer.save_pretrained(run / "tokenizer")
    said = spec(tokenizer="train:270")
    (found,) = ranks(1)(trained, run, len(tokenizer))
    (run / "spec.json").write_text(
        json.dumps(
            {
                "stage": "moe",
                "model": asdict(said),
                "moe": asdict(MoESpec(layers=(0, 3))),
                "data": {"template": "v1", "aspect": "pad"},
            }
        )
    )
    return Path(found)


def trained(run: Path, words: int) -> str:
    groups = Groups.create()
    vlm = build(spec(), vocab_size=words, seed=1, dtype=torch.float32)
    moe = MoESpec(layers=(0, 3))
    upcycle(vlm, moe, groups, seed=0)
    train_only(vlm, ["projector", "experts", "router", "ffn"])
    train = TrainSpec(global_batch=2, micro_batch=2, precision="fp32", zero=0, optim=OptimSpec(warmup=0))
    engine = Engine(vlm, train, groups, total_steps=1, moe=moe)
    engine.train_step([batch([9, 6], [1, 0])])
    return str(Checkpoints(run / "checkpoints", groups, 1).save(1, engine, {}).path)
