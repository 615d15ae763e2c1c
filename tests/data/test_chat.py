"""Under a model's own chat template the answers and their ends are learnt, and the model is asked as it learnt."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from data.conversation import (
    IGNORED,
    ConversationError,
    answer_end,
    encode,
    encode_many,
    prompt,
    tokenizer_faults,
)
from data.index import fingerprint
from data.tokenizer_file import TokenizerFile

from .chats import CHATS, ENDLESS, LLAMA3, MARKED, MISTRAL, PHI3, QWEN3, SPECIAL, THINKING
from .support import fresh_tokenizer, talk

EARLIER, LAST = "A dog.", "It barks."
TURNS = talk("<image>\nWhat?", EARLIER, "Why?", LAST)
SYSTEM = {"from": "system", "value": "Be brief."}


@functools.cache
def tokenizer(template: str, folder: str) -> Any:
    loaded = fresh_tokenizer(folder)
    if loaded.unk_token is None:
        loaded.add_special_tokens({"unk_token": "<|extra_0|>"})
    loaded.add_tokens(
        [token for token in SPECIAL if folder == "qwen1_5" or "<|e" in token or "er_id" in token]
    )
    loaded.add_tokens(["<think>", "</think>"])
    loaded.pad_token = loaded.unk_token
    loaded.chat_template = template
    return loaded


def learnt(turns: list[dict[str, str]], tok: Any) -> list[str]:
    got, told, start = encode(turns, tok, "chat"), [], 0
    for end in got.turn_ends:
        told.append(tok.decode([label for label in got.labels[start:end] if label != IGNORED]))
        start = end
    assert all(label == IGNORED for label in got.labels[start:])
    return told


@pytest.mark.parametrize("name", CHATS)
def test_the_answers_and_their_ends_are_learnt(name: str) -> None:
    template, folder, end, last = CHATS[name]
    tok = tokenizer(template, folder)
    assert [told.strip() for told in learnt(TURNS, tok)] == [EARLIER + end, LAST + last]
    assert [told.strip() for told in learnt(talk("Hi"), tok)] == []
    # A question without an answer comes last; an answer says nothing; all answers are alike.
    assert learnt(talk("A", EARLIER, "B"), tok)[0].strip().startswith(EARLIER + end)
    assert [told.strip() for told in learnt(talk("A", "", "B", LAST), tok)] == [LAST + last]
    assert [told.strip() for told in learnt(talk("Yes", "Yes", "Yes", "Yes"), tok)] == [
        "Yes" + end,
        "Yes" + last,
    ]
    asked = prompt(TURNS, tok, "chat")
    assert encode(TURNS, tok, "chat").input_ids[: len(asked)] == asked
    # Generation stops there, whatever eos is: a base model's is another one.
    assert tok.decode([answer_end(tok, "chat")]) == end.strip()
    assert tokenizer_faults(tok, "chat") == []


@pytest.mark.parametrize("name", CHATS)
def test_preparation_reads_it_as_training_does(name: str, tmp_path: Path) -> None:
    template, folder, *_ = CHATS[name]
    tok = tokenizer(template, folder)
    tok.save_pretrained(tmp_path)
    read = TokenizerFile(tmp_path)
    for turns in (
        TURNS,
        talk("A", "B"),
        talk("A", "<think>\nHm.\n</think>\n\nB", "C", "<think>\nOh.\n</think>\n\nD"),
    ):
        assert encode(turns, read, "chat") == encode(turns, tok, "chat")
        assert encode_many([(turns, True)], read, "chat") == [encode(turns, tok, "chat")]
        assert prompt(turns, read, "chat") == prompt(turns, tok, "chat")
    assert tokenizer_faults(read, "chat") == []
    assert fingerprint(read, "chat") == fingerprint(tok, "chat")


def test_an_empty_thought_is_context_and_a_real_one_is_learnt() -> None:
    tok = tokenizer(QWEN3, "qwen1_5")
    got = encode(talk("A", "B"), tok, "chat")
    assert tok.decode(got.input_ids).endswith("assistant\n<think>\n\n</think>\n\nB<|im_end|>\n")
    thought = "<think>\nHm.\n</think>\n\n"
    # Of earlier answers the template drops the thought; the last one is learnt with its own.
    assert learnt(talk("A", f"{thought}B", "C", f"{thought}D"), tok) == [
        "B<|im_end|>",
        f"{thought}D<|im_end|>",
    ]
    assert tok.decode(prompt(talk("A"), tok, "chat")).endswith("assistant\n<think>\n\n</think>\n\n")


def test_what_stands_between_prompt_and_answer_is_learnt() -> None:
    tok = tokenizer(THINKING, "qwen1_5")
    assert learnt(talk("A", "B"), tok) == ["\n</think>\n\nB<|im_end|>"]
    assert tokenizer_faults(tok, "chat") == []


def test_a_system_turn_is_context() -> None:
    for name in ("qwen2.5", "qwen3", "llama3", "mistral3", "phi3"):
        template, folder, end, last = CHATS[name]
        turns = [SYSTEM, *TURNS]
        assert [t.strip() for t in learnt(turns, tokenizer(template, folder))] == [
            EARLIER + end,
            LAST + last,
        ], name
    with pytest.raises(ConversationError, match="refuses the conversation: only user and assistant speak"):
        encode([SYSTEM, *TURNS], tokenizer(MISTRAL, "llama_nolegacy"), "chat")
    refused = encode_many(
        [([SYSTEM, *TURNS], True), (TURNS, True)], tokenizer(MISTRAL, "llama_nolegacy"), "chat"
    )
    assert [isinstance(outcome, ConversationError) for outcome in refused] == [True, False]


def test_marks_of_what_is_generated_agree() -> None:
    tok = tokenizer(MARKED, "qwen1_5")
    messages = [
        {"role": ("user", "assistant")[at % 2], "content": turn["value"]} for at, turn in enumerate(TURNS)
    ]
    said = tok.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    got = encode(TURNS, tok, "chat", has_image=False)
    assert got.input_ids == said["input_ids"]
    assert [int(label != IGNORED) for label in got.labels] == said["assistant_masks"]


def test_the_day_is_no_part_of_an_index() -> None:
    tok = tokenizer(LLAMA3, "llama_nolegacy")
    assert "Today: 26 Jul 2024" in tok.decode(encode(talk("A", "B"), tok, "chat").input_ids)


def test_words_that_look_like_the_templates_stay_the_answers() -> None:
    tok = tokenizer(QWEN3, "qwen1_5")
    sly = "B<|im_end|>\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\nB"
    assert learnt(talk("A", sly, "C", "B"), tok) == [f"{sly}<|im_end|>", "B<|im_end|>"]
    assert learnt(talk("\ue000", "\ue0001\ue000", "C\ue000\ue000", "D"), tok)[1] == "D<|im_end|>"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (ENDLESS, "puts nothing after an answer"),
        (
            PHI3.replace("messages %}", "messages if m.role == 'user' or m == messages[-1] %}"),
            "rewrites earlier turns",
        ),
        ("{{ messages[0].none.such }}", "refuses the conversation: UndefinedError: "),
        ("{{ raise_exception('not today') }}", "refuses the conversation: not today"),
    ],
)
def test_what_cannot_be_learnt_under_is_told(template: str, words: str) -> None:
    tok = tokenizer(template, "qwen1_5")
    with pytest.raises(ConversationError, match=words):
        encode(TURNS, tok, "chat")
    assert any(words in fault for fault in tokenizer_faults(tok, "chat"))
