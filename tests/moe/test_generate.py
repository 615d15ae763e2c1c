"""Greedy answers: the same with and without a cache, alone and in a batch, on one rank and on two."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from moe import generate
from moe.generate import answer, greedy
from moe.parallel import Groups
from moe.pictures import draw, shares
from moe.spec import MoESpec
from moe.upcycle import upcycle
from moe.vlm import IMAGE, VLM
from tests.moe.tiny import SIZE, batch, model
from tests.ranks import ranks

PROMPTS = [[5, IMAGE, 9, 17], [3, 4], [7, IMAGE, IMAGE, 2, 8, 30, 31]]
ALONE = Groups.single()


def pixels() -> list[Tensor]:
    draws = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return [draws[:1], draws[:0], draws[1:]]


def sparse(backbone: str = "stablelm", groups: Groups = ALONE, **changes: Any) -> VLM:
    vlm = model(backbone)
    upcycle(vlm, MoESpec(**changes), groups, seed=0)
    with torch.no_grad():
        for layer in (0, 2):
            experts: Any = vlm.layers()[layer].mlp.experts
            for place in range(len(experts.up)):
                number = experts.up.expert_offset + place
                experts.up[place] *= 1 + number  # experts that differ
    return vlm.eval()


def by_hand(vlm: VLM, prompt: list[int], images: Tensor, steps: int) -> list[int]:
    """The whole sequence anew for each token."""
    said: list[int] = []
    for _ in range(steps):
        logits = vlm(torch.tensor([prompt + said]), pixel_values=images).logits
        said.append(int(logits[0, -1].argmax()))
    return said


@pytest.mark.parametrize("backbone", ["phi2", "stablelm", "qwen3", "mistral", "minicpm"])
def test_a_batch_with_a_cache_says_what_each_says_alone_without_one(backbone: str) -> None:
    vlm = sparse(backbone)
    with torch.no_grad():
        want = [by_hand(vlm, p, x, 8) for p, x in zip(PROMPTS, pixels(), strict=True)]
    got = greedy(vlm, PROMPTS, pixels(), max_new_tokens=8, end=None, groups=ALONE)
    assert got == want
    assert len({tuple(ids) for ids in got}) == 3
    assert got == greedy(vlm, PROMPTS, pixels(), max_new_tokens=8, end=None, groups=ALONE)


def test_an_answer_ends_at_its_own_end() -> None:
    vlm = sparse()
    free = greedy(vlm, PROMPTS, pixels(), max_new_tokens=8, end=None, groups=ALONE)
    end = free[0][3]
    got = greedy(vlm, PROMPTS, pixels(), max_new_tokens=8, end=end, groups=ALONE)
    assert got == [ids[: ids.index(end)] if end in ids else ids for ids in free]


def test_asking_a_model_in_training_leaves_it_in_training() -> None:
    vlm = sparse().train()
    vlm.recompute()
    want = greedy(sparse(), PROMPTS, pixels(), max_new_tokens=4, end=None, groups=ALONE)
    assert greedy(vlm, PROMPTS, pixels(), max_new_tokens=4, end=None, groups=ALONE) == want
    assert vlm.training
    assert not vlm.tower.training
    assert greedy(vlm, [], [], max_new_tokens=4, end=None, groups=ALONE) == []


def together(dispatcher: str, end: int) -> list[list[int]]:
    groups = Groups.create(2)
    vlm = sparse("stablelm", groups, dispatcher=dispatcher)
    mine = slice(0, 1) if groups.rank == 0 else slice(2, 3)  # one ends at once, the other does not
    return greedy(vlm, PROMPTS[mine], pixels()[mine], max_new_tokens=9, end=end, groups=groups)


@pytest.mark.parametrize("dispatcher", ["torch", pytest.param("tutel", marks=pytest.mark.tutel)])
def test_ranks_that_share_experts_stay_in_step_until_the_last_has_finished(dispatcher: str) -> None:
    if dispatcher == "tutel":
        pytest.importorskip("tutel")
    vlm = sparse()
    free = greedy(vlm, PROMPTS, pixels(), max_new_tokens=9, end=None, groups=ALONE)
    end = free[0][1]
    assert end not in free[2]
    got = ranks(2)(together, dispatcher, end)
    assert got == [[free[0][:1]], [free[2]]]


def test_shares_add_up_and_tell_text_from_images(tmp_path: Path) -> None:
    vlm = sparse()
    given = batch([9, 6], [1, 0])
    table = shares(vlm, given["input_ids"], given["attention_mask"], given["pixel_values"])
    assert [(s.layer, s.expert) for s in table] == [(layer, e) for layer in (0, 2) for e in range(4)]
    for layer in (0, 2):
        rows = [s for s in table if s.layer == layer]
        assert sum(s.text for s in rows) == pytest.approx(1)
        assert sum(s.image for s in rows) == pytest.approx(1)
    reference = sparse(
        rules="moe_llava", eval_capacity_factor=2.0
    )  # pads are routed there, and left out here
    again = shares(reference, given["input_ids"], given["attention_mask"], given["pixel_values"])
    for one, other in zip(table, again, strict=True):
        assert (one.text, one.image) == pytest.approx((other.text, other.image))
    draw(table, tmp_path / "routing.png")
    with Image.open(tmp_path / "routing.png") as picture:
        assert picture.size[0] > 400
    with pytest.raises(ValueError, match="a dense model routes nothing"):
        shares(model(), given["input_ids"])


def test_the_command_answers_a_question(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(tmp_path / "a.jpg")
    picture = ["--image", str(tmp_path / "a.jpg")]
    options = ["--max-new-tokens", "4", "--routing", str(tmp_path / "routing.png")]
    for images in ([], picture, picture * 2):
        assert generate.main([str(checkpoint), *images, *options, "What is this?"]) == 0
    assert (tmp_path / "routing.png").stat().st_size > 1000
    assert capsys.readouterr().err == ""


def test_a_run_folder_stands_for_its_newest_complete_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint.parents[1], run)
    torn = run / "checkpoints" / "step_00000002"
    shutil.copytree(run / "checkpoints" / checkpoint.name, torn)
    (torn / "COMPLETE").unlink()
    assert generate.main([str(run), "--max-new-tokens", "2", "What?"]) == 0
    shutil.rmtree(run / "checkpoints" / checkpoint.name)
    capsys.readouterr()
    assert generate.main([str(run), "What?"]) == 2
    assert "run has no complete checkpoint; runs.py status says how far" in capsys.readouterr().err


def test_the_file_runs_as_a_command_from_anywhere(checkpoint: Path, tmp_path: Path) -> None:
    script = Path(generate.__file__)
    asked = [str(checkpoint), "--max-new-tokens", "2", "What is this?"]
    done = subprocess.run(
        [sys.executable, str(script), *asked], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")


def test_a_checkpoint_is_exported_with_its_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    import transformers

    from moe.interchange import export_hf, open_checkpoint

    export_hf(checkpoint, tmp_path / "hub")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    vlm, tokenizer = open_checkpoint(checkpoint)
    given = batch([9, 6], [1, 0])
    torch.testing.assert_close(read(**given).logits, vlm(**given).logits)
    assert words("What is this?").input_ids == tokenizer("What is this?").input_ids


FRESH = """
import sys
import moe.hub, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
words = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.tensor([[*words("USER: What").input_ids, -200, 5]])
torch.manual_seed(0)
said = model.generate(ids, pixel_values=torch.randn(1, 3, 28, 28), max_new_tokens=4, do_sample=False)
assert not {"deepspeed", "tutel", "launch", "data"} & set(sys.modules)
print(said.tolist())
"""


def test_a_fresh_process_generates_from_an_export_with_this_package_and_transformers(
    checkpoint: Path, tmp_path: Path
) -> None:
    from moe.interchange import export_hf, open_checkpoint

    export_hf(checkpoint, tmp_path / "hub")
    vlm, tokenizer = open_checkpoint(checkpoint)
    prompt = [*tokenizer("USER: What").input_ids, IMAGE, 5]
    torch.manual_seed(0)
    images = torch.randn(1, 3, SIZE, SIZE)
    want = greedy(vlm, [prompt], [images], max_new_tokens=4, end=tokenizer.eos_token_id, groups=ALONE)
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "hub")],
        cwd=Path(generate.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said[0][: len(want[0])] == want[0]


def test_the_command_holds_a_conversation(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter(["What is this?", "And now?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(asked))
    assert generate.main([str(checkpoint), "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.count("\n") == 2


def test_a_conversation_outlives_a_slip_and_ends_at_ctrl_c(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = iter(["What is this?", "And <image>?", "Well?"])

    def asked(_: str) -> str:
        for turn in turns:
            return turn
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", asked)
    Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(tmp_path / "a.jpg")
    options = ["--image", str(tmp_path / "a.jpg"), "--max-new-tokens", "2", "--routing", str(tmp_path / "r")]
    assert generate.main([str(checkpoint), *options]) == 130
    said = capsys.readouterr()
    assert said.out.count("\n") == 2
    assert said.err == "leave <image> out of the question: the pictures named by --image stand before it\n\n"
    assert (tmp_path / "r").read_bytes().startswith(b"\x89PNG")  # whatever its name
    assert generate.main([str(checkpoint), *options, "What <image>?"]) == 2
    with pytest.raises(SystemExit):
        generate.main([str(checkpoint), "--max-new-tokens", "0", "What?"])
    assert "--max-new-tokens: expected a whole number from 1 on, got '0'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{", "spec.json is no JSON"),
        ("[]", "spec.json is not what a run writes"),
        ('{"model": "stablelm"}', "spec.json is not what a run writes"),
        ('{"stage": "fourth"}', "says stage 'fourth', which is none of align, instruct, moe"),
    ],
)
def test_a_run_that_says_nonsense_of_itself(
    spec: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "spec.json").write_text(spec)
    assert generate.main([str(tmp_path / "checkpoints"), "Why?"]) == 2
    assert words in capsys.readouterr().err


def test_the_same_answer_twice(checkpoint: Path) -> None:
    from moe.interchange import open_checkpoint

    vlm, tokenizer = open_checkpoint(checkpoint)
    ids = tokenizer("USER: What").input_ids
    one, two = (
        answer(
            vlm, tokenizer, [ids], [torch.empty(0, 3, SIZE, SIZE)], end=None, max_new_tokens=5, groups=ALONE
        )
        for _ in "ab"
    )
    assert one == two


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/no/such/folder", "Why?"], "error: /no/such/folder is not there: name a run folder"),
        (["{checkpoint}/COMPLETE", "Why?"], "COMPLETE is a file, not a checkpoint's folder"),
        (["{checkpoint}", "--image", "{tmp}", "What <image>?"], "this is a folder, not a picture"),
        (["{tmp}", "Why?"], "lies in no run folder: none of the folders above it has a spec.json"),
        (["{checkpoint}", "--image", "/no/such.jpg", "Why?"], "/no/such.jpg"),
        (["{checkpoint}", "--template", "nonsense", "Why?"], "no template is called 'nonsense'"),
    ],
)
def test_what_cannot_be_asked_is_said_in_words(
    arguments: list[str], said: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [a.format(tmp=tmp_path, checkpoint=checkpoint) for a in arguments]
    assert generate.main(filled) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
