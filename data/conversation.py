"""Turn a record's conversation into token ids and labels, and into the prompt that asks for its next answer.

The text is built whole and its answers are marked by character, then the tokenizer's own offsets say which
tokens they are. The reference system counts tokens of separately tokenised pieces instead and loses every
sample for which the counts disagree; the ids here equal its ids, and so do the labels wherever it did not
lose the sample.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from data.by_word import ByWord, Part
from data.offsets import Tokens, tokenized, tokenized_many
from data.templates import (
    IMAGE,
    MOST_IMAGES,
    TEMPLATES,
    Conversation,
    ConversationError,
    Span,
    Template,
    named,
    render,
)

__all__ = [
    "IGNORED",
    "IMAGE",
    "IMAGE_ID",
    "MOST_IMAGES",
    "TEMPLATES",
    "Conversation",
    "ConversationError",
    "Encoded",
    "Template",
    "answer_end",
    "encode",
    "encode_many",
    "prompt",
    "tokenizer_faults",
]

IMAGE_ID = -200  # stands in input_ids for the patches of one image
IGNORED = -100  # a label that is not learnt


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
    text, spans = render(conversations, tokenizer, named(template), has_image)
    ids, starts = _tokens(text, spans, tokenizer, template, has_image)
    return _encoded(ids, spans, partial(bisect_left, starts))


def encode_many(
    batch: Sequence[tuple[Conversation, bool]], tokenizer: Any, template: str, memory: ByWord | None = None
) -> list[Encoded | ConversationError]:
    """As `encode` of each (conversations, has_image), on all cores where the tokenizer can.

    `memory`, of this tokenizer and template, is what batches before this one taught; `remembering` makes one.
    """
    chosen = named(template)
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
            texts.append((*render(conversations, tokenizer, chosen, has_image), has_image))
        except ConversationError as error:
            texts.append(error)
    quick: list[Encoded | None] = [None] * len(texts)
    if memory:
        new: dict[int, list[list[Part]]] = {}
        for at, text in enumerate(texts):
            if isinstance(text, ConversationError) or (chunks := _cut(*text, memory)) is None:
                continue
            try:
                quick[at] = _remembered(text[0], text[1], chunks, memory, tokenizer, chosen)
            except KeyError:
                new[at] = chunks
        memory.learn(part for chunks in new.values() for parts in chunks for part in parts)
        for at, chunks in new.items():
            text = texts[at]
            assert not isinstance(text, ConversationError)
            quick[at] = _remembered(text[0], text[1], chunks, memory, tokenizer, chosen)
    wanted: dict[str, None] = {}  # most samples with an image start alike
    for text, done in zip(texts, quick, strict=True):
        if not done and not isinstance(text, ConversationError):
            wanted.update(dict.fromkeys(_chunks(text[0], text[2])))
    known = dict(zip(wanted, tokenized_many(tokenizer, list(wanted), chosen.style != "chat"), strict=True))
    for text, done in zip(texts, quick, strict=True):
        if done or isinstance(text, ConversationError):
            results.append(done or text)  # type: ignore[arg-type]
        else:
            parts = _chunks(text[0], text[2])
            ids, starts = _joined(parts, map(known.__getitem__, parts), tokenizer, chosen)
            results.append(_encoded(ids, text[1], partial(bisect_left, starts)))
    return results


def remembering(tokenizer: Any, template: str) -> ByWord | None:
    """A memory for `encode_many`; None for a tokenizer of which words cannot be taken one by one."""
    return ByWord.of(tokenizer, named(template).style != "chat")


def _cut(text: str, spans: Sequence[Span], has_image: bool, memory: ByWord) -> list[list[Part]] | None:
    """The words of each chunk, in parts that start where answers start and end; None where there is no cut."""
    base, found = 0, []
    places = [place for span in spans for place in span]
    for chunk in _chunks(text, has_image):
        parts = memory.parts(chunk, [place - base for place in places])
        if parts is None:
            return None
        found.append(parts)
        base += len(chunk) + len(IMAGE)
    return found


def _remembered(
    text: str,
    spans: Sequence[Span],
    chunks: Sequence[Sequence[Part]],
    memory: ByWord,
    tokenizer: Any,
    template: Template,
) -> Encoded | None:
    """As `_joined` and `_encoded` do; None where a text itself starts with BOS, which `_joined` looks at."""
    ids: list[int] = []
    marks: dict[int, int] = {}  # of places in the text: the first token there
    base = 0
    for number, (chunk, parts) in enumerate(zip(text.split(IMAGE, len(chunks) - 1), chunks, strict=True)):
        if number:
            ids.append(IMAGE_ID)
            base += len(IMAGE)
        else:
            ids += memory.head  # BOS or nothing: later chunks lose theirs
        for start, words in parts:
            marks[base + start] = len(ids)
            memory.add(words, ids)
        base += len(chunk)
        marks.setdefault(base, len(ids))
        if (
            not number
            and not memory.head
            and template.style != "chat"
            and ids[:1] == [tokenizer.bos_token_id]
        ):
            return None
    return _encoded(ids, spans, marks.__getitem__)


def _encoded(ids: list[int], spans: Sequence[Span], token_at: Callable[[int], int]) -> Encoded:
    """`token_at` gives the first token at or after a place in the text."""
    labels = [IGNORED] * len(ids)
    ends: list[int] = []
    for first, last in spans:
        # No token crosses a span's ends: a colon stands before it, the turn's end is a token of its own.
        left, right = token_at(first), token_at(last)
        labels[left:right] = ids[left:right]
        if right > left:
            ends.append(right)
    return Encoded(ids, labels, ends)


def prompt(conversations: Conversation, tokenizer: Any, template: str, has_image: bool = True) -> list[int]:
    """Ids that end where the assistant's next answer starts; answers after the last question are dropped."""
    chosen = named(template)
    asked = [isinstance(turn, Mapping) and turn.get("from") == "human" for turn in conversations or []]
    last = max((place for place, human in enumerate(asked) if human), default=-1)
    if last < 0:
        raise ConversationError("the conversation has no human turn, so there is nothing to answer")
    text, _ = render(conversations[: last + 1], tokenizer, chosen, has_image, ask=True)
    return _tokens(text, [], tokenizer, template, has_image)[0]


def answer_end(tokenizer: Any, template: str) -> int | None:
    """The id of the token that ends an answer: a chat template's turns may end before, or without, eos."""
    if named(template).style != "chat":
        end: int | None = tokenizer.eos_token_id
        return end
    talk = [{"from": role, "value": "A"} for role in ("human", "gpt", "human", "gpt")]
    encoded = encode(talk, tokenizer, template, has_image=False)
    return encoded.input_ids[
        encoded.turn_ends[0] - 1
    ]  # what follows the last answer may close the whole text


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
    chosen = named(template)
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
    if encoded.input_ids[: len(asked)] != asked:
        faults.append(
            "the prompt is not how a training sample starts: the model would be asked other than it learns"
        )
    start = 0
    for answer, end in zip(answers, encoded.turn_ends, strict=False):
        learnt = [label for label in encoded.labels[start:end] if label != IGNORED]
        told = tokenizer.decode(learnt, skip_special_tokens=False).strip()
        start = end
        before, _, after = told.partition(answer)
        # What a chat template has between the prompt and an answer, an empty thought, is learnt with it.
        if (before and chosen.style != "chat") or not _is_end(after.strip(), tokenizer, chosen):
            faults.append(f"the answer {answer!r} is learnt as {told!r}")
    if len(encoded.turn_ends) != len(answers):
        faults.append(f"of {len(answers)} answers {len(encoded.turn_ends)} are learnt")
    return faults


def _is_end(told: str, tokenizer: Any, template: Template) -> bool:
    """Whether this may follow an answer; a chat template ends turns as it likes, but not without a token for it."""
    if template.style != "chat":
        return told == template.end.strip()
    left = told
    for token in sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True):
        left = left.replace(token, "")
    return bool(told) and not left.strip()


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
