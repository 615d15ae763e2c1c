"""The plan: points, parents, identities, and what a command line may change where."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from launch import identity
from launch.conflicts import clashes
from launch.files import write_json
from launch.identity import plain
from launch.plan import make
from launch.reader import SpecError
from tests.launch import chain

SWEEP = "sweep: {train.optim.lr: [1e-5, 2e-5]}\n"


def test_the_chain_is_found_from_its_last_experiment(tmp_path: Path) -> None:
    plan = make(chain.write(tmp_path))
    assert [stage.spec.stage for stage in plan.stages] == ["align", "instruct", "moe"]
    one, two, three = (stage.runs[0] for stage in plan.stages)
    assert (one.parent, two.parent, three.parent) == (None, one, two)
    assert three.folder.path == tmp_path / "runs" / "s3" / "run"


def test_all_points_start_from_the_only_run_above(tmp_path: Path) -> None:
    plan = make(chain.write(tmp_path, sweep3=SWEEP))
    assert [run.point for run in plan.stages[2].runs] == ["lr=1e-5", "lr=2e-5"]
    assert all(run.parent is plan.stages[1].runs[0] for run in plan.stages[2].runs)
    assert plan.stages[2].runs[1].spec.train.optim.lr == 2e-5


def test_equal_sweeps_are_matched_point_by_point(tmp_path: Path) -> None:
    plan = make(chain.write(tmp_path, sweep2=SWEEP, sweep3=SWEEP))
    assert [run.parent for run in plan.stages[2].runs] == list(plan.stages[1].runs)


def test_a_point_is_read_as_if_it_were_written_out(tmp_path: Path) -> None:
    """The points share what they have in common; what is wrong with one is told in the same words."""
    axes = (
        "train.optim.lr: [1e-5, 2e-5], moe.top_k: [1, 2], data.mix: [{a.json: 1}, {a.json: 1.0, b.json: 2}]"
    )
    swept = make(chain.write(tmp_path, sweep3=f"sweep: {{{axes}}}\n")).stages[2].runs
    chain.write(tmp_path)
    values = product(("1e-5", "2e-5"), ("1", "2"), ("{a.json: 1}", "{a.json: 1.0, b.json: 2}"))
    for run, (lr, k, mix) in zip(swept, values, strict=True):
        [alone] = (
            make(tmp_path / "s3.yaml", [f"train.optim.lr={lr}", f"moe.top_k={k}", f"data.mix={mix}"])
            .stages[2]
            .runs
        )
        assert (run.spec, run.identity) == (alone.spec, alone.identity)
        assert json.dumps(run.settings) == json.dumps(alone.settings)
    for axis, value in (
        ("moe.expert_parallel", "3"),
        ("moe.top_k", "99"),
        ("train.steps", "x"),
        ("wandb.entity", "hf_" + "x" * 20),
    ):
        with pytest.raises(SpecError) as alone_fails:
            make(chain.write(tmp_path), [f"{axis}={value}"])
        good = {"moe.expert_parallel": "1", "moe.top_k": "1", "train.steps": "5"}.get(axis, "me")
        with pytest.raises(SpecError) as fails:
            make(chain.write(tmp_path, sweep3=f"sweep: {{{axis}: [{good}, {value}]}}\n"))
        messages = [[fault.message for fault in caught.value.faults] for caught in (alone_fails, fails)]
        assert messages[0] == messages[1]


def test_a_sweep_above_with_other_points_is_a_fault_with_a_way_out(tmp_path: Path) -> None:
    file = chain.write(tmp_path, sweep2=SWEEP)
    with pytest.raises(SpecError) as caught:
        make(file)
    text = str(caught.value)
    assert "s3.yaml:3:" in text
    assert "s2 has 2 runs, and none at the point (no sweep)" in text
    assert "init_from: s2/lr=1e-5" in text
    plan = make(file, ["init_from=s2/lr=2e-5"])
    assert plan.stages[2].runs[0].parent is plan.stages[1].runs[1]


def test_identity_is_what_decides_weights(tmp_path: Path) -> None:
    file = chain.write(tmp_path)
    plan = make(file)
    identities = [stage.runs[0].identity for stage in plan.stages]
    moved = make(file, ["gpus=2", "cluster.partition=other", "wandb.project=x", "train.micro_batch=1"])
    assert [stage.runs[0].identity for stage in moved.stages] == identities
    changed = make(file, ["train.optim.lr=1e-3"])
    assert [stage.runs[0].identity for stage in changed.stages][:2] == identities[:2]
    assert changed.stages[2].runs[0].identity != identities[2]
    # What changes a parent changes what starts from it.
    above = make(file, ["s1:train.optim.lr=1e-3"])
    assert not set(identities) & {stage.runs[0].identity for stage in above.stages}
    # A dense stage does not care about experts in a file that all stages inherit.
    sparse = make(file, ["s2:moe.experts=8"])
    assert sparse.stages[1].runs[0].identity == identities[1]


def test_a_setting_of_a_later_version_leaves_earlier_runs_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = chain.write(tmp_path)
    run = make(file).stages[2].runs[0]
    told = json.loads(json.dumps(run.settings))
    assert told["data"].pop("pack_length") == 0  # as if this version had brought it
    write_json(run.folder.spec_file, told)
    write_json(run.folder.run_file, run.record("code"))
    assert not list(clashes(make(file)))
    (fault,) = clashes(make(file, ["data.packing=true", "data.pack_length=4096"]))
    assert "data.pack_length was 0, is 4096; data.packing was false, is true" in fault.message
    # A default that is written out is the same run, and so is each run when the next version has one more setting.
    assert make(file, ["data.max_length=2048"]).stages[2].runs[0].identity == run.identity
    defaults = identity._defaults()
    monkeypatch.setattr(identity, "_defaults", lambda: {**defaults, "data.newer": 0})
    assert make(file).stages[2].runs[0].identity == run.identity


def test_ids_are_stable_short_and_safe(tmp_path: Path) -> None:
    file = chain.write(
        tmp_path, sweep3="sweep: {train.optim.lr: [1e-5], moe.aux_loss: [0.01], seed: [1, 2]}\n"
    )
    runs = make(file).stages[2].runs
    assert [run.id for run in runs] == [run.id for run in make(file).stages[2].runs]
    assert all(len(run.id) <= 64 and "/" not in run.id for run in runs)
    assert len({run.id for run in runs}) == 2


@pytest.mark.parametrize(
    ("first", "last", "stages", "earlier"),
    [
        ("", "", ["s1", "s2", "s3"], []),
        ("instruct", "", ["s2", "s3"], ["s1"]),
        ("", "s2", ["s1", "s2"], []),
        ("moe", "moe", ["s3"], ["s1", "s2"]),
    ],
)
def test_the_chain_can_be_cut(
    tmp_path: Path, first: str, last: str, stages: list[str], earlier: list[str]
) -> None:
    plan = make(chain.write(tmp_path), first=first, last=last)
    assert [stage.experiment.name for stage in plan.stages] == stages
    assert [stage.experiment.name for stage in plan.earlier] == earlier


@pytest.mark.parametrize(
    ("edit", "overrides", "words"),
    [
        (("s3.yaml", "init_from: s2", "init_from: s22"), [], "'s22' names no experiment"),
        (
            ("s3.yaml", "init_from: s2", "init_from: s1"),
            [],
            "stage moe starts from stage instruct, and s1 is stage align",
        ),
        (("s1.yaml", "stage: align", "stage: instruct\ninit_from: s2"), [], "starts from itself"),
        (("s3.yaml", "", ""), ["elsewhere:seed=3"], "elsewhere: no experiment of this chain"),
        (("s3.yaml", "", ""), ["sweep={gpus: [4, 8]}"], "sweep.gpus: the runs of one array share their gpus"),
        (("s3.yaml", "", ""), ["sweep={moe.topk: [1, 2]}"], "moe.topk: no such setting"),
        (("s3.yaml", "", ""), ["init_from=s2/lr=9"], "s2 has no run 'lr=9'"),
    ],
)
def test_faults_of_a_chain(
    tmp_path: Path, edit: tuple[str, str, str], overrides: list[str], words: str
) -> None:
    file = chain.write(tmp_path)
    path = tmp_path / edit[0]
    text = path.read_text().replace(edit[1], edit[2], 1) if edit[1] else path.read_text()
    if "starts from itself" in words:
        text = text.replace("data: {template: plain}\n", "")
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        make(file, overrides)
    assert words in str(caught.value)


def test_a_folder_that_holds_another_run_is_refused_with_what_changed(tmp_path: Path) -> None:
    file = chain.write(tmp_path)
    for stage in make(file).stages:
        for run in stage.runs:
            write_json(run.folder.spec_file, plain(run.spec))
            write_json(run.folder.run_file, run.record("code"))
    assert not list(clashes(make(file)))
    [fault] = clashes(make(file, ["train.optim.lr=1e-3"]))
    assert "train.optim.lr was 2e-05, is 0.001" in fault.message
    assert "name=s3_2" in fault.hint
    faults = list(clashes(make(file, ["s2:seed=1"])))
    assert [
        "seed was 0, is 1" in faults[0].message,
        "the run it starts from is another" in faults[1].message,
    ] == [True] * 2
    assert not list(clashes(make(file, ["train.optim.lr=1e-3", "name=s3_2"])))
