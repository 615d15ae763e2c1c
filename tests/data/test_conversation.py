"""Ids and labels equal the reference's; where it loses a sample, exactly the answers are learnt here."""

from __future__ import annotations

from typing import Any

import pytest

from data.conversation import IGNORED, ConversationError, encode, prompt, tokenizer_faults

from .support import FAMILIES, chat_tokenizer, fresh_tokenizer, lines, talk, tokenizer

SAMPLES = [line for line in lines("sample") if not line["error"]]
LOST = {  # what the reference loses, and what is learnt of it here
    "0025": "",
    "0112": " A dog.<|endoftext|>",
    "0301": " Done.<|endoftext|><|endoftext|> Good.<|endoftext|>",
    "0305": " It is <|extra_0|> here.<|endoftext|>",
    "0366": "ASSISTANT hello<|end_of_turn|>",
    "0376": "Yes.<|end_of_turn|>",
    "0414": "",
    "0438": "You can write USER: hi ASSISTANT: hello there.</s> Good.</s>",
    "0440": "It is the end of the text.</s>",
    "0527": "No, it is odd.</s> Yes.</s> No, it is odd.</s> Yes.</s> No, it is odd.</s> Yes.</s>",
    "0533": "",
    "0539": "A dog.</s>",
    "0565": "Hello.</s> Now.</s> Good.</s>",
}


def name(line: dict[str, Any]) -> str:
    return f"{line['id']}-{line['version']}-{line['tokenizer']}-{line['scenario']}"


def learnt(labels: list[int], tok: Any) -> str:
    return str(tok.decode([label for label in labels if label >= 0], skip_special_tokens=False))


@pytest.mark.parametrize("line", SAMPLES, ids=name)
def test_ids_and_labels_equal_the_reference(line: dict[str, Any]) -> None:
    tok = tokenizer(line["tokenizer"])
    got = encode(line["conversations"], tok, line["version"], line["has_image"])
    length = len(line["input_ids"])  # the reference truncates text-only samples here
    if line["model_max_length"] == 2048:
        assert len(got.input_ids) == length
    assert got.input_ids[:length] == line["input_ids"]
    if line["mismatch_warning"]:
        assert learnt(got.labels, tok) == LOST[line["id"]]
    else:
        assert got.labels[:length] == line["labels"]


def test_every_lost_sample_is_judged() -> None:
    assert {line["id"] for line in SAMPLES if line["mismatch_warning"]} == set(LOST)


@pytest.mark.parametrize("line", [line for line in lines("sample") if line["error"]], ids=name)
def test_what_the_reference_replaces_by_a_random_sample_is_refused(line: dict[str, Any]) -> None:
    with pytest.raises(ConversationError):
        encode(line["conversations"], tokenizer(line["tokenizer"]), line["version"], line["has_image"])


@pytest.mark.parametrize("line", lines("infer_prompt"), ids=name)
def test_prompts_equal_the_reference(line: dict[str, Any]) -> None:
    assert prompt(talk(*line["turns"]), tokenizer(line["tokenizer"]), line["version"]) == line["input_ids"]


def test_a_prompt_drops_the_answer_to_come() -> None:
    tok = tokenizer("phi2")
    asked = prompt(talk("<image>\nWhat?", "A dog.", "Why?"), tok, "phi")
    assert prompt(talk("<image>\nWhat?", "A dog.", "Why?", "Because."), tok, "phi") == asked
    whole = encode(talk("<image>\nWhat?", "A dog.", "Why?", "Because."), tok, "phi").input_ids
    assert whole[: len(asked)] == asked
    for nothing in ([{"from": "gpt", "value": "Hello"}], ["Hello"], None):
        with pytest.raises(ConversationError, match="no human turn"):
            prompt(nothing, tok, "phi")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("conversations", "template", "words"),
    [
        ([], "v1", "the conversation is empty"),
        (talk("a", "b"), "v9", "no template is called 'v9'; there are plain, phi"),
        ([{"from": "human"}], "v1", "turn 1 needs 'from' and a text"),
        (["a", "b"], "v1", "turn 1 needs 'from' and a text"),
        ([{"from": "system", "value": "x"}], "v1", "turn 1 is from 'system'; it must be from human or gpt"),
        ([{"from": "human", "value": "x"}] * 2, "v1", "human speaks twice in a row"),
        (talk("<video> and <video>", "b"), "v1", "turn 1 has more than one <video>"),
        (talk("<image>"), "plain", "one question and one caption, here are 1 turns"),
        (talk("no picture", "a dog"), "plain", "template plain needs <image> in the first turn"),
        (talk("<image>", "a dog"), "plain", "template plain is for captions, and the record has no picture"),
    ],
)
def test_each_refusal_says_why(conversations: list[dict[str, str]], template: str, words: str) -> None:
    with pytest.raises(ConversationError, match=words):
        encode(conversations, tokenizer("llama_legacy"), template, has_image="no picture" not in words)


def test_adjacent_images_over_the_limit_are_dropped_as_in_the_reference() -> None:
    ids = encode(talk("<image>" * 20 + "\nHow many?", "Many."), tokenizer("phi2"), "phi").input_ids
    assert ids.count(-200) == 16


def test_the_limits_of_placeholders_are_of_turns_that_start_with_one() -> None:
    def ids(text: str) -> list[int]:
        return encode(talk(text, "Many."), tokenizer("phi2"), "phi").input_ids

    # The reference strips a turn of too many, whether or not it could drop some, and no other one.
    assert ids("<image>" * 20 + "\nHow many? \n") == ids("<image>" * 16 + "\nHow many?")
    assert ids("<image>\n" * 17) == ids("<image>\n" * 16 + "<image>")
    assert ids("<image>" * 16 + "\n") != ids("<image>" * 16)
    assert ids("<video>" + "<image>" * 20 + " ") == ids("<video>" + "<image>" * 16)
    assert ids("So " + "<image>" * 20 + " ").count(-200) == 20
    assert ids("So <video><video>").count(-200) == 16


def test_a_chat_template_learns_the_answers_and_their_ends() -> None:
    tok = chat_tokenizer()
    got = encode(talk("<image>\nWhat?", "A dog.", "Why?", " So\n"), tok, "chat")
    assert learnt(got.labels, tok) == "A dog.<|im_end|> So\n<|im_end|>"
    assert got.input_ids.count(-200) == 1
    assert tokenizer_faults(tok, "chat") == []
    asked = prompt(talk("<image>\nWhat?"), tok, "chat")
    assert got.input_ids[: len(asked)] == asked
    with_system = encode([{"from": "system", "value": "Be brief."}, *talk("Hi", "Yes")], tok, "chat")
    assert learnt(with_system.labels, tok) == "Yes<|im_end|>"


def test_a_chat_template_that_rewrites_history_is_refused() -> None:
    tok = fresh_tokenizer("qwen1_5")
    tok.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConversationError, match="rewrites earlier turns"):
        encode(talk("a", "b"), tok, "chat")


class Slow:
    """A recorded tokenizer without its offsets, as Python tokenizers are."""

    is_fast = False

    def __init__(self, folder: str) -> None:
        self.inner = tokenizer(folder)

    def __call__(self, text: str, **options: Any) -> Any:
        return self.inner(text, **options)

    def __getattr__(self, key: str) -> Any:
        return getattr(self.inner, key)


@pytest.mark.parametrize("line", SAMPLES[::3], ids=name)
def test_a_tokenizer_without_offsets_gives_the_same(line: dict[str, Any]) -> None:
    given = line["conversations"], line["version"], line["has_image"]
    fast = encode(given[0], tokenizer(line["tokenizer"]), *given[1:])
    assert encode(given[0], Slow(line["tokenizer"]), *given[1:]) == fast


def test_turn_ends_close_each_answer() -> None:
    tok = tokenizer("llama_legacy")
    got = encode(talk("<image>\nWhat?", "A dog.", "Why?", "", "So?", "Yes."), tok, "v1")
    assert len(got.turn_ends) == 2  # the empty answer has nothing to learn
    assert [got.input_ids[end - 1] for end in got.turn_ends] == [tok.eos_token_id] * 2
    assert got.turn_ends[-1] == len(got.input_ids)
    assert got.labels[got.turn_ends[0]] == IGNORED


@pytest.mark.parametrize(("template", "folder"), FAMILIES.items())
def test_the_references_pairs_are_sound(template: str, folder: str) -> None:
    assert tokenizer_faults(tokenizer(folder), template) == []
    assert tokenizer_faults(tokenizer(folder), "plain") == []


def _stablelm() -> Any:
    return fresh_tokenizer("stablelm2")


def _no_eos() -> Any:
    tok = fresh_tokenizer("llama_legacy")
    tok.pad_token, tok.eos_token = "<unk>", None
    return tok


def _adds_eos() -> Any:
    from tokenizers.processors import TemplateProcessing

    tok = fresh_tokenizer("llama_legacy")
    tok.pad_token = "<unk>"
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="$A $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tok


def _asks_otherwise() -> Any:
    tok = fresh_tokenizer("qwen1_5")
    tok.pad_token = "<|im_start|>"
    tok.chat_template = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}" + (
        "{% if add_generation_prompt %}?{% endif %}"
    )
    return tok


@pytest.mark.parametrize(
    ("make", "template", "words"),
    [
        (_stablelm, "stablelm", "pad equals eos: '<|endoftext|>'"),
        (lambda: fresh_tokenizer("llama_legacy"), "v1", "there is no pad token"),
        (_no_eos, "plain", "there is no eos token"),
        (lambda: tokenizer("phi2"), "v1", "ends turns with '</s>', which is 4 tokens here, not one"),
        (lambda: tokenizer("openchat_legacy"), "v1", "the tokenizer's eos is '<|end_of_turn|>'"),
        (_adds_eos, "v1", "turn add_eos_token off"),
        (lambda: tokenizer("phi2"), "chat", "this tokenizer has none; choose a named template"),
        (_asks_otherwise, "chat", "rewrites earlier turns"),
    ],
)
def test_an_unsound_tokenizer_is_told_in_words(make: Any, template: str, words: str) -> None:
    assert any(words in fault for fault in tokenizer_faults(make(), template))
