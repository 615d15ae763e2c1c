"""What MoE-LLaVA itself computed (tests/goldens/moe/README.md), against our model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe.generate import greedy
from moe.interchange import load_moe_llava
from moe.parallel import Groups
from moe.router import Router, route
from moe.spec import MoESpec
from moe.stages import STAGES
from moe.vlm import IMAGE, VLM, parts, train_only

GOLDENS = Path(__file__).parents[1] / "goldens" / "moe"
BACKBONES = sorted(folder.parent.name for folder in (GOLDENS / "models").glob("*/golden.json"))
LOGITS, LOSSES = 1e-4, 1e-5
IMPORTED = {"gate.wg": "router", "fc1": "up", "fc2": "down"}


@cache
def golden(backbone: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any], Tensor]:
    folder = GOLDENS / "models" / backbone
    numbers = json.loads((folder / "golden.json").read_text())
    inputs = json.loads((folder / "inputs.json").read_text())
    pixels = load_file(GOLDENS / "models" / "images.safetensors")["images"]
    return numbers, load_file(folder / "golden.safetensors"), inputs, pixels


def model(backbone: str, dispatcher: str = "torch") -> VLM:
    folder = GOLDENS / "models"
    vlm = load_moe_llava(folder / backbone, tower=str(folder / "tiny_clip"), dispatcher=dispatcher)
    train_only(vlm, STAGES["moe"].trains)
    return vlm


def batch(backbone: str, name: str) -> dict[str, Tensor]:
    """The reference's batch without the dummy images of text-only samples."""
    _, _, inputs, pixels = golden(backbone)
    said, rows, at = inputs[name], [], 0
    for ids in said["input_ids"]:
        images = ids.count(IMAGE)
        rows += said["image_rows"][at : at + images]
        at += max(images, 1)
    return {
        "input_ids": torch.tensor(said["input_ids"]),
        "attention_mask": torch.tensor(said["attention_mask"]).bool(),
        "labels": torch.tensor(said["labels"]),
        "pixel_values": pixels[rows],
    }


def reference_name(name: str, expert: int = 0) -> str:
    """The reference's name for a parameter of ours."""
    name = name.removeprefix("language.").replace("projector.", "model.mm_projector.image_spatial_proj.")
    name = name.replace(".router.weight", ".deepspeed_moe.gate.wg.weight")
    if ".experts." in name:
        layer, ours = name.split(".experts.")
        theirs = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}[ours]
        return f"{layer}.deepspeed_moe.experts.deepspeed_experts.{expert}.{theirs}.weight"
    return name


def agrees(output: Any, said: dict[str, Any]) -> None:
    assert output.loss.item() == pytest.approx(said["loss"], abs=LOSSES)
    assert output.ce_sum.item() / output.tokens.item() == pytest.approx(said["ce_loss"], abs=LOSSES)
    assert output.router_loss.item() == pytest.approx(said["moe_loss"], abs=LOSSES)
    torch.testing.assert_close(
        torch.stack(output.aux_losses).detach(), torch.tensor(said["aux_losses"]), atol=LOSSES, rtol=0
    )
    for counts, dropped, gate in zip(output.expert_counts, output.dropped, said["gates"], strict=True):
        assert counts.tolist() == gate["exp_counts"]
        assert int(dropped) == gate["n_dropped_assignments"]


@pytest.mark.parametrize("dispatcher", ["torch", pytest.param("tutel", marks=pytest.mark.tutel)])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_run_gives_the_references_numbers(backbone: str, dispatcher: str) -> None:
    if dispatcher == "tutel":
        pytest.importorskip("tutel")
    numbers, tensors, _, _ = golden(backbone)
    vlm = model(backbone, dispatcher)
    for run in [f"{mode}_{which}" for mode in ("eval", "train") for which in ("b1", "b2", "b4")]:
        vlm.train(run.startswith("train"))
        output = vlm(**batch(backbone, run[-2:]))
        agrees(output, numbers[run])
        if f"{run}.logits" in tensors:
            torch.testing.assert_close(output.logits, tensors[f"{run}.logits"], atol=LOGITS, rtol=0)
        if f"{run}.hidden" in tensors:
            torch.testing.assert_close(output.hidden, tensors[f"{run}.hidden"], atol=LOGITS, rtol=0)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_recorded_noise_chooses_the_same_second_experts(backbone: str) -> None:
    numbers, tensors, _, _ = golden(backbone)
    vlm = model(backbone)
    for run in ("eval_noise_b2", "train_noise_b4"):
        vlm.train()  # ours is noisy in training only
        factor = 1.5 if run.startswith("train") else 2.0
        for place, layer in enumerate((0, 2)):
            router: Any = vlm.layers()[layer].mlp.router
            router.spec = MoESpec(rules="moe_llava", noise="gumbel", capacity_factor=factor)
            router.gumbel = lambda _, drawn=tensors[f"{run}.gumbel{place}"]: drawn
        agrees(vlm(**batch(backbone, run[-2:])), numbers[run])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_small_capacity_drops_the_same_choices(backbone: str) -> None:
    numbers, _, _, _ = golden(backbone)
    vlm = model(backbone).train()
    router: Any = vlm.layers()[0].mlp.router
    other: Any = vlm.layers()[2].mlp.router
    router.spec = other.spec = MoESpec(rules="moe_llava", capacity_factor=0.5)
    agrees(vlm(**batch(backbone, "b4")), numbers["train_lowcap0.5_b4"])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_images_are_projected_and_spliced_as_in_the_reference(backbone: str) -> None:
    _, tensors, _, pixels = golden(backbone)
    vlm = model(backbone)
    torch.testing.assert_close(vlm.image_features(pixels), tensors["image_features"], atol=1e-5, rtol=0)
    spliced = vlm.splice(**batch(backbone, "b4"))
    assert spliced.labels is not None
    assert spliced.mask.tolist() == tensors["prepare_b4.attention_mask"].bool().tolist()
    assert spliced.labels.tolist() == tensors["prepare_b4.labels"].tolist()
    torch.testing.assert_close(
        spliced.embeds[..., :8], tensors["prepare_b4.inputs_embeds_first8"], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradients_have_the_references_norms(backbone: str) -> None:
    numbers, tensors, _, _ = golden(backbone)
    vlm = model(backbone).train()
    vlm(**batch(backbone, "b2")).loss.backward()
    said = dict(numbers["train_b2"]["grad_norms"])
    for name, parameter in vlm.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None
        slices = list(parameter.grad) if ".experts." in name else [parameter.grad]
        for expert, grad in enumerate(slices):
            key = reference_name(name, expert)
            assert grad.norm().item() == pytest.approx(said.pop(key), rel=1e-4), key
            if f"train_b2.grad.{key}" in tensors:
                torch.testing.assert_close(grad, tensors[f"train_b2.grad.{key}"], rtol=1e-4, atol=1e-6)
    assert not said


@pytest.mark.parametrize("backbone", BACKBONES)
def test_three_adamw_steps_give_the_references_losses(backbone: str) -> None:
    numbers, _, _, _ = golden(backbone)
    said = numbers["adamw_3_steps_b4"]
    vlm = model(backbone).train()
    adamw = torch.optim.AdamW(
        [p for p in vlm.parameters() if p.requires_grad],
        lr=said["lr"],
        betas=said["betas"],
        eps=said["eps"],
        weight_decay=said["weight_decay"],
    )
    for step in said["trace"]:
        output = vlm(**batch(backbone, "b4"))
        assert output.loss.item() == pytest.approx(step["loss"], abs=LOSSES)
        assert [counts.tolist() for counts in output.expert_counts] == step["exp_counts"]
        adamw.zero_grad()
        output.loss.backward()
        adamw.step()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_same_tokens_are_generated(backbone: str) -> None:
    numbers, _, _, pixels = golden(backbone)
    said = numbers["generate_greedy"]
    found = greedy(
        model(backbone),
        [said["prompt_ids"]],
        [pixels[[said["image_row"]]]],
        max_new_tokens=len(said["new_tokens_use_cache"]),
        end=None,
        groups=Groups.single(),
    )
    assert found == [said["new_tokens_use_cache"]]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_stage_trains_what_the_reference_trains(backbone: str) -> None:
    numbers, _, _, _ = golden(backbone)
    vlm = model(backbone)
    experts = 4
    for stage, key in (("align", "stage1"), ("moe", "stage3")):
        train_only(vlm, STAGES[stage].trains)
        ours = set()
        for name, parameter in vlm.named_parameters():
            if parameter.requires_grad:
                ours |= {reference_name(name, e) for e in range(experts if ".experts." in name else 1)}
        assert ours == set(numbers[f"{key}_trainable"])
    # Stage 2 is dense; its names are stage 3's with every FFN dense.
    dense = {part for part in STAGES["instruct"].trains if part != "ffn"}
    ours = {reference_name(name) for part, names in parts(vlm).items() if part in dense for name in names}
    assert ours == {name for name in numbers["stage2_trainable"] if ".mlp." not in name}


def gating_cases() -> list[dict[str, Any]]:
    return list(json.loads((GOLDENS / "gating" / "gating.json").read_text())["gating"])


@pytest.mark.parametrize("case", gating_cases(), ids=lambda case: case["name"])
def test_gating_chooses_serves_and_weighs_as_deepspeed(case: dict[str, Any]) -> None:
    tensors = load_file(GOLDENS / "gating" / "gating.safetensors")
    name, top_k = case["name"], 2 if case["kind"] == "top2" else 1
    logits = tensors[f"{name}.logits"].clone().requires_grad_()
    spec = MoESpec(rules="moe_llava", top_k=top_k, experts=case["E"], min_capacity=case["min_capacity"])
    routing, report = route(
        logits, spec, case["capacity_factor"], tensors.get(f"{name}.gumbel"), tensors.get(f"{name}.uniform")
    )
    assert report.counts_E.tolist() == case["exp_counts"]
    assert routing.capacity == case["capacity"]
    kept = routing.slot_TK < routing.capacity
    per_expert = torch.bincount(routing.expert_TK[kept], minlength=case["E"])
    assert per_expert.tolist() == case["dispatched_per_expert"]
    l_aux = case["E"] * (report.score_E * report.first_E).sum() / report.tokens**2
    assert l_aux.item() == pytest.approx(case["l_aux"], abs=LOSSES)
    aux_grad = torch.autograd.grad(l_aux, logits, retain_graph=True)[0]
    torch.testing.assert_close(aux_grad, tensors[f"{name}.grad_l_aux"], rtol=1e-4, atol=1e-7)
    if top_k == 1 and case.get("use_rts") is False and report.dropped:
        return  # who survives a full expert is torch.topk's order among equals there
    weight = torch.zeros_like(logits).scatter_add(1, routing.expert_TK, routing.weight_TK)
    torch.testing.assert_close(weight, tensors[f"{name}.weight"], rtol=0, atol=LOSSES)
    slot = torch.full_like(logits, -1).scatter(
        1, routing.expert_TK, torch.where(kept, routing.slot_TK, -1).float()
    )
    assert slot.tolist() == tensors[f"{name}.slot"].tolist()
    grad = torch.autograd.grad((weight * tensors[f"{name}.R"]).sum(), logits)[0]
    torch.testing.assert_close(grad, tensors[f"{name}.grad_weight_dot_R"], rtol=1e-4, atol=1e-6)


def layer_cases() -> list[dict[str, Any]]:
    return list(json.loads((GOLDENS / "gating" / "gating.json").read_text())["layers"])


@pytest.mark.parametrize("case", layer_cases(), ids=lambda case: case["name"])
def test_a_whole_layer_of_deepspeed(case: dict[str, Any]) -> None:
    from moe.dispatch import TorchDispatcher
    from moe.experts import Experts
    from moe.layer import MoELayer
    from moe.router import Traffic, balance

    tensors, name = load_file(GOLDENS / "gating" / "gating.safetensors"), case["name"]
    prefix = f"{name}.param."
    given = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    stem = "deepspeed_moe.experts.deepspeed_experts."
    number = 1 + max(int(key.removeprefix(stem).split(".")[0]) for key in given if key.startswith(stem))

    def stacked(of: str) -> Tensor:
        return torch.stack([given[f"{stem}{e}.{of}"] for e in range(number)])

    weights = {
        "up": stacked("fc1.weight"),
        "up_bias": stacked("fc1.bias"),
        "down": stacked("fc2.weight"),
        "down_bias": stacked("fc2.bias"),
    }
    spec = MoESpec(
        rules="moe_llava",
        top_k=case["k"],
        experts=number,
        capacity_factor=case["capacity_factor"],
        eval_capacity_factor=case["eval_capacity_factor"],
        min_capacity=case["min_capacity"],
    )
    x = tensors[f"{name}.x"].clone().requires_grad_()
    router = Router(x.shape[-1], number, spec)
    router.weight.data.copy_(given["deepspeed_moe.gate.wg.weight"])
    residual = coefficient = None
    if case["use_residual"]:
        residual = torch.nn.Sequential()
        residual.add_module("fc1", torch.nn.Linear(*given["mlp.fc1.weight"].shape[::-1]))
        residual.add_module("act", torch.nn.GELU())
        residual.add_module("fc2", torch.nn.Linear(*given["mlp.fc2.weight"].shape[::-1]))
        coefficient = torch.nn.Linear(x.shape[-1], 2)
        coefficient.load_state_dict({key: given[f"coefficient.{key}"] for key in ("weight", "bias")})
        residual.load_state_dict({key[4:]: value for key, value in given.items() if key.startswith("mlp.")})
    activation = torch.nn.functional.gelu
    layer = MoELayer(
        0, router, Experts(weights, activation), TorchDispatcher(Groups.single()), residual, coefficient
    )
    for mode in ("train", "eval"):
        layer.train(mode == "train").zero_grad()
        x.grad = None
        layer.traffic = Traffic(None)
        y = layer(x)
        report = layer.traffic.in_order()[0]
        l_aux = balance(report)
        assert report.counts_E.tolist() == case[mode]["exp_counts"]
        assert l_aux.item() == pytest.approx(case[mode]["l_aux"], abs=LOSSES)
        torch.testing.assert_close(y, tensors[f"{name}.{mode}.y"], rtol=1e-4, atol=1e-5)
        ((y * tensors[f"{name}.R"]).sum() + l_aux).backward()
        torch.testing.assert_close(x.grad, tensors[f"{name}.{mode}.grad_x"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            router.weight.grad, tensors[f"{name}.{mode}.grad_wg"], rtol=1e-3, atol=1e-4
        )
