"""Random conversations: the reference's ids always, its labels wherever it keeps the sample, its refusals."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.conversation import IGNORED, ConversationError, encode

from . import reference
from .support import FAMILIES, lines, talk, tokenizer
from .test_conversation_properties import FEW, TEXT

ROLES = st.sampled_from(["human"] * 9 + ["gpt"] * 9 + ["system"])


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    """Mostly as they should be; else begun by an answer, ended by a question, with an empty text, out of order."""
    count = draw(st.sampled_from([2, 2, 2, 2, 4, 4, 6, 1, 3, 5]))
    roles = [("human", "gpt")[at % 2] for at in range(count)]
    oddity = draw(st.sampled_from(["", "", "", "gpt first", "any order"]))
    if oddity == "gpt first":
        roles = ["gpt", *roles]
    elif oddity == "any order":
        roles = draw(st.lists(ROLES, min_size=1, max_size=4))
    turns = [
        {"from": role, "value": draw(TEXT.filter(bool)) if draw(st.integers(0, 15)) else ""} for role in roles
    ]
    asked = [turn for turn in turns if turn["from"] == "human"]
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3])) if asked else 0):
        turn = draw(st.sampled_from(asked))
        at = draw(st.sampled_from([0, 0, len(turn["value"]) // 2, len(turn["value"])]))
        turn["value"] = (
            turn["value"][:at] + "<image>" + draw(st.sampled_from(["\n", "", " "])) + turn["value"][at:]
        )
    return turns


@pytest.mark.parametrize(
    ("template", "folder"), [*FAMILIES.items(), ("plain", "llama_legacy"), ("plain", "phi2")]
)
def test_conversations_are_encoded_as_the_reference_does(template: str, folder: str) -> None:
    tok, seen = tokenizer(folder), Counter[str]()

    @FEW
    @given(turns=conversations(), has_image=st.booleans())
    @example(turns=talk("<image>\nA?", "B."), has_image=True)
    @example(turns=talk("A?", "B.", "C?"), has_image=False)  # it loses what ends in a question
    @example(turns=[{"from": "system", "value": "A"}], has_image=False)
    def compare(turns: list[dict[str, str]], has_image: bool) -> None:
        has_image = has_image or template == "plain"
        try:
            want = reference.sample(turns, tok, template, has_image)
        except (KeyError, AssertionError, IndexError):
            with pytest.raises(ConversationError):
                encode(turns, tok, template, has_image)
            seen["refused"] += 1
            return
        got = encode(turns, tok, template, has_image)
        assert got.input_ids == want.ids
        # Its own separator in a text can lead it astray unnoticed: where it splits is not where the answer starts.
        astray = template != "plain" and any("ASSISTANT:" in turn["value"] for turn in turns)
        seen["lost" if want.lost else "kept"] += 1
        if not want.lost and not astray:
            assert got.labels == want.labels
        else:
            # What it loses is learnt here: of each answer that says something, its tokens and the turn's end.
            said = sum(
                bool(turn["value"]) for turn in turns[turns[0]["from"] == "gpt" :] if turn["from"] == "gpt"
            )
            assert len(got.turn_ends) == said
            assert all(got.labels[end - 1] == tok.eos_token_id for end in got.turn_ends)
            assert sum(label == tok.eos_token_id for label in got.labels) == said
            assert got.labels[0] == IGNORED

    compare()
    assert seen["kept"]
    assert seen["refused"]
    assert template == "plain" or seen["lost"]


@pytest.mark.parametrize("line", lines("sample")[::5], ids=lambda line: str(line["id"]))
def test_the_retelling_is_the_references(line: dict[str, object]) -> None:
    turns, template = line["conversations"], str(line["version"])
    tok, has_image = tokenizer(str(line["tokenizer"])), bool(line["has_image"])
    if line["error"] or "video" in str(turns) or template not in (*reference.ENDS, "plain"):
        return
    if line["model_max_length"] != 2048 or "many" in str(line["scenario"]):
        return
    told = reference.sample(turns, tok, template, has_image)  # type: ignore[arg-type]
    assert told.ids == line["input_ids"]
    assert told.lost == bool(line["mismatch_warning"])
    assert told.labels == line["labels"]
