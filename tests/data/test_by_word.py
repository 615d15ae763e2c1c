"""Ids taken word by word are the tokenizer's own, and tokenizers of which that is not known are left alone."""

from __future__ import annotations

import functools
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data.by_word import MOST, ByWord
from data.conversation import encode, encode_many, remembering
from data.tokenizer_file import TokenizerFile

from .support import GOLDENS, chat_tokenizer, talk, tokenizer
from .test_conversation_properties import FEW, PAIRS, TEXT

AWKWARD = [
    "two  spaces, three   spaces, a space at the end ",
    " at the start\n and \n around\n\n lines \r\n ends",
    "tab\t then\t  space, no-break\xa0 space \xa0space, \x1c separator \x85 next line",
    "an end<|endoftext|>in the text <|endoftext|> again<|extra_0|> and </s>",
    "don't  I'LL we'd 1234 12 3 ... ?! ÀÉ e\u0301 \u0301 船 船 🚢 ﬁ",
    "",
    "x" * 500,
]
REMEMBERED = [("phi", "phi2"), ("qwen", "qwen1_5"), ("plain", "phi2"), ("chat", "chat")]


def named(folder: str) -> Any:
    return chat_tokenizer() if folder == "chat" else tokenizer(folder)


@functools.cache
def memory(template: str, folder: str) -> ByWord | None:
    return remembering(named(folder), template)


@pytest.mark.parametrize(("template", "folder"), REMEMBERED)
@pytest.mark.parametrize("image", [False, True])
def test_awkward_texts_are_encoded_as_the_tokenizer_does(template: str, folder: str, image: bool) -> None:
    assert memory(template, folder) is not None
    texts = [*AWKWARD, *map("".join, itertools.pairwise(AWKWARD))]
    head = "<image>\n" if image else ""
    turns = [talk(f"{head}{text}", text, "and " + text, text + "?") for text in texts]
    if template == "plain":
        turns, image = [talk("<image>", text) for text in texts], True
    tok, batch = named(folder), [(each, image) for each in turns]
    want = [encode(each, tok, template, image) for each in turns]
    for _ in range(2):  # new words, then known ones
        assert encode_many(batch, tok, template, memory(template, folder)) == want


@pytest.mark.parametrize(("template", "folder"), sorted(set(PAIRS) & set(REMEMBERED)))
@FEW
@given(rounds=st.lists(st.lists(TEXT, min_size=1, max_size=5), max_size=4), image=st.booleans())
def test_whatever_is_said(template: str, folder: str, rounds: list[list[str]], image: bool) -> None:
    batch = [(talk("<image>\n" + texts[0], *texts[1:]), image) for texts in rounds]
    tok = named(folder)
    known = memory(template, folder)
    got, want = (encode_many(batch, tok, template, use) for use in (known, None))
    assert list(map(repr, got)) == list(map(repr, want))


def test_what_is_not_known_to_be_safe_is_left_alone() -> None:
    left_alone = {folder for template, folder in PAIRS if memory(template, folder) is None}
    assert left_alone >= {"llama_legacy", "llama_nolegacy", "openchat_legacy"}
    facts = json.loads((GOLDENS / "tokenizers" / "phi2" / "tokenizer.json").read_text())
    assert ByWord.of(changed(facts), True) is not None
    space = {"content": " x", "lstrip": False, "rstrip": False, "single_word": False}
    token = {**facts["added_tokens"][0], "id": 10**6}
    for change in (
        {"added_tokens": [*facts["added_tokens"], {**token, **space}]},
        {"added_tokens": [*facts["added_tokens"], {**token, "content": "<x>", "lstrip": True}]},
        {"normalizer": {"type": "Lowercase"}},
        {"model": {**facts["model"], "dropout": 0.1}},
        {"model": {**facts["model"], "end_of_word_suffix": "</w>"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {**facts["pre_tokenizer"], "add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [other_split(), byte_level(facts)]}},
    ):
        assert ByWord.of(changed({**facts, **change}), True) is None, change


def other_split() -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": r"\w+ \w+"}, "behavior": "Isolated", "invert": False}


def byte_level(facts: dict[str, Any]) -> dict[str, Any]:
    return {**facts["pre_tokenizer"], "use_regex": False}


def changed(facts: dict[str, Any]) -> Any:
    made = TokenizerFile.__new__(TokenizerFile)
    made.backend_tokenizer, made._special = Tokenizer.from_str(json.dumps(facts)), {}
    return made


def test_the_memory_is_bounded() -> None:
    tok = tokenizer("phi2")
    known = ByWord.of(tok, True)
    assert known is not None
    known._later = {str(at): [] for at in range(MOST + 1)}
    batch = [(talk("a b c", "1 2 3"), False)]
    assert encode_many(batch, tok, "phi", known) == encode_many(batch, tok, "phi")
    known.learn([(0, ["new", "words"])])
    assert len(known._later) < 100
