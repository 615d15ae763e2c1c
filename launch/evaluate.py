"""The held-out questions, asked after a stage: exact match, beside what always giving the most common answer scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data import images
from data.conversation import answer_end, prompt
from data.loader import held_out
from launch.files import write_json
from launch.record import RunFolder
from launch.routing import routing
from launch.spec import ExperimentSpec
from moe.generate import answer
from moe.parallel import Groups

BATCH = 32  # questions a forward pass
PLAIN = "v1"  # stage align's template has no questions; its model is asked in this one


def normal(text: str) -> str:
    """An answer as it is compared: no case, no outer blanks, no full stop."""
    return text.strip().rstrip(".").strip().lower()


def evaluate(
    folder: RunFolder,
    model: Any,
    tokenizer: Any,
    spec: ExperimentSpec,
    image: images.ImageFormat,
    groups: Groups,
    tracker: Any,
    pulse: Callable[[str, int], None],
) -> dict[str, Any]:
    """Ask every rank's share of the questions and write eval.json; all ranks call it, each gets the result."""
    questions = held_out(spec.data)
    template = PLAIN if spec.data.template == "plain" else spec.data.template
    end = answer_end(tokenizer, template)
    longest = max(len(tokenizer(q.answer, add_special_tokens=False).input_ids) for q in questions)
    # Ranks that share experts must make equally many forward passes: each takes as many, the last question again.
    share = -(-len(questions) // groups.world)
    mine = [questions[min(groups.rank + groups.world * i, len(questions) - 1)] for i in range(share)]
    said: list[str] = []
    for start in range(0, share, BATCH):
        part = mine[start : start + BATCH]
        prompts = [prompt(q.conversations, tokenizer, template, has_image=bool(q.image_paths)) for q in part]
        pixels = [
            torch.stack([images.load(path, image, spec.data.aspect) for path in q.image_paths])
            if q.image_paths
            else torch.empty(0, 3, image.size, image.size)
            for q in part
        ]
        pulse("evaluate", start)  # each batch of questions may take its time
        if start == 0:
            routing(folder, model, prompts, pixels, groups, tracker)
        said += answer(model, tokenizer, prompts, pixels, end=end, max_new_tokens=longest + 2, groups=groups)
    gathered: list[Any] = [said]
    if groups.world > 1:
        gathered = [None] * groups.world
        dist.all_gather_object(gathered, said, group=groups.control)
    answers = [gathered[i % groups.world][i // groups.world] for i in range(len(questions))]
    right = [normal(a) == normal(q.answer) for a, q in zip(answers, questions, strict=True)]
    truth = Counter(normal(q.answer) for q in questions)
    kinds: dict[str, Counter[str]] = {}
    for q in questions:
        kinds.setdefault(q.dataset, Counter())[normal(q.answer)] += 1
    result: dict[str, Any] = {
        "questions": len(questions),
        "accuracy": sum(right) / len(questions),
        "majority": truth.most_common(1)[0][1] / len(questions),
        "majority_by_kind": sum(c.most_common(1)[0][1] for c in kinds.values()) / len(questions),
        "by_kind": {
            kind: {
                "questions": sum(counts.values()),
                "accuracy": sum(r for r, q in zip(right, questions, strict=True) if q.dataset == kind)
                / sum(counts.values()),
            }
            for kind, counts in sorted(kinds.items())
        },
        "answers": [
            {
                "question": q.conversations[0]["value"],
                "images": [str(path) for path in q.image_paths],
                "answer": q.answer,
                "said": a,
                "kind": q.dataset,
            }
            for q, a in zip(questions, answers, strict=True)
        ],
    }
    if groups.rank == 0:
        write_json(folder.eval_file, result)
        tracker.table(
            "held_out/answers",
            ["picture", "kind", "question", "answer", "said", "right"],
            [
                [
                    [Path(path) for path in row["images"]],
                    *(row[key] for key in ("kind", "question", "answer", "said")),
                    ok,
                ]
                for row, ok in list(zip(result["answers"], right, strict=True))[:64]
            ],
        )
        tracker.summary(
            {"held_out": {key: result[key] for key in ("questions", "accuracy", "majority", "by_kind")}}
        )
    return result
