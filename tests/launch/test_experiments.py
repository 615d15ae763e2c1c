"""The experiment files: each reads, checks and plans as the reference was trained (MoE-LLaVA, scripts/v1)."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path

import pytest

from launch.plan import make
from launch.reader import Layers
from launch.spec import ExperimentSpec
from moe.backbones import LANGUAGE, VISION

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "experiments"
PARTS = {"backbones", "clusters", "towers"}
FILES = sorted(EXPERIMENTS.rglob("*.yaml"))
STAGES = [path for path in FILES if path.name.startswith("stage")]
FULL = [path for path in STAGES if path.parent.name != "demo"]
CHAINS = [path for path in FULL if path.name == "stage3_moe.yaml"]
CLUSTERS = sorted((EXPERIMENTS / "clusters").glob("*.yaml"))

# The reference's scripts: mixture, picture mode, grouping, learning rate, global batch, a GPU's batch.
REFERENCE = {
    "align": ("llava-pt", "square", "none", 1e-3, 256, 32),
    "instruct": ("hybrid-ft", "pad", "modality", 2e-5, 128, 8),
    "moe": ("llava-ft", "pad", "modality", 2e-5, 128, 8),
}


def name(path: Path) -> str:
    return path.relative_to(EXPERIMENTS).as_posix()


def load(path: Path, *overrides: str) -> ExperimentSpec:
    layers = Layers.read(path, overrides, presets={"cluster": EXPERIMENTS / "clusters"})
    layers.pop("sweep")
    return layers.build(ExperimentSpec)


def test_every_file_is_an_experiment_or_a_part_of_one() -> None:
    assert len(FULL) >= 18
    for path in FILES:
        assert path in STAGES or path.parent.name in PARTS or path.name == "base.yaml", name(path)


@pytest.mark.parametrize("path", STAGES, ids=name)
def test_an_experiment_reads_and_checks(path: Path) -> None:
    spec = load(path)
    assert path.stem.endswith(spec.stage)
    assert spec.accumulation >= 1


@pytest.mark.parametrize("path", FULL, ids=name)
def test_a_full_experiment_is_trained_as_in_the_reference(path: Path) -> None:
    spec = load(path)
    mix, aspect, group_by, lr, global_batch, micro_batch = REFERENCE[spec.stage]
    if spec.model.backbone == "openchat" and spec.stage != "align":
        micro_batch = 4
    data, train, optim = spec.data, spec.train, spec.train.optim
    assert (data.mix, data.aspect, data.group_by, data.max_length) == (mix, aspect, group_by, 2048)
    assert data.template == ("plain" if spec.stage == "align" else LANGUAGE[spec.model.backbone].template)
    assert (spec.gpus, train.global_batch, spec.micro_batch) == (8, global_batch, micro_batch)
    assert spec.accumulation * micro_batch * 8 == global_batch
    assert (train.epochs, train.steps, train.precision, train.zero, train.recompute) == (
        1,
        0,
        "bf16",
        2,
        True,
    )
    assert (optim.lr, optim.schedule, optim.warmup, optim.weight_decay, optim.clip) == (
        lr,
        "cosine",
        0.03,
        0,
        0,
    )
    assert (optim.betas, optim.eps, optim.projector_lr) == ((0.9, 0.999), 1e-8, 0)
    assert (spec.seed, spec.model.projector, spec.model.random) == (42, "mlp2x_gelu", False)
    moe = spec.moe
    assert (moe.experts, moe.top_k, moe.layers, moe.capacity_factor) == (4, 2, "sparse", 1.5)
    assert (moe.aux_loss, moe.residual) == (0.01, False)


@pytest.mark.parametrize("path", CHAINS, ids=name)
def test_a_chain_keeps_its_model_from_stage_to_stage(path: Path) -> None:
    runs = [run for stage in make(path).stages for run in stage.runs]
    folder = name(path).rpartition("/")[0]
    assert [run.spec.stage for run in runs] == ["align", "instruct", "moe"]
    assert runs[0].spec.model == runs[1].spec.model == runs[2].spec.model
    assert {run.experiment.rpartition("/")[0] for run in runs} == {folder}
    if folder:
        backbone, _, size = folder.partition("_")
        assert runs[0].spec.model.backbone == backbone
        assert VISION[runs[0].spec.model.tower].size == int(size or 336)


@pytest.mark.parametrize("path", sorted((EXPERIMENTS / "backbones").glob("*.yaml")), ids=name)
def test_a_backbone_s_file_fits_its_row(path: Path) -> None:
    spec = load(EXPERIMENTS / "stage2_instruct.yaml", f"model.backbone={path.stem}")
    assert spec.model.backbone in LANGUAGE
    text = path.read_text()
    assert f"model: {{backbone: {path.stem}}}" in text
    assert f"data: {{template: {LANGUAGE[path.stem].template}}}" in text


@pytest.mark.parametrize("path", CLUSTERS, ids=name)
def test_the_whole_chain_moves_to_any_cluster(path: Path) -> None:
    # The local one has two ranks; the demo is made for it.
    start = EXPERIMENTS / ("demo/stage3_moe.yaml" if path.stem == "local" else "stage3_moe.yaml")
    for stage in make(start, [f"cluster={path.stem}"]).stages:
        for run in stage.runs:
            assert run.spec.cluster.name == path.stem
            assert run.spec.cluster.executor == ("local" if path.stem.startswith("local") else "slurm")


def test_there_are_clusters_with_and_without_slurm() -> None:
    names = {path.stem for path in CLUSTERS}
    assert {"local", "h100", "a100"} <= names


@pytest.mark.parametrize("path", STAGES, ids=name)
def test_an_experiment_opens_with_what_it_trains_and_a_full_one_with_cost_expectation_and_command(
    path: Path,
) -> None:
    head = re.match(r"(#.*\n)+", path.read_text())
    assert head
    if path in FULL:
        assert re.search(r"# Cost    \S", head[0])
        assert re.search(r"# Expect  \S", head[0])
        assert f"#   python launch/submit.py experiments/{name(path)}" in head[0]


@pytest.mark.parametrize("path", FULL, ids=name)
def test_each_command_in_a_head_comment_can_be_planned(path: Path) -> None:
    for line in re.findall(r"(?m)^#   python launch/submit.py (.*)$", path.read_text()):
        spec, *overrides = shlex.split(line, comments=True)
        assert make(ROOT / spec, overrides, first="moe" if "stage3" in spec else "").stages


@pytest.mark.parametrize("path", FILES, ids=name)
def test_lines_are_short_and_end_without_blanks(path: Path) -> None:
    for line in path.read_text().splitlines():
        assert len(line) <= 120
        assert line == line.rstrip()


def test_reading_an_experiment_takes_less_than_fifty_milliseconds() -> None:
    times = []
    for _ in range(5):
        start = time.process_time()
        load(EXPERIMENTS / "phi2" / "stage3_moe.yaml", "seed=7")
        times.append(time.process_time() - start)
    assert min(times) < 0.05
