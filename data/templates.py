"""Conversation templates: how turns become one text, and which characters of it are learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from data.words import is_text

IMAGE = "<image>"
VIDEO = "<video>"
MOST_IMAGES = 16  # adjacent placeholders at the head of a turn that the reference keeps
FRAMES = 8  # placeholders that a video becomes

Conversation = Sequence[Mapping[str, str]]
Span = tuple[int, int]

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_ROLES = {"human": "user", "gpt": "assistant"}
_FENCE = "\ue000"  # of no script: what a mark in a text is made of
# Some chat templates say what day it is, and the index of today's text would not be tomorrow's. It is this one,
# which Llama 3's say where they cannot know.
_DAY = datetime(2024, 7, 26)
_REWRITTEN = (
    "the tokenizer's chat template rewrites earlier turns, or asks for an answer otherwise than it writes one, so "
    "answers cannot be told apart in it; use one of the named templates"
)
_ENDLESS = (
    "the tokenizer's chat template puts nothing after an answer, so its end cannot be learnt; use one of the named "
    "templates"
)


class ConversationError(ValueError):
    """A conversation that cannot be trained on; the message says why in words."""


@dataclass(frozen=True)
class Template:
    """How turns become text: `end` closes each answer; chat takes the tokenizer's own template instead."""

    style: Literal["rounds", "plain", "chat"] = "rounds"
    system: str = _SYSTEM
    user: str = "USER"
    assistant: str = "ASSISTANT"
    separator: str = " "
    end: str = "</s>"


# Texts and separators: MoE-LLaVA, moellava/conversation.py; checkpoints depend on each character of them.
TEMPLATES: dict[str, Template] = {
    "plain": Template(style="plain", system="", end="\n"),
    "phi": Template(end="<|endoftext|>"),
    "qwen": Template(end="<|endoftext|>"),
    "stablelm": Template(end="<|endoftext|>"),
    "openchat": Template(end="<|end_of_turn|>"),
    "mistral": Template(),
    "minicpm": Template(),
    "v1": Template(),
    "vicuna": Template(),
    "vicuna_v1": Template(),
    "llava_v1": Template(system=_SYSTEM.replace("user", "human")),
    "chat": Template(style="chat", end=""),
}


def named(name: str) -> Template:
    """The template of that name; ConversationError says which there are."""
    if name not in TEMPLATES:
        raise ConversationError(f"no template is called {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def render(
    conversations: Conversation, tokenizer: Any, template: Template, has_image: bool, ask: bool = False
) -> tuple[str, list[Span]]:
    """The text and the character spans to learn; with `ask`, up to where the assistant speaks."""
    if not conversations:
        raise ConversationError("the conversation is empty")
    turns = [_turn(turn, number, has_image) for number, turn in enumerate(conversations, 1)]
    if template.style == "plain":
        if not has_image:
            raise ConversationError("template plain is for captions, and the record has no picture")
        return _plain(turns, ask)
    if template.style == "chat":
        return _chat(turns, tokenizer, ask)
    return _rounds(turns, template, ask)


def _turn(turn: Mapping[str, str], number: int, has_image: bool) -> tuple[str, str]:
    role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
    if not isinstance(role, str) or not isinstance(text, str):
        raise ConversationError(f"turn {number} needs 'from' and a text in 'value'")
    if not is_text(text):
        raise ConversationError(f"turn {number} has half of a character (a lone surrogate) in its text")
    if has_image:
        # Both limits are of turns that start with a placeholder (MoE-LLaVA, train.py, preprocess_multimodal).
        if text.startswith((IMAGE, VIDEO)):
            if (count := text.count(IMAGE)) > MOST_IMAGES:
                text = text.replace(IMAGE * count, IMAGE * MOST_IMAGES).strip()
            if text.count(VIDEO) > 1:
                raise ConversationError(f"turn {number} has more than one {VIDEO}")
        text = text.replace(VIDEO, IMAGE * FRAMES)
    return role, text


def _plain(turns: list[tuple[str, str]], ask: bool) -> tuple[str, list[Span]]:
    """Image, caption, line break: the roles are not looked at, the question's words are dropped."""
    if len(turns) != (1 if ask else 2):
        raise ConversationError(
            f"template plain takes one question and one caption, here are {len(turns)} turns"
        )
    if IMAGE not in turns[0][1]:
        raise ConversationError(f"template plain needs {IMAGE} in the first turn")
    if ask:
        return IMAGE, []
    text = f"{IMAGE}{turns[1][1]}\n"
    return text, [(len(IMAGE), len(text))]


def _alternating(turns: list[tuple[str, str]], roles: Mapping[str, str]) -> list[tuple[str, str]]:
    """Turns from the first human one on, as (role, text); ConversationError unless the speakers alternate."""
    for number, (role, _) in enumerate(turns, 1):
        if role not in roles:
            raise ConversationError(f"turn {number} is from {role!r}; it must be from {' or '.join(roles)}")
    if turns[0][0] == "gpt":
        turns = turns[1:]
    for number, (role, _) in enumerate(turns):
        if role != ("human", "gpt")[number % 2]:
            raise ConversationError(f"{role} speaks twice in a row; human and gpt must take turns")
    return turns


def _rounds(turns: list[tuple[str, str]], template: Template, ask: bool) -> tuple[str, list[Span]]:
    text = template.system + template.separator
    spans: list[Span] = []
    for role, words in _alternating(turns, _ROLES):
        text += template.user if role == "human" else template.assistant
        text += ":"
        start = len(text)
        if words:  # an empty turn has neither space nor separator, and nothing to learn
            text += f" {words}" + (template.separator if role == "human" else template.end)
            if role == "gpt":
                spans.append((start, len(text)))
    return (text + template.assistant + ":" if ask else text), spans


def _chat(turns: list[tuple[str, str]], tokenizer: Any, ask: bool) -> tuple[str, list[Span]]:
    """The tokenizer's own template; an answer is what it writes in the place of a mark that stands for one.

    So each turn is looked at where it stands: templates write the last answer otherwise than earlier ones.
    """
    head: list[dict[str, str]] = []
    if turns[0][0] == "system":
        head = [{"role": "system", "content": turns[0][1]}]
        turns = turns[1:]
    if not turns:
        raise ConversationError("the conversation has a system turn only")
    messages = head + [{"role": _ROLES[r], "content": words} for r, words in _alternating(turns, _ROLES)]
    words = [message["content"] for message in messages]
    spoken = [at for at, message in enumerate(messages) if message["role"] == "assistant" and words[at]]

    def text_of(said: Sequence[str], ask: bool = False, thinking: bool = False) -> str:
        given = [{**message, "content": own} for message, own in zip(messages, said, strict=False)]
        return _told(tokenizer, given, ask, thinking)

    text = text_of(words, ask)
    if ask or not spoken:
        return text, []
    fence, last = _FENCE, spoken[-1]
    while any(fence in said for said in words):
        fence += _FENCE
    marks = {at: f"{fence}{at}{fence}" for at in spoken}
    marked = [marks.get(at, said) for at, said in enumerate(words)]
    whole = text_of(marked)
    closed = whole if last == len(words) - 1 else text_of(marked[: last + 1])
    asked = text_of(marked[:last], ask=True)
    before, _, end = closed.partition(marks[last])
    if not before.startswith(asked) or any(whole.count(mark) != 1 for mark in marks.values()):
        raise ConversationError(_REWRITTEN)
    lead, end = before[len(asked) :], end.rstrip()  # the line break after a turn's end is not learnt
    # Phi's close the whole text with eos: only the last answer is followed by it.
    ends = [each for each in (end, end.removesuffix(str(tokenizer.eos_token)).rstrip()) if each]
    built, at = "", 0
    spans: list[Span] = []
    for place, mark in marks.items():
        first = whole.index(mark)
        rest = whole[first + len(mark) :]
        told = text
        if len(marks) > 1:
            told = text_of([*marked[:place], words[place], *marked[place + 1 :]])
        start, learnt = first, len(lead) if whole.endswith(lead, 0, first) else 0
        if not told.startswith(whole[:first]):
            # It has reasoning of its own, which stands where the template has none to write.
            opened = text_of(marked[:place], ask=True, thinking=True)
            start, learnt = (len(opened) if whole.startswith(opened) else first), 0
        closing = next((each for each in ends if rest.startswith(each)), None)
        if not (told.startswith(whole[:start]) and told.endswith(rest)) or closing is None:
            raise ConversationError(_REWRITTEN if ends else _ENDLESS)
        built += whole[at:start]
        first_learnt = len(built) - learnt
        built += told[start : len(told) - len(rest)]
        spans.append((first_learnt, len(built) + len(closing)))
        at = first + len(mark)
    if built + whole[at:] != text:
        raise ConversationError(_REWRITTEN)
    return text, spans


def _told(tokenizer: Any, messages: list[dict[str, str]], ask: bool, thinking: bool) -> str:
    """Messages in the tokenizer's template; ConversationError where it does not take them."""
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=ask,
                enable_thinking=thinking,
                strftime_now=_DAY.strftime,
            )
        )
    except Exception as error:  # a chat template is a program of someone else's
        kind = type(error).__name__
        what = str(error) if kind == "TemplateError" else f"{kind}: {error}"
        raise ConversationError(f"the tokenizer's chat template refuses the conversation: {what}") from error
