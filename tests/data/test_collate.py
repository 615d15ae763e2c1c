"""Micro-batches equal the reference's; what is too long ends after an answer, never inside an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.collate import collate, cut, spliced
from data.conversation import IGNORED, IMAGE_ID, encode
from data.index import Row

from .support import lines, talk, tokenizer

SAMPLES = {line["id"]: line for line in lines("sample")}


def row(turns: list[dict[str, str]], tok: Any, template: str, has_image: bool = True) -> Row:
    got = encode(turns, tok, template, has_image)
    ids = np.array(got.input_ids, dtype=np.int64)
    labels = np.where(ids == IMAGE_ID, IGNORED, np.array(got.labels, dtype=np.int64))
    return Row(ids, labels, got.turn_ends, [f"{at}.png" for at in range(got.input_ids.count(IMAGE_ID))])


WHOLE = [line for line in lines("batch") if line["scenario"] != "truncated"]


@pytest.mark.parametrize("line", WHOLE, ids=lambda line: f"{line['id']}-{line['version']}-{line['scenario']}")
def test_batches_equal_the_reference(line: dict[str, Any]) -> None:
    tok = tokenizer(line["tokenizer"])
    samples = [SAMPLES[id] for id in line["sample_ids"]]
    rows = [row(s["conversations"], tok, s["version"], s["has_image"]) for s in samples]
    images = torch.zeros(sum(len(r.images) for r in rows), 3, 2, 2)
    batch = collate(rows, images, tok.pad_token_id)
    assert batch["input_ids"].tolist() == line["input_ids"]
    assert batch["attention_mask"].long().tolist() == line["attention_mask"]
    assert batch["attention_mask"].dtype == torch.bool
    for got, want, sample in zip(batch["labels"].tolist(), line["labels"], samples, strict=True):
        if not sample["mismatch_warning"]:
            assert got == want
    assert batch["pixel_values"] is images


def test_a_pad_token_in_a_text_is_not_hidden() -> None:
    tok = tokenizer("llama_legacy")
    batch = collate(
        [row(talk("The token <unk>?", "Yes."), tok, "v1")], torch.zeros(0, 3, 2, 2), tok.pad_token_id
    )
    assert (batch["input_ids"] == tok.pad_token_id).any()
    assert batch["attention_mask"].all()


TURNS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(turns=TURNS, patches=st.integers(1, 30), longest=st.integers(2, 200))
def test_a_cut_ends_after_an_answer_and_never_inside_an_image(
    turns: list[tuple[int, int]], patches: int, longest: int
) -> None:
    tok = tokenizer("phi2")
    texts = []
    for images, length in turns:
        texts += ["<image>\n" * images + "Why?", "so " * length]
    whole = row(talk(*texts), tok, "phi")
    short = cut(whole, patches, longest)
    length = len(short.input_ids)
    assert spliced(short.input_ids, patches) <= max(longest, 0)
    assert short.input_ids.tolist() == whole.input_ids[:length].tolist()
    assert short.labels.tolist() == whole.labels[:length].tolist()
    assert len(short.images) == (short.input_ids == IMAGE_ID).sum()
    assert short.images == whole.images[: len(short.images)]
    if spliced(whole.input_ids, patches) <= longest:
        assert short is whole
    elif short.ends:
        assert short.ends[-1] == length
        after = whole.ends[len(short.ends)]  # the next answer does not fit
        assert spliced(whole.input_ids[:after], patches) > longest
    else:
        # The first answer itself is cut, as late as can be.
        assert spliced(whole.input_ids[: length + 1], patches) > longest
