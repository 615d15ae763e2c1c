"""Our sections through the reader: forty mistakes a user makes, and each thing a section says of itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.reader import Layers, SpecError
from launch.spec import Duration, ExperimentSpec

SOUND = """\
inherits: base.yaml
stage: moe
cluster: h100
gpus: 16
init_from: stage2
seed: 7

model:
  backbone: phi2
  tower: clip-l-336
  projector: mlp2x_gelu

data:
  mix: {llava-mix-image: 0.7, docs.json: 0.3}
  template: phi
  aspect: pad
  max_length: 2048

moe:
  experts: 4
  top_k: 2
  layers: sparse
  capacity_factor: 1.5
  expert_parallel: 2
  dispatcher: tutel

train:
  steps: 5_000
  global_batch: 128
  micro_batch: 4
  zero: 2
  recompute: true
  optim:
    lr: 2e-5
    betas: [0.9, 0.95]
    warmup: 0.03

wandb:
  mode: auto
  tags: [moe, phi2]
"""

# What is written instead of what, then what the fault, in the line that was changed, and its hint say.
MISTAKES = [
    ("stage: moe", "stage: moes", "'moes' is none of align, instruct, moe", "did you mean 'moe'?"),
    ("stage: moe", "stages: moe", "stages: no such setting", "did you mean 'stage'?"),
    ("stage: moe", "Stage: moe", "Stage: no such setting", "did you mean 'stage'?"),
    (
        "inherits: base.yaml",
        "inherits: bse.yaml",
        "inherits bse.yaml, which is not a file",
        "did you mean base.yaml?",
    ),
    ("inherits: base.yaml", "inherit: base.yaml", "inherit: no such setting", "did you mean 'inherits'?"),
    ("cluster: h100", "cluster: h10", "cluster: no preset 'h10'", "did you mean 'h100'?"),
    ("cluster: h100", "cluster: H100", "cluster: no preset 'H100'", "did you mean 'h100'?"),
    ("cluster: h100", "clusters: h100", "clusters: no such setting", "did you mean 'cluster'?"),
    (
        "cluster: h100",
        "cluster: {partiton: gpu}",
        "cluster.partiton: no such setting",
        "did you mean 'partition'?",
    ),
    ("cluster: h100", "cluster: {time: 2d}", "cluster.time: no such setting", "did you mean 'walltime'?"),
    (
        "cluster: h100",
        "cluster: {walltime: 24}",
        "expected a duration such as 10m, 24h or 1-00:00:00, got '24'",
        "",
    ),
    ("gpus: 16", "gpus: 30", "gpus (30) does not fill nodes of 8 (h100)", "say 24 or 32"),
    ("gpus: 16", "gpus: 1_6.0", "expected a whole number, got '1_6.0'", "write 16"),
    ("gpus: 16", "num_gpus: 16", "num_gpus: no such setting", "did you mean 'gpus'?"),
    ("init_from: stage2", "init-from: stage2", "init-from: no such setting", "did you mean 'init_from'?"),
    ("seed: 7", "seed: 7\nseed: 8", "seed: said twice, first in line 6", "keep one"),
    ("seed: 7", "\tseed: 7", "a tab; YAML indents with spaces", "replace the tab by spaces"),
    ("seed: 7", "seed 7", "expected `key: value`", "write a colon and a space"),
    ("seed: 7", "lr: 1e-4", "lr: no such setting", "did you mean 'train.optim.lr'?"),
    ("backbone: phi2", "backbone: phi-2", "'phi-2' is none of", "did you mean 'phi2'?"),
    ("tower: clip-l-336", "tower: clip-336", "'clip-336' is none of", "did you mean 'clip-l-336'?"),
    ("mlp2x_gelu", "mlp_gelu", "'mlp_gelu' is neither linear nor mlpNx_gelu", "say mlp2x_gelu"),
    (
        "llava-mix-image: 0.7",
        "llava-mix-images: 0.7",
        "'llava-mix-images' is none of",
        "did you mean 'llava-mix-image'?",
    ),
    ("docs.json: 0.3", "docs.json: 30%", "expected a number, got '30%'", "write 0.3"),
    ("template: phi", "template: phi2", "'phi2' is none of", "did you mean 'phi'?"),
    ("aspect: pad", "aspect: padded", "'padded' is none of square, pad", "did you mean 'pad'?"),
    ("max_length: 2048", "maxLength: 2048", "data.maxLength: no such setting", "did you mean 'max_length'?"),
    ("  top_k: 2", "  topk: 2", "moe.topk: no such setting", "did you mean 'top_k'?"),
    ("  top_k: 2", "  top_k: 8", "moe.top_k (8) is more than experts (4)", "at most 4"),
    ("  top_k: 2", " top_k: 2", "this does not line up", "indent siblings alike"),
    ("layers: sparse", "layers: sparce", "'sparce' is none of first_half", "did you mean 'sparse'?"),
    ("capacity_factor", "capacity", "moe.capacity: no such setting", "did you mean 'capacity_factor'?"),
    ("expert_parallel: 2", "ep_size: 2", "moe.ep_size: no such setting", "expert_parallel"),
    (
        "dispatcher: tutel",
        "dispatcher: tutle",
        "'tutle' is none of auto, tutel, torch",
        "did you mean 'tutel'?",
    ),
    ("steps: 5_000", "steps: 5e3", "expected a whole number, got '5e3'", "write 5000"),
    ("global_batch: 128", "batch_size: 128", "train.batch_size: no such setting", "_batch"),
    (
        "global_batch: 128",
        "global_batch: 100",
        "train.global_batch (100) is no multiple of gpus (16)",
        "say 96 or 112",
    ),
    ("recompute: true", "recompute: yes", "expected true or false, got 'yes'", "write true"),
    ("    lr: 2e-5", "    learning_rate: 2e-5", "learning_rate: no such setting", "did you mean 'lr'?"),
    ("    lr: 2e-5", "    lr: 2e-5,", "expected a number, got '2e-5,'", "write 2e-5"),
    ("betas: [0.9, 0.95]", "betas: 0.9", "train.optim.betas: expected a list of 2 numbers, got '0.9'", ""),
    ("tags: [moe, phi2]", "tags: moe", "expected a list of texts, got 'moe'", "write [moe]"),
    ("tags: [moe, phi2]", "tags: [moe, phi2", "this [ is not closed", ""),
    (
        "mode: auto",
        "mode: ofline",
        "'ofline' is none of auto, online, offline, disabled",
        "did you mean 'offline'?",
    ),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("runs: runs\ntrain:\n  save_every: 100\n  global_batch: 128\n")
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters/h100.yaml").write_text("gpus_per_node: 8\npartition: h100\n")
    return tmp_path


def load(text: str, *overrides: str) -> ExperimentSpec:
    Path("x.yaml").write_text(text)
    return Layers.read(Path("x.yaml"), overrides, presets={"cluster": Path("clusters")}).build(ExperimentSpec)


def faults(text: str, *overrides: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load(text, *overrides)
    return [str(fault) for fault in caught.value.faults]


def test_what_is_written_is_what_is_read() -> None:
    spec = load(SOUND)
    assert (spec.stage, spec.gpus, spec.nodes, spec.ranks_per_node, spec.accumulation) == ("moe", 16, 2, 8, 2)
    assert (spec.cluster.name, spec.cluster.partition, spec.cluster.walltime) == ("h100", "h100", 86400)
    assert spec.data.mix == {"llava-mix-image": 0.7, "docs.json": 0.3}
    assert (spec.train.steps, spec.train.save_every, spec.train.recompute) == (5000, 100, True)
    assert (spec.train.optim.lr, spec.train.optim.betas) == (2e-5, (0.9, 0.95))
    assert (spec.wandb.tags, spec.moe.experts) == (("moe", "phi2"), 4)


def test_there_are_forty_mistakes() -> None:
    assert len(MISTAKES) >= 40


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"), MISTAKES, ids=[row[1].strip() for row in MISTAKES]
)
def test_a_mistake_is_found_where_it_was_made_and_the_hint_mends_it(
    old: str, new: str, message: str, hint: str
) -> None:
    assert SOUND.count(old) == 1
    text = SOUND.replace(old, new)
    line = SOUND[: SOUND.index(old)].count("\n") + 1 + new.count("\n")
    first, *more = faults(text)
    # A wrong number of GPUs is also wrong for the batch; every other mistake is told once.
    assert not more or old == "gpus: 16"
    assert re.match(rf"x\.yaml:{line}:\d+: error: ", first)
    assert message in first
    assert f"hint: {hint}" in first if hint.startswith(("did", "write", "say")) else hint in first


TOGETHER = (
    *(
        "stage: moes",
        "cluster: h10",
        "num_gpus: 16",
        "init-from: stage2",
        "seed: 7\nseed: 8",
        "backbone: phi-2",
    ),
    *(
        "tower: clip-336",
        "mlp_gelu",
        "docs.json: 30%",
        "aspect: padded",
        "  topk: 2",
        "capacity",
        "ep_size: 2",
    ),
    *("dispatcher: tutle", "steps: 5e3", "batch_size: 128", "recompute: yes", "    learning_rate: 2e-5"),
    *("betas: 0.9", "mode: ofline", "tags: moe"),
)


def test_twenty_one_mistakes_of_one_file_are_told_in_one_pass_in_file_order() -> None:
    rows = [row for row in MISTAKES if row[1] in TOGETHER]
    text = SOUND
    for old, new, _, _ in rows:
        text = text.replace(old, new)
    found = faults(text)
    assert len(rows) == len(TOGETHER) == len(found) == 21
    for _, _, message, hint in rows:
        assert any(message in fault and hint in fault for fault in found), message
    lines = [int(fault.split(":")[1]) for fault in found]
    assert lines == sorted(lines)


def test_the_house_s_example_to_the_letter() -> None:
    Path("base.yaml").write_text("data: {mix: llava-ft}\ninit_from: stage2\n")
    text = """\
inherits: base.yaml
stage: moes
gpus: 8


data:
  mix: {llava-665k: lots}

moe:
  experts: 4
  topk: 2

train:
  steps: 10

  optim: {lr: fast}
"""
    with pytest.raises(SpecError) as caught:
        load(text)
    assert str(caught.value) == (
        """\
x.yaml:2:8: error: stage: 'moes' is none of align, instruct, moe
    2 | stage: moes
      |        ^
      = hint: did you mean 'moe'?
x.yaml:7:21: error: data.mix.llava-665k: expected a number, got 'lots'
    7 |   mix: {llava-665k: lots}
      |                     ^
x.yaml:11:3: error: moe.topk: no such setting
   11 |   topk: 2
      |   ^
      = hint: did you mean 'top_k'?
x.yaml:16:15: error: train.optim.lr: expected a number, got 'fast'
   16 |   optim: {lr: fast}
      |               ^"""
    )


def test_a_fault_of_an_inherited_value_points_into_the_file_that_set_it() -> None:
    text = (
        "inherits: base.yaml\nstage: align\ngpus: 30\ncluster: h100\ndata: {mix: llava-pt, template: plain}\n"
    )
    first, second = faults(text)
    assert first.startswith("x.yaml:3:7: error: gpus (30) does not fill nodes of 8 (h100)\n")
    assert second.startswith(
        "base.yaml:4:17: error: train.global_batch (128) is no multiple of gpus (30)\n"
        "    4 |   global_batch: 128\n"
    )


@pytest.mark.parametrize(
    ("gpus", "micro_batch", "accumulation"),
    [(8, 8, 2), (16, 8, 1), (32, 4, 1), (64, 2, 1), (128, 1, 1)],
)
def test_more_gpus_take_smaller_micro_batches(gpus: int, micro_batch: int, accumulation: int) -> None:
    spec = load(ALIGN, f"gpus={gpus}", "train={global_batch: 128, micro_batch: 8}")
    assert (spec.micro_batch, spec.accumulation) == (micro_batch, accumulation)


def test_a_micro_batch_is_the_most_that_divides_a_ranks_share() -> None:
    spec = load(ALIGN, "gpus=8", "train={global_batch: 96, micro_batch: 8}")  # 12 a rank
    assert (spec.micro_batch, spec.accumulation) == (6, 2)


# What each section says of itself, and what only the sections together know.
ALIGN = "stage: align\ndata: {mix: llava-pt, template: plain}\n"
COMPLAINTS = [
    ("cluster={gpus_per_node: 0}", "cluster.gpus_per_node: 0: a node needs at least one rank"),
    ("cluster={walltime: 30s}", "cluster.walltime: 30s is under a minute, SLURM's least"),
    ("cluster={walltime: 15m}", "cluster.grace (10m) is more than half of walltime (15m)"),
    (
        "cluster={hang_after: 30s}",
        "cluster.hang_after: 30s is under a minute: SLURM takes as long to end the ranks",
    ),
    (
        "cluster={lifeline: 30s}",
        "cluster.lifeline: 30s is under a minute, as long as SLURM takes to start it",
    ),
    ("train={diverged_after: -1}", "train.diverged_after: -1 is below 0"),
    ("cluster={cpus_per_gpu: 0}", "cluster.cpus_per_gpu: 0: a rank needs at least one CPU"),
    ("cluster={mem_gb_per_gpu: -1}", "cluster.mem_gb_per_gpu: -1.0 is below 0"),
    ("cluster={array_parallelism: -1}", "cluster.array_parallelism: -1 is below 0"),
    ("cluster={partition: a b}", "cluster.partition: 'a b' has characters that no SLURM name has"),
    ('cluster={setup: ["a\\nb"]}', "cluster.setup: a setup line has a line break in it"),
    ("cluster={executor: local, gpus_per_node: 4}", "gpus (8) is more than the 4 ranks of this one machine"),
    ("name=../x", "name: '../x' cannot name a folder of runs"),
    ("seed=-1", "seed: -1: NumPy takes seeds from 0 to 4294967295"),
    ("seed=4294967296", "seed: 4294967296: NumPy takes seeds"),
    ("runs=", "runs: names no folder"),
    ("gpus=0", "gpus: 0: a run needs at least one rank"),
    ("gpus=256", "train.global_batch (128) is no multiple of gpus (256)"),
    ("stage=instruct", "init_from: stage instruct starts from the handoff of stage align"),
    ("init_from=x", "init_from: stage align starts from the backbone's own weights"),
    ("data.template=v1", "data.template: stage align is trained with the template plain"),
    ("data.template=vv1", "data.template: 'vv1' is none of plain, phi"),
    ("data.mix=''", "data.mix: names no data"),
    ("data.mix=lava-pt", "data.mix: 'lava-pt' is none of llava-pt, hybrid-ft"),
    ("data.mix={nlp: 0}", "data.mix.nlp: weight 0.0 is not above 0"),
    ("data.mix={nlp: 665298}", "data.mix.nlp: weight 665298.0: so often each of its samples would come"),
    ("data.mix={nlpp: 1}", "data.mix.nlpp: 'nlpp' is none of llava-pt"),
    ("data.max_length=1", "data.max_length: 1: a sequence needs at least 2 tokens"),
    ("data.pack_length=8192", "data.pack_length: nothing is packed"),
    ("data={packing: true, pack_length: 1024}", "data.pack_length: 1024 is under max_length (2048)"),
    ("data.workers=-1", "data.workers: -1 is below 0"),
    ("data.bad_samples=-1", "data.bad_samples: -1 is below 0"),
    ("model.backbone=gpt", "model.backbone: 'gpt' is none of phi2, stablelm"),
    ("model.tower=vit", "model.tower: 'vit' is none of clip-l-336"),
    ("model.projector=mlp0x_gelu", "model.projector: 'mlp0x_gelu' is neither linear nor mlpNx_gelu"),
    (
        "model.tokenizer=train:many",
        "model.tokenizer: 'train:many': expected a number of tokens after 'train:'",
    ),
    (
        "model={tokenizer: train:512, config: {vocab_size: 9}}",
        "model.config: vocab_size is the trained tokenizer's",
    ),
    ("moe.experts=0", "moe.experts: 0: a layer needs at least one expert"),
    ("moe.experts=[]", "moe.experts: (): a layer needs at least one expert"),
    ("moe.top_k=0", "moe.top_k: 0: a token needs at least one expert"),
    ("moe.experts=[4, 1]", "moe.top_k (2) is more than experts (1)"),
    ("moe.expert_parallel=0", "moe.expert_parallel: 0: at least one rank holds the experts"),
    ("moe.expert_parallel=3", "moe.experts (4) must be a multiple of expert_parallel (3)"),
    ("moe.layers=odd", "moe.layers: 'odd' is none of first_half, second_half, sparse, dense"),
    ("moe.aux_loss=-1", "moe.aux_loss: -1.0 is below 0"),
    ("moe={noise: gumbel, top_k: 1}", "moe.noise: gumbel noise is defined for the second of two choices"),
    ("train.micro_batch=0", "train.micro_batch: 0: at least 1"),
    ("train.steps=-1", "train.steps: -1 is below 0"),
    ("train.epochs=0", "train.epochs: 0.0: neither steps nor epochs say how long to train"),
    ("train.zero=4", "train.zero: 4 is none of 0, 1, 2, 3"),
    ("train={zero: 0, offload: true}", "train.offload: the optimizer is offloaded by ZeRO 1 to 3; zero is 0"),
    ("train.optim.lr=0", "train.optim.lr: 0.0 is not above 0"),
    ("train.optim.projector_lr=-1", "train.optim.projector_lr: -1.0 is below 0"),
    ("train.optim.eps=0", "train.optim.eps: 0.0 is not above 0"),
    ("train.optim.warmup=3", "train.optim.warmup: 3.0 is no fraction of the steps"),
    ("train.optim.clip=-1", "train.optim.clip: -1.0 is below 0"),
    ("train.optim.betas=[0.9, 1]", "train.optim.betas: (0.9, 1.0): each must be in [0, 1)"),
]


@pytest.mark.parametrize(("override", "message"), COMPLAINTS, ids=[row[0] for row in COMPLAINTS])
def test_each_complaint_of_a_section_is_told_with_its_path(override: str, message: str) -> None:
    found = faults(ALIGN, override)
    assert any(f"error: {message}" in fault for fault in found), "\n".join(found)


def test_a_sound_section_complains_though_another_is_unsound() -> None:
    found = faults(ALIGN, "train.zero=7", "train.optim.lr=fast", "seed=x")
    assert [fault.split("error: ")[1].split("\n")[0] for fault in found] == [
        "train.zero: 7 is none of 0, 1, 2, 3",
        "train.optim.lr: expected a number, got 'fast'",
        "seed: expected a whole number, got 'x'",
    ]


def test_what_the_sections_know_together_is_asked_only_when_each_is_sound() -> None:
    assert len(faults(ALIGN, "gpus=30", "cluster=h100")) == 2
    assert len(faults(ALIGN, "gpus=30", "cluster=h100", "train.zero=7")) == 1


def test_flash_attention_is_refused_where_it_cannot_run_or_would_train_another_model() -> None:
    sparse = "stage: moe\ninit_from: x\ncluster: h100\ndata: {mix: llava-ft, template: phi}\n"
    flash, rules = "model.attention=flash", "moe.rules=moe_llava"
    (fault,) = faults(ALIGN, flash, "train.precision=fp32")
    assert "error: model.attention: flash attention takes bf16, and train.precision is fp32" in fault
    (fault,) = faults(sparse, flash, rules)
    assert "error: model.attention: flash attention makes zeros of padding" in fault
    assert load(ALIGN, flash, rules).model.attention == "flash"  # align has no experts
    assert load(sparse, rules).moe.rules == "moe_llava"


@pytest.mark.parametrize("zero", ["expert_parallel", "zero"])
def test_expert_parallelism_must_fit_the_ranks(zero: str) -> None:
    sparse = "stage: moe\ninit_from: x\ncluster: h100\ndata: {mix: llava-ft, template: phi}\n"
    if zero == "zero":
        (fault,) = faults(sparse, "moe.expert_parallel=2", "train.zero=3")
        assert "train.zero: DeepSpeed's ZeRO-3 has no expert parallelism" in fault
        return
    (fault,) = faults(sparse, "moe={experts: 6, expert_parallel: 3}")
    assert "<command line>:1:35: error: moe.expert_parallel (3) must divide gpus (8)" in fault
    assert "hint: it may be 1, 2\n" in fault + "\n"


@pytest.mark.parametrize(
    ("text", "seconds", "again"),
    [
        ("90s", 90, "90s"),
        ("10m", 600, "10m"),
        ("24h", 86400, "1d"),
        ("1.5h", 5400, "90m"),
        ("2d", 172800, "2d"),
        ("1-00:30:00", 88200, "1470m"),
        ("00:00:05", 5, "5s"),
    ],
)
def test_a_duration_is_read_and_written(text: str, seconds: int, again: str) -> None:
    assert Duration.parse(text) == seconds
    assert str(Duration(seconds)) == again
    assert Duration.parse(again) == seconds


@pytest.mark.parametrize("text", ["24", "", "ten", "10 min", "1:30", "-5m", "9999999999d"])
def test_what_is_no_duration_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected a duration such as 10m, 24h or 1-00:00:00, got"):
        Duration.parse(text)
