"""Published weights: what reading them takes of a rank's memory, and what is said where they cannot be had."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from moe import weights
from moe.backbones import LANGUAGE, VISION, BackboneError, load_tokenizer
from moe.spec import ModelSpec
from tests.moe.tiny import CONFIG
from tests.ranks import ranks

ROOMY = CONFIG | {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_key_value_heads": 4,
    "vocab_size": 12000,
}


def private() -> int:
    """Bytes of this process that are nobody else's: not the pages of a mapped file, which ranks share."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def read(backbone: str, folder: Path) -> float:
    """A rank's peak of private memory while it reads, over the size of the model it then has."""
    before = most = private()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, private())

    watching = threading.Thread(target=watch)
    watching.start()
    spec = ModelSpec(
        backbone=backbone, weights=str(folder), config=ROOMY if LANGUAGE[backbone].own_config else {}
    )
    try:
        language = weights.load_language(spec, vocab_size=12000, seed=0, dtype=torch.bfloat16)
    finally:
        done.set()
        watching.join()
    assert {p.dtype for p in language.parameters()} == {torch.bfloat16}
    return (most - before) / sum(2 * p.numel() for p in language.parameters())


@pytest.mark.parametrize("backbone", ["stablelm", "qwen"])  # by from_pretrained, and tensor by tensor
def test_no_rank_ever_holds_the_published_fp32_weights(backbone: str, tmp_path: Path) -> None:
    config = {key: value for key, value in ROOMY.items() if key != "vocab_size"}
    spec = ModelSpec(backbone=backbone, random=True, config=config)
    whole = weights.load_language(spec, vocab_size=12000, seed=0, dtype=torch.float32)
    whole.save_pretrained(tmp_path, max_shard_size="15MB")
    assert len(list(tmp_path.glob("model*.safetensors"))) > 3
    for share in ranks(2)(read, backbone, tmp_path):
        assert 0.5 < share < 1.3  # less than one: what a fork had left over is used again


@pytest.fixture
def cut_off(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and no hub: by its own switch, or because no name is resolved."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if request.param == "HF_HUB_OFFLINE=1" else "0")

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the hub's client tries six times in 23 seconds


@pytest.mark.parametrize(
    ("name", "cut_off"),
    [(name, "HF_HUB_OFFLINE=1") for name in (*LANGUAGE, *VISION)]
    + [(name, "no network") for name in ("phi2", "qwen", "siglip-384")],
    indirect=["cut_off"],
)
@pytest.mark.usefixtures("cut_off")
def test_what_cannot_be_had_is_named_with_a_way_to_have_it(name: str) -> None:
    how = {"vocab_size": 100, "seed": 0, "dtype": torch.bfloat16}
    if name in VISION:
        key, hub = "model.tower_weights", VISION[name].hub
        with pytest.raises(BackboneError) as said:
            weights.load_tower(ModelSpec(tower=name), seed=0, dtype=torch.bfloat16)
    else:
        key, hub = "model.weights", LANGUAGE[name].hub
        with pytest.raises(BackboneError) as said:
            weights.load_language(ModelSpec(backbone=name), **how)
        with pytest.raises(BackboneError, match=f"{hub} is neither a folder nor in this machine"):
            load_tokenizer(ModelSpec(backbone=name))
    words = str(said.value)
    assert words.startswith(f"{key}: {hub} is neither a folder nor in this machine's Hugging Face cache")
    assert f"hf download {hub}" in words
    assert "Traceback" not in words
