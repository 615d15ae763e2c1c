"""LoRA: the model starts as it was, only adapters move, merged computes what unmerged did, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft  # noqa: F401  before ranks are forked: each would import it anew
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.spec import DataSpec
from launch import handoff
from launch.identity import identity_of, plain
from launch.record import RunFolder
from launch.spec import ExperimentSpec
from launch.stage import _model
from moe import lora
from moe.backbones import train_tokenizer
from moe.checkpoint import Checkpoint, Checkpoints
from moe.engine import Engine
from moe.interchange import InterchangeError, export_hf, load_moe_llava, open_checkpoint
from moe.lora import LoraError
from moe.parallel import Groups
from moe.spec import LoraSpec, MoESpec, TrainSpec
from moe.stages import STAGES
from moe.upcycle import upcycle
from moe.vlm import VLM, build, train_only
from tests.moe import standin, tiny
from tests.moe.test_interchange import EXPERT, STABLELM, TOWER, dense
from tests.ranks import alone, ranks

ALONE = Groups.single()


def adapted(backbone: str, sparse: bool, groups: Groups = ALONE, **changes: Any) -> VLM:
    vlm = tiny.model(backbone)
    lora.add(vlm, LoraSpec(**{"rank": 6, "dropout": 0.1, **changes}), sparse=sparse, seed=5)
    if sparse:
        spec = MoESpec(
            dispatcher="torch", expert_parallel=groups.expert_parallel, residual=backbone == "phi2"
        )
        upcycle(vlm, spec, groups, seed=0)
    return vlm


def moved(vlm: VLM) -> VLM:
    """Adapters as if they had been trained."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return vlm


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("backbone", ["stablelm", "phi2", "qwen2"])
def test_adapters_start_at_nothing_and_merge_into_what_they_did(
    tmp_path: Path, backbone: str, sparse: bool
) -> None:
    given = tiny.batch([9], [1])
    plain = tiny.model(backbone).eval()
    vlm = adapted(backbone, sparse).eval()
    if backbone != "phi2" or not sparse:  # PR-MoE's mixing halves what a dense model says
        torch.testing.assert_close(vlm(**given).logits, plain(**given).logits, rtol=0, atol=1e-5)
    unmerged = moved(vlm)(**given).logits
    assert (unmerged - plain(**given).logits).abs().max() > 0.01
    export_hf(vlm, tmp_path, train_tokenizer(iter(["a cat"]), 260))
    assert vlm.lora is not None  # exporting changes nothing
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(read(**given).logits, unmerged, rtol=0, atol=1e-5)
    lora.merge(vlm)
    torch.testing.assert_close(vlm(**given).logits, unmerged, rtol=0, atol=1e-5)
    names = [name for name, _ in (plain if not sparse else upcycled(backbone)).named_parameters()]
    assert [name for name, _ in vlm.named_parameters()] == names


def upcycled(backbone: str) -> VLM:
    vlm = tiny.model(backbone)
    upcycle(vlm, MoESpec(dispatcher="torch", residual=backbone == "phi2"), ALONE, seed=0)
    return vlm


def test_the_stage_table_says_what_trains_and_how_much() -> None:
    layer = 6 * (32 + 48)  # of one linear map of an FFN
    vlm = adapted("stablelm", False)
    counts = train_only(vlm, STAGES["instruct"].parts(lora=True))
    assert counts == {"projector": 24 * 32 + 32 + 32 * 32 + 32, "adapters": 4 * (3 * layer + 4 * 6 * 64)}
    vlm = adapted("stablelm", True)
    counts = train_only(vlm, STAGES["moe"].parts(lora=True))
    # Two layers of four experts and two dense ones.
    assert counts["adapters"] == (2 * 4 + 2) * 3 * layer
    assert counts["router"] == 2 * 4 * 32
    trained = {name.split(".")[-1] for name, p in vlm.named_parameters() if p.requires_grad}
    assert not {"up", "gate", "down"} & trained
    # An expert begins as every other: a copy of the FFN and of its adapters.
    experts: Any = vlm.layers()[0].mlp.experts
    assert torch.equal(experts.up_lora_a[0], experts.up_lora_a[3])
    other = adapted("stablelm", True, targets=("q_proj", "down_proj"))
    assert train_only(other, ["adapters"])["adapters"] == 10 * layer + 4 * 6 * 64


def test_experts_adapters_compute_as_pefts_own() -> None:
    vlm = moved(adapted("qwen2", False, targets="ffn", dropout=0.0))
    given = tiny.batch([9, 5], [1, 0])
    vlm(**given).loss.backward()
    own: Any = vlm.layers()[0].mlp
    grads = {n: getattr(own, f"{n}_proj").lora_B["default"].weight.grad for n in ("up", "down")}
    upcycle(vlm, MoESpec(dispatcher="torch", aux_loss=0.0, capacity_factor=0.0), ALONE, seed=0)
    vlm(**given).loss.backward()
    experts: Any = vlm.layers()[0].mlp.experts
    for name, grad in grads.items():  # what one FFN learns is what its copies learn together
        torch.testing.assert_close(getattr(experts, f"{name}_lora_b").grad.sum(0), grad, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_adapted_is_refused_in_words() -> None:
    with pytest.raises(
        LoraError, match=r"train\.lora\.targets names fc1, but the linear maps of stablelm are"
    ):
        adapted("stablelm", False, targets=("fc1", "up_proj"))
    with pytest.raises(LoraError, match="to a dense model that has none yet"):
        lora.add(adapted("stablelm", True), LoraSpec(rank=2), sparse=True, seed=0)
    vlm = tiny.model()
    lora.add(vlm, LoraSpec(), sparse=False, seed=0)
    assert vlm.lora is None


# --- training ---

WORDS = 260  # a trained tokenizer's least
LORA = {"rank": 6, "dropout": 0.1}


def engine_of(groups: Groups, zero: int, *, sparse: bool = True) -> Engine:
    vlm = build(tiny.spec(), vocab_size=WORDS, seed=3, dtype=torch.float32)
    lora.add(vlm, LoraSpec(**LORA), sparse=sparse, seed=5)
    if sparse:
        upcycle(vlm, MoESpec(dispatcher="torch", expert_parallel=groups.expert_parallel), groups, seed=0)
    train_only(vlm, STAGES["moe" if sparse else "instruct"].parts(lora=True))
    spec = standin.spec(zero=zero, global_batch=4, optim={"clip": 1.0, "lr": 1e-2})
    return Engine(vlm, spec, groups, total_steps=6, moe=vlm.moe)


def batches(groups: Groups, step: int) -> list[dict[str, Tensor]]:
    each = 4 // groups.world
    lengths = [([11, 6], [1, 0]), ([5], [0]), ([9, 8, 14], [2, 1, 0]), ([7], [1])]
    mine = range(groups.rank * each, (groups.rank + 1) * each)
    return [tiny.batch(*lengths[place], seed=10 * step + place) for place in mine]


def run_folder(path: Path, stage: str) -> RunFolder:
    """A run of the models above."""
    path.mkdir(parents=True)
    facts = {"id": "r", "experiment": "e", "point": "", "stage": stage, "identity": "i", "code": "c"}
    (path / "run.json").write_text(json.dumps(facts))
    spec = {
        "stage": stage,
        "model": vars(tiny.spec()),
        "moe": {"expert_parallel": 2},
        "train": {"lora": LORA},
    }
    (path / "spec.json").write_text(json.dumps(spec))
    train_tokenizer(iter(["a cat"]), WORDS).save_pretrained(path / "tokenizer")
    return RunFolder(path)


def trained(expert_parallel: int, folder: Path, zero: int) -> tuple[Any, ...]:
    """Straight on, and from the checkpoint in its middle: what was reported, and the weights."""
    groups = Groups.create(expert_parallel)
    engine = engine_of(groups, zero)
    before = {name: p.detach().clone() for name, p in engine.vlm.named_parameters()}
    checkpoints, rows = Checkpoints(folder, groups), []
    for step in range(4):
        if step == 2:
            checkpoints.save(2, engine, {})
        rows.append(engine.train_step(batches(groups, step)))
    after = {name: p.detach().clone() for name, p in engine.vlm.named_parameters()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    again = engine_of(groups, zero)
    checkpoints.restore(Checkpoint(folder / "step_00000002", 2), again)
    resumed = [again.train_step(batches(groups, step)) for step in (2, 3)]
    same = all(torch.equal(after[name], p) for name, p in again.vlm.named_parameters())
    checkpoints.save(4, again, {})
    experts = {name: p.numpy() for name, p in after.items() if "lora_" in name}
    return rows, resumed, same, changed, experts


def elsewhere(path: Path) -> tuple[dict[str, Any], Tensor]:
    """The checkpoint in an engine of one rank: its state and logits."""
    groups = Groups.single()
    engine = engine_of(groups, 0)
    Checkpoints(path.parent, groups).restore(Checkpoint(path, 4), engine)
    state = {(f.name, f.kind): f.tensor.numpy().reshape(f.shape) for f in engine.fragments()}
    return state, engine.vlm.eval()(**tiny.batch([9], [1])).logits.detach().numpy()


def test_adapters_alone_train_on_two_ranks_and_are_restored_exactly_here_and_elsewhere(
    tmp_path: Path,
) -> None:
    tiny.model()  # what it imports, the ranks then need not
    path = run_folder(tmp_path / "run", "moe").checkpoints / "step_00000004"
    results = ranks(2)(trained, 2, path.parent, 2)
    for rows, resumed, same, changed, _ in results:
        assert resumed == rows[2:]  # dropout and all
        assert same
        assert rows[3]["ce"] < rows[0]["ce"]
        assert all("lora_" in n or n.startswith("projector.") or ".router." in n for n in changed)
        assert any(".experts.down_lora_b" in n for n in changed)
        assert any(".mlp.up_proj.lora_B." in n for n in changed)  # of the dense layers between
    [(state, logits)] = ranks(1, launcher=False)(elsewhere, path)
    for name, halves in ((name, [result[4][name] for result in results]) for name in results[0][4]):
        whole = np.concatenate(halves) if ".experts." in name else halves[0]
        assert np.array_equal(state[name, "master"], whole), name
    experts = "language.model.layers.0.mlp.experts.up"
    assert (f"{experts}_lora_a", "exp_avg") in state
    assert (experts, "exp_avg") not in state  # what is frozen costs its weights alone
    assert (experts, "frozen") in state
    opened, _ = open_checkpoint(path)  # merged
    assert opened.lora is None
    got = opened(**tiny.batch([9], [1])).logits.detach().numpy()
    np.testing.assert_allclose(got, logits, rtol=0, atol=1e-5)


@alone
def test_the_next_stage_starts_from_the_merged_weights(tmp_path: Path) -> None:
    parent = run_folder(tmp_path / "instruct", "instruct")
    engine = engine_of(ALONE, 2, sparse=False)
    for step in range(2):
        engine.train_step(batches(ALONE, step))
    saved = Checkpoints(parent.checkpoints, ALONE).save(2, engine, {})
    left = handoff.publish(parent, saved.path, parent=None)
    given = tiny.batch([9], [1])
    want = engine.vlm.eval()(**given).logits
    for rank in (0, 4):
        spec = ExperimentSpec(
            "moe",
            model=tiny.spec(),
            moe=MoESpec(dispatcher="torch"),
            train=TrainSpec(precision="fp32", lora=LoraSpec(rank=rank)),
        )
        vlm = _model(spec, WORDS, (parent, left), ALONE).eval()
        assert (vlm.lora is not None) == (rank > 0)
        torch.testing.assert_close(vlm(**given).logits, want, rtol=0, atol=1e-5)


def test_a_run_is_another_with_lora_and_the_stage_that_has_nothing_to_adapt_refuses_it() -> None:
    plain_one = plain(ExperimentSpec("instruct", init_from="x"))
    without = plain(ExperimentSpec("instruct", init_from="x", train=TrainSpec(lora=LoraSpec(alpha=8.0))))
    with_it = plain(ExperimentSpec("instruct", init_from="x", train=TrainSpec(lora=LoraSpec(rank=8))))
    assert identity_of(plain_one) == identity_of(without) != identity_of(with_it)
    align = ExperimentSpec("align", train=TrainSpec(lora=LoraSpec(rank=8)), data=DataSpec(template="plain"))
    [(field, words, _)] = align.check()
    assert field == "train.lora.rank"
    assert words == "stage align trains projector alone: there is nothing to adapt"
    spec = LoraSpec(rank=-1, alpha=-2.0, dropout=1.0, targets="mlp")
    assert [field for field, _, _ in spec.check()] == ["rank", "alpha", "dropout", "targets"]


# --- the reference's ---


def factors(state: dict[str, Tensor], names: tuple[str, ...], spell: str) -> dict[str, Tensor]:
    """LoRA factors of rank 3 for these weights, and in `state` the weights without what they add at scale 2."""
    draw = torch.Generator().manual_seed(0)
    found = {}
    for key in [key for key in state if key.endswith(names)]:
        rows, columns = state[key].shape
        a, b = (torch.randn(*shape, generator=draw) * 0.1 for shape in ((3, columns), (rows, 3)))
        state[key] = state[key] - 2.0 * b @ a
        for half, factor in (("A", a), ("B", b)):
            found[spell.format(key.removesuffix(".weight"), half)] = factor
    return found


def test_a_sparse_checkpoint_with_its_factors_in_it_reads_as_the_merged_one(tmp_path: Path) -> None:
    state = dict(load_file(STABLELM / "model.safetensors"))
    extra = factors(state, ("up_proj.weight", "down_proj.weight"), "{}.lora_{}.default.weight")
    assert any(EXPERT in key for key in extra)
    torch.save(state | extra, tmp_path / "pytorch_model.bin")
    config = json.loads((STABLELM / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InterchangeError, match=r"is a LoRA factor, but config\.json has no `lora`"):
        load_moe_llava(tmp_path, tower=TOWER)
    config["lora"] = {"lora_enable": True, "lora_r": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InterchangeError, match="`lora` has no lora_alpha and lora_r that give a scale"):
        load_moe_llava(tmp_path, tower=TOWER)
    config["lora"]["lora_alpha"] = 6
    (tmp_path / "config.json").write_text(json.dumps(config))
    same(load_moe_llava(tmp_path, tower=TOWER), load_moe_llava(STABLELM, tower=TOWER))


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_dense_checkpoint_of_adapters_reads_as_the_merged_one(tmp_path: Path, suffix: str) -> None:
    whole = dense(tmp_path / "whole")
    base, folder = tmp_path / "base", tmp_path / "lora"
    shutil.copytree(whole, base)
    folder.mkdir()
    shutil.copy(whole / "config.json", folder)
    [file] = base.glob("*.safetensors")
    state = dict(load_file(file))
    prefix = "base_model.model."
    extra = factors(state, ("q_proj.weight", "up_proj.weight"), prefix + "{}.lora_{}.weight")
    trained = {prefix + key: state[key] for key in state if ".mm_projector." in key}
    for key in trained:
        state[key.removeprefix(prefix)] = torch.zeros_like(trained[key])  # the base's is of before
    save_file(state, file)
    torch.save(trained, folder / "non_lora_trainables.bin")
    if suffix == "bin":
        torch.save(extra, folder / "adapter_model.bin")
    else:
        save_file(extra, folder / "adapter_model.safetensors")
    adapter: dict[str, Any] = {"r": 3, "lora_alpha": 6}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(
        InterchangeError, match=r"adapter_config\.json names none; give their folder as `language`"
    ):
        load_moe_llava(folder, tower=TOWER)
    same(load_moe_llava(folder, tower=TOWER, language=str(base)), load_moe_llava(whole, tower=TOWER))
    (folder / "adapter_config.json").write_text(json.dumps(adapter | {"use_dora": True}))
    with pytest.raises(InterchangeError, match=r"sets use_dora, which is not plain LoRA"):
        load_moe_llava(folder, tower=TOWER, language=str(base))
    adapter["base_model_name_or_path"] = "somewhere/base"  # found beside, by its last name
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    odd = f"{prefix}model.layers.9.mlp.up_proj.lora_A.weight"
    torch.save(extra | {odd: torch.zeros(3, 64)}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink(missing_ok=True)
    with pytest.raises(InterchangeError, match=r"1 pairs of LoRA factors find no weight, model\.layers\.9"):
        load_moe_llava(folder, tower=TOWER)


def same(one: VLM, other: VLM) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
