"""A step is the same mathematics on any layout: against a plain loop in one process."""

import math

import numpy as np
import pytest
import torch
import transformers

from moe.engine import DivergedError, Engine, EngineError
from moe.optim import parameter_groups, rate, undecayed
from moe.parallel import Groups
from moe.spec import OptimSpec
from tests.moe import standin
from tests.ranks import alone, ranks

STEPS = 4


def plain_loop(clip=0.0, decay=0.0, silent=()):
    """The reference: one process, the global batch at once, torch's AdamW."""
    groups = Groups.single()
    model = standin.Model(groups)
    spec = standin.spec(optim={"clip": clip, "weight_decay": decay}).optim
    plain = undecayed(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    adam = torch.optim.AdamW(
        [
            {"params": [p for name, p in named if name not in plain], "weight_decay": decay},
            {"params": [p for name, p in named if name in plain], "weight_decay": 0.0},
        ],
        lr=spec.lr,
    )
    trained = [p for _, p in named]
    seen = []
    for step, (whole,) in zip(
        range(STEPS), standin.Loader(groups, micro=8, silent=silent).steps(), strict=False
    ):
        for group in adam.param_groups:
            group["lr"] = spec.lr * rate(spec, step, 10)
        output = model(**whole)
        tokens = int(output.tokens)
        if tokens == 0:
            seen.append({"loss": 0.0, "grad_norm": 0.0, "tokens": 0})
            continue
        # The balancing loss of a step is the mean over micro-batches, here of one sentence each.
        router = torch.stack(
            [model(**{n: t[i : i + 1] for n, t in whole.items()}).router_loss for i in range(8)]
        ).mean()
        loss = output.ce_sum / tokens + router
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip or math.inf)
        adam.step()
        adam.zero_grad()
        counts = [layer.tolist() for layer in output.expert_counts]
        seen.append(
            {"loss": float(loss.detach()), "grad_norm": float(norm), "tokens": tokens, "counts": counts}
        )
    return seen, {name: p.detach().numpy() for name, p in model.named_parameters()}


def train(expert_parallel, stages, **options):
    """Every ZeRO stage in turn on these ranks; what each saw, and this rank's weights after."""
    groups = Groups.create(expert_parallel)
    runs = []
    for zero in stages:
        settings = dict(options)
        silent = settings.pop("silent", ())
        model = standin.Model(groups)
        engine = Engine(model, standin.spec(zero=zero, **settings), groups, total_steps=10)
        batches = standin.Loader(groups, silent=silent).steps()
        seen = [engine.train_step(next(batches)) for _ in range(STEPS)]
        weights = {}
        if zero < 3:
            weights = {name: p.detach().float().numpy().copy() for name, p in model.named_parameters()}
        runs.append((zero, seen, weights))
    return runs


def agree(reference, results, world, expert_parallel):
    expected, weights = reference
    for rank, runs in enumerate(results):
        for zero, seen, here in runs:
            where = f"rank {rank}, ZeRO {zero}"
            for step, (a, b) in enumerate(zip(expected, seen, strict=True)):
                assert b["loss"] == pytest.approx(a["loss"], rel=1e-6), f"{where}, step {step}"
                assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-6), f"{where}, step {step}"
                assert b["tokens"] == a["tokens"]
                if "counts" in a:
                    assert [b["moe/layer0/counts"], b["moe/layer1/counts"]] == a["counts"]
            share = standin.EXPERTS // expert_parallel
            first = rank % expert_parallel * share
            for name, value in here.items():
                whole = weights[name][first : first + share] if ".experts." in name else weights[name]
                np.testing.assert_allclose(value, whole, atol=2e-6, err_msg=f"{where}: {name}")


@pytest.mark.parametrize(
    ("world", "expert_parallel", "stages"),
    [(1, 1, (0, 1, 2, 3)), (2, 1, (0, 3)), (2, 2, (0, 1, 2)), (4, 2, (0, 1, 2))],
)
def test_every_layout_trains_as_one_process_does(world, expert_parallel, stages):
    optim = {
        "weight_decay": 0.1,
        "clip": 0.5,
    }  # below every step's norm, so that a wrong norm shows in the weights
    reference = plain_loop(clip=0.5, decay=0.1)
    assert all(step["grad_norm"] > 0.5 for step in reference[0])
    agree(reference, ranks(world)(train, expert_parallel, stages, optim=optim), world, expert_parallel)


def test_a_step_without_labels_changes_nothing_and_the_next_goes_on():
    # Also without clipping, which DeepSpeed does when it is not told not to.
    reference = plain_loop(silent=(1,))
    assert reference[0][1]["tokens"] == 0
    results = ranks(2)(train, 2, (0, 1, 2), silent=(1,))
    agree(reference, results, 2, 2)
    for runs in results:
        assert all(math.isfinite(step["loss"]) for _, seen, _ in runs for step in seen)


def test_bf16_keeps_fp32_masters_and_stays_near():
    reference, weights = plain_loop()
    for runs in ranks(2)(train, 2, (0, 1, 2), precision="bf16"):
        for zero, seen, here in runs:
            for a, b in zip(reference, seen, strict=True):
                assert b["loss"] == pytest.approx(a["loss"], rel=2e-3), zero
                assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-2), zero
            # Adam's first steps are as long as the learning rate whatever the gradient; bf16 rounds that.
            np.testing.assert_allclose(here["head.weight"], weights["head.weight"], atol=2e-2)
            assert not np.array_equal(here["head.weight"], weights["head.weight"])


def again_and_offloaded():
    groups = Groups.create(2)
    runs = []
    for offload in (False, False, True):
        model = standin.Model(groups)
        spec = standin.spec(zero=2, precision="bf16", offload=offload)
        engine = Engine(model, spec, groups, total_steps=10)
        batches = standin.Loader(groups).steps()
        losses = [engine.train_step(next(batches))["loss"] for _ in range(STEPS)]
        runs.append((losses, {n: p.detach().float().numpy().copy() for n, p in model.named_parameters()}))
    return runs


def test_a_run_repeats_bit_for_bit_and_offloading_stays_near():
    for (losses, weights), (twice, same), (offloaded, _) in ranks(2)(again_and_offloaded):
        assert losses == twice
        assert all(np.array_equal(weights[name], same[name]) for name in weights)
        assert offloaded == pytest.approx(losses, rel=1e-3)


# --- alone ---


def one(model=None, **changes):
    """An engine of one rank."""
    model = model or standin.Model(Groups.single())
    return Engine(model, standin.spec(**changes), Groups.single(), total_steps=10)


@alone
def test_one_process_trains_without_a_launcher_or_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    engine = one(zero=2)
    batches = standin.Loader(Groups.single()).steps()
    losses = [engine.train_step(next(batches))["loss"] for _ in range(10)]
    assert losses[-1] < losses[0]
    assert not (tmp_path / "extensions").exists()


@alone
def test_what_is_frozen_stays_and_costs_no_optimizer_state():
    model = standin.Model(Groups.single())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("projector."))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = one(model, zero=2)
    batches = standin.Loader(Groups.single()).steps()
    for _ in range(3):
        engine.train_step(next(batches))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"projector.weight", "projector.bias"}
    kept = sum(state["exp_avg"].numel() for state in engine.adam.state.values())
    assert kept == standin.WIDTH * (standin.WIDTH + 1)


@alone
def test_a_model_without_trainable_parameters_is_refused():
    model = standin.Model(Groups.single()).requires_grad_(False)
    with pytest.raises(EngineError, match=r"no trainable parameter\. Name the parts"):
        one(model)


@alone
def test_zero_3_does_not_cut_up_experts_that_are_spread():
    groups = Groups(0, 2, 2, 0, None, None, None, None)
    with pytest.raises(
        EngineError, match=r"train\.zero is 3, but moe\.expert_parallel is 2.*Set train\.zero to 2"
    ):
        Engine(standin.Model(Groups.single()), standin.spec(zero=3), groups, total_steps=10)


@pytest.mark.parametrize(
    ("zero", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (2, "bf16")]
)
@alone
def test_gradients_that_are_not_finite_change_nothing_until_patience_ends(zero, precision):
    model = standin.Model(Groups.single())
    engine = one(model, zero=zero, precision=precision)
    batches = standin.Loader(Groups.single()).steps()
    engine.train_step(next(batches))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # A tower whose features are infinite: the gradients are nan.
    good = model.tower.bias.detach().clone()
    model.tower.bias.data.fill_(math.nan)
    for _ in range(9):
        assert not math.isfinite(engine.train_step(next(batches))["grad_norm"])
    model.tower.bias.data.copy_(good)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert math.isfinite(engine.train_step(next(batches))["loss"])
    model.tower.bias.data.fill_(math.nan)
    for _ in range(9):
        engine.train_step(next(batches))
    with pytest.raises(
        DivergedError, match=r"inf or nan in each of the last 10 steps .*Lower train\.optim\.lr"
    ):
        engine.train_step(next(batches))


@alone
def test_activations_are_recomputed_as_the_spec_says():
    class Switched(standin.Model):
        asked = None

        def recompute(self, on=True):
            self.asked = on

    for wanted in (True, False):
        model = Switched(Groups.single())
        one(model, recompute=wanted)
        assert model.asked is wanted


# --- rates and groups ---


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("warmup", "steps"), [(0.03, 100), (0.0, 7), (0.25, 10), (0.03, 2181)])
def test_rates_are_transformers(schedule, warmup, steps):
    make = getattr(transformers, f"get_{schedule}_schedule_with_warmup")
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = make(adam, math.ceil(warmup * steps), steps)
    spec = OptimSpec(schedule=schedule, warmup=warmup)
    for step in range(steps):
        assert rate(spec, step, steps) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        adam.step()
        theirs.step()
    assert rate(spec, steps, steps) == pytest.approx(0.0, abs=1e-12)


def test_a_constant_rate_stays_after_its_warm_up():
    spec = OptimSpec(schedule="constant", warmup=0.2)
    assert [rate(spec, step, 10) for step in range(4)] == [0.0, 0.5, 1.0, 1.0]
    assert rate(spec, 10, 10) == 1.0


def test_groups_part_by_rate_decay_and_experts():
    model = standin.Model(Groups.single())
    spec = OptimSpec(lr=1e-3, projector_lr=1e-4, weight_decay=0.1)
    groups = parameter_groups(
        model, spec, expert_parallel=2, projector={"projector.weight", "projector.bias"}
    )
    names = {id(p): name for name, p in model.named_parameters()}
    seen = {
        names[id(p)]: (group["peak"], group["weight_decay"], group["name"] if group.get("moe") else "")
        for group in groups
        for p in group["params"]
    }
    assert seen["projector.weight"] == (1e-4, 0.1, "")
    assert seen["projector.bias"] == (1e-4, 0.0, "")
    assert seen["layers.0.norm.weight"] == (1e-3, 0.0, "")
    assert seen["layers.1.experts.up"] == (1e-3, 0.1, "ep_size_2")
    assert seen["layers.1.experts.bias"] == (1e-3, 0.0, "ep_size_2")
    assert seen["embed.weight"] == (1e-3, 0.1, "")
    assert not any(name.startswith("tower.") for name in seen)
