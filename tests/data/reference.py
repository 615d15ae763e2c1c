"""The reference's conversation to ids and labels, told anew by counting tokens of pieces, as it counts them.

Facts: MoE-LLaVA, moellava/conversation.py, moellava/mm_utils.py (tokenizer_image_token), moellava/train/train.py
(preprocess_phi, preprocess_openchat, preprocess_plain). It shares nothing with data.conversation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ENDS = {"phi": "<|endoftext|>", "qwen": "<|endoftext|>", "stablelm": "<|endoftext|>"}
ENDS |= {"openchat": "<|end_of_turn|>", "mistral": "</s>", "minicpm": "</s>", "v1": "</s>", "vicuna": "</s>"}
SPOKEN = {"human": "USER", "gpt": "ASSISTANT"}
NOTHING = -100


class Sample(NamedTuple):
    """What the reference trains on; `lost`: its counts disagreed, so that it learns nothing of the sample."""

    ids: list[int]
    labels: list[int]
    lost: bool


def ids_of(text: str, tokenizer: Any, has_image: bool) -> list[int]:
    """Each piece between images on its own, of a BOS that each piece gets the first one alone; -200 an image."""
    if not has_image:
        return list(tokenizer(text).input_ids)
    pieces = [list(tokenizer(piece).input_ids) for piece in text.split("<image>")]
    begins = bool(pieces[0]) and pieces[0][0] == tokenizer.bos_token_id
    ids = pieces[0]
    for piece in pieces[1:]:
        ids = [*ids, -200, *(piece[1:] if begins else piece)]
    return ids


def plain(turns: list[dict[str, str]], tokenizer: Any) -> Sample:
    """An image, a caption and a line break."""
    assert len(turns) == 2
    assert "<image>" in turns[0]["value"]
    ids = ids_of("<image>" + turns[1]["value"] + "\n", tokenizer, True)
    masked = len(ids_of("<image>", tokenizer, True))
    return Sample(ids, [NOTHING] * masked + ids[masked:], False)


def sample(turns: list[dict[str, str]], tokenizer: Any, template: str, has_image: bool) -> Sample:
    """One conversation; KeyError, AssertionError or IndexError where the reference takes another sample instead."""
    if template == "plain":
        return plain(turns, tokenizer)
    end, counts_first = ENDS[template], template not in ("phi", "qwen", "stablelm")
    if SPOKEN[turns[0]["from"]] != "USER":
        turns = turns[1:]
    text = SYSTEM + " "
    for at, turn in enumerate(turns):
        role = SPOKEN[turn["from"]]
        assert role == ("USER", "ASSISTANT")[at % 2]
        text += f"{role}: {turn['value']}{(' ', end)[at % 2]}" if turn["value"] else f"{role}:"
    ids = ids_of(text, tokenizer, has_image)
    labels, place = list(ids), int(counts_first)
    labels[:place] = [NOTHING] * place
    for piece in text.split(end):
        halves = piece.split(" ASSISTANT: ")
        if not piece or len(halves) != 2:
            break
        # Its BOS stands for the end that `split` took away; without one, one is added.
        length = len(ids_of(piece, tokenizer, has_image)) + (0 if counts_first else 1)
        asked = len(ids_of(halves[0] + " ASSISTANT: ", tokenizer, has_image)) - (2 if counts_first else 1)
        labels[place : place + asked] = [NOTHING] * len(labels[place : place + asked])
        place += length
    labels[place:] = [NOTHING] * len(labels[place:])
    real = sum(token != tokenizer.pad_token_id for token in ids)
    return Sample(ids, [NOTHING] * len(ids), True) if place != real else Sample(ids, labels, False)
