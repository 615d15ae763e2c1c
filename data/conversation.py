"""Turn a record's conversation into token ids and labels, and into the prompt that asks for its next answer.

The text is built whole and its answers are marked by character, then the tokenizer's own offsets say which
tokens they are. The reference system counts tokens of separately tokenised pieces instead and loses every
sample for which the counts disagree; the ids here equal its ids, and so do the labels wherever it did not
lose the sample.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from data.offsets import Tokens, tokenized, tokenized_many

IMAGE_ID = -200  # stands in input_ids for the patches of one image
IGNORED = -100  # a label that is not learnt
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


@dataclass(frozen=True)
class Encoded:
    """One conversation in tokens: ids with one -200 an image, labels with -100 where nothing is learnt.

    A placeholder inside an answer keeps -200 as its label too, as in the reference; the collator masks it.
    `turn_ends` holds, for each answer, the index after its last token.
    """

    input_ids: list[int]
    labels: list[int]
    turn_ends: list[int] = field(default_factory=list)


def encode(conversations: Conversation, tokenizer: Any, template: str, has_image: bool = True) -> Encoded:
    """Ids and labels of a whole conversation, untruncated; each answer and its end are learnt, nothing else.

    Raises ConversationError where the reference raises and then takes a random other sample.
    """
    text, spans = _render(conversations, tokenizer, _template(template), has_image)
    return _encoded(text, spans, _tokens(text, spans, tokenizer, template, has_image))


def encode_many(
    batch: Sequence[tuple[Conversation, bool]], tokenizer: Any, template: str
) -> list[Encoded | ConversationError]:
    """As `encode` of each (conversations, has_image), on all cores where the tokenizer can."""
    chosen = _template(template)
    results: list[Encoded | ConversationError] = []
    if not getattr(tokenizer, "is_fast", False):
        for conversations, has_image in batch:
            try:
                results.append(encode(conversations, tokenizer, template, has_image))
            except ConversationError as error:
                results.append(error)
        return results
    texts: list[tuple[str, list[Span], bool] | ConversationError] = []
    for conversations, has_image in batch:
        try:
            texts.append((*_render(conversations, tokenizer, chosen, has_image), has_image))
        except ConversationError as error:
            texts.append(error)
    wanted: dict[str, None] = {}  # most samples with an image start alike
    for text in texts:
        if not isinstance(text, ConversationError):
            wanted.update(dict.fromkeys(_chunks(text[0], text[2])))
    known = dict(zip(wanted, tokenized_many(tokenizer, list(wanted), chosen.style != "chat"), strict=True))
    for text in texts:
        if isinstance(text, ConversationError):
            results.append(text)
        else:
            chunks = _chunks(text[0], text[2])
            results.append(
                _encoded(text[0], text[1], _joined(chunks, map(known.__getitem__, chunks), tokenizer, chosen))
            )
    return results


def _encoded(text: str, spans: Sequence[Span], tokens: Tokens) -> Encoded:
    ids, starts = tokens
    labels = [IGNORED] * len(ids)
    ends: list[int] = []
    for first, last in spans:
        # No token crosses a span's ends: a colon stands before it, the turn's end is a token of its own.
        left, right = bisect_left(starts, first), bisect_left(starts, last)
        labels[left:right] = ids[left:right]
        if right > left:
            ends.append(right)
    return Encoded(ids, labels, ends)


def prompt(conversations: Conversation, tokenizer: Any, template: str, has_image: bool = True) -> list[int]:
    """Ids that end where the assistant's next answer starts; answers after the last question are dropped."""
    chosen = _template(template)
    last = max((i for i, turn in enumerate(conversations) if turn.get("from") == "human"), default=-1)
    if last < 0:
        raise ConversationError("the conversation has no human turn, so there is nothing to answer")
    text, _ = _render(conversations[: last + 1], tokenizer, chosen, has_image, ask=True)
    return _tokens(text, [], tokenizer, template, has_image)[0]


def _template(name: str) -> Template:
    if name not in TEMPLATES:
        raise ConversationError(f"no template is called {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def _render(
    conversations: Conversation, tokenizer: Any, template: Template, has_image: bool, ask: bool = False
) -> tuple[str, list[Span]]:
    """The text and the character spans to learn; with `ask`, up to where the assistant speaks."""
    if not conversations:
        raise ConversationError("the conversation is empty")
    turns = [_turn(turn, number, has_image) for number, turn in enumerate(conversations, 1)]
    if template.style == "plain":
        return _plain(turns, ask)
    if template.style == "chat":
        return _chat(turns, tokenizer, ask)
    return _rounds(turns, template, ask)


def _turn(turn: Mapping[str, str], number: int, has_image: bool) -> tuple[str, str]:
    role, text = turn.get("from"), turn.get("value")
    if role is None or not isinstance(text, str):
        raise ConversationError(f"turn {number} needs 'from' and a text in 'value'")
    if has_image and text.startswith(IMAGE) and (count := text.count(IMAGE)) > MOST_IMAGES:
        text = text.replace(IMAGE * count, IMAGE * MOST_IMAGES)
    if has_image and VIDEO in text:
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
    """The tokenizer's own template, rendered turn by turn: an answer is what its turn adds to the prompt."""
    head: list[dict[str, str]] = []
    if turns[0][0] == "system":
        head = [{"role": "system", "content": turns[0][1]}]
        turns = turns[1:]
    if not turns:
        raise ConversationError("the conversation has a system turn only")
    messages = head + [{"role": _ROLES[r], "content": words} for r, words in _alternating(turns, _ROLES)]

    def text_of(count: int, ask: bool) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask))

    text = text_of(len(messages), ask)
    spans: list[Span] = []
    for count, message in enumerate(messages):
        if message["role"] == "assistant" and message["content"]:
            before, after = text_of(count, True), text_of(count + 1, False)
            if not (after.startswith(before) and text.startswith(after)):
                raise ConversationError(
                    "the tokenizer's chat template rewrites earlier turns, so answers cannot be told "
                    "apart in it; "
                    "use one of the named templates"
                )
            spans.append(
                (len(before), len(after.rstrip("\n")))
            )  # the line break after the turn's end is not learnt
    return text, spans


def _chunks(text: str, has_image: bool) -> list[str]:
    return text.split(IMAGE) if has_image else [text]


def _tokens(text: str, spans: Sequence[Span], tokenizer: Any, template: str, has_image: bool) -> Tokens:
    """Ids and first characters; chunks between images are tokenised alone, as the reference does."""
    chosen = TEMPLATES[template]
    chunks = _chunks(text, has_image)
    base, pieces = 0, []
    for chunk in chunks:
        places = [place - base for span in spans for place in span]
        pieces.append(tokenized(tokenizer, chunk, chosen.style != "chat", places))
        base += len(chunk) + len(IMAGE)
    return _joined(chunks, pieces, tokenizer, chosen)


def _joined(chunks: Sequence[str], pieces: Iterable[Tokens], tokenizer: Any, template: Template) -> Tokens:
    ids: list[int] = []
    starts: list[int] = []
    base, bos = 0, False
    for number, (chunk, (more, at)) in enumerate(zip(chunks, pieces, strict=True)):
        if number:
            ids.append(IMAGE_ID)
            starts.append(base)
            base += len(IMAGE)
        else:
            # A chat template writes its own BOS. Else each chunk gets one where the tokenizer adds it; only
            # the first stays.
            bos = template.style != "chat" and bool(more) and more[0] == tokenizer.bos_token_id
        skip = 1 if number and bos else 0
        ids += more[skip:]
        starts += [base + start for start in at[skip:]]
        base += len(chunk)
    return ids, starts


def tokenizer_faults(tokenizer: Any, template: str) -> list[str]:
    """What is wrong with this tokenizer under this template, in words; empty when training on it is sound."""
    chosen = _template(template)
    if chosen.style == "chat" and not getattr(tokenizer, "chat_template", None):
        return ["template chat is the tokenizer's own, and this tokenizer has none; choose a named template"]
    faults = [*_special_faults(tokenizer, chosen)]
    turns = [
        {"from": "human", "value": f"{IMAGE}\nWhat is this?"},
        {"from": "gpt", "value": "A model."},
        {"from": "human", "value": "Which data?"},
        {"from": "gpt", "value": "The training data."},
    ]
    answers = ["A model.", "The training data."]
    if chosen.style == "plain":
        turns, answers = turns[:2], answers[:1]
    try:
        encoded = encode(turns, tokenizer, template)
        asked = prompt(turns, tokenizer, template)
    except ValueError as error:
        return [*faults, str(error)]
    except Exception as error:  # a chat template is a program of someone else's
        return [*faults, f"the tokenizer's chat template fails: {type(error).__name__}: {error}"]
    if encoded.input_ids[: len(asked)] != asked:
        faults.append(
            "the prompt is not how a training sample starts: the model would be asked other than it learns"
        )
    start = 0
    for answer, end in zip(answers, encoded.turn_ends, strict=False):
        learnt = [label for label in encoded.labels[start:end] if label != IGNORED]
        told = tokenizer.decode(learnt, skip_special_tokens=False).strip()
        start = end
        if not told.startswith(answer) or told.removeprefix(answer).strip() != _end(tokenizer, chosen, told):
            faults.append(f"the answer {answer!r} is learnt as {told!r}")
    if len(encoded.turn_ends) != len(answers):
        faults.append(f"of {len(answers)} answers {len(encoded.turn_ends)} are learnt")
    return faults


def _end(tokenizer: Any, template: Template, told: str) -> str:
    """What must follow an answer; a chat template ends turns as it likes, but not without a word."""
    if template.style != "chat":
        return template.end.strip()
    return next((str(t) for t in tokenizer.all_special_tokens if told.endswith(str(t))), "a turn's end")


def _special_faults(tokenizer: Any, template: Template) -> Iterator[str]:
    pad, eos, bos = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id
    if eos is None:
        yield "there is no eos token: generation would never stop; set tokenizer.eos_token"
    if pad is None:
        yield "there is no pad token: samples cannot be batched; set it to the unk or a reserved token"
    elif pad == eos:
        yield (
            f"pad equals eos: {tokenizer.eos_token!r} (id {eos}) would be taken for padding wherever a "
            "turn ends; "
            "set pad to the unk token, or to a reserved one"
        )
    plain, told = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    if told not in (plain, [bos, *plain]):
        yield (
            f"the tokenizer makes {told} of a text whose tokens are {plain}: it may put one BOS in front "
            "and nothing "
            "else; turn add_eos_token off"
        )
    if template.style == "rounds":
        end = tokenizer(template.end, add_special_tokens=False)["input_ids"]
        if len(end) != 1:
            yield (
                f"the template ends turns with {template.end!r}, which is {len(end)} tokens here, not "
                "one; choose the "
                "template that belongs to this tokenizer"
            )
        elif end[0] != eos:
            yield (
                f"the template ends turns with {template.end!r} (id {end[0]}), the tokenizer's eos is "
                f"{tokenizer.eos_token!r} (id {eos}): generation would not stop there; set eos_token to "
                "the former"
            )
