"""Token ids of a text together with the character each token starts at.

Rust-backed tokenizers report offsets themselves. Python ones (Qwen's and StableLM's own tiktoken classes) do
not: for them the text is tokenised up to each place of interest, which is exact when no token crosses that
place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Tokens = tuple[list[int], list[int]]  # ids, and each one's first character


def tokenized(tokenizer: Any, text: str, special: bool, places: Sequence[int]) -> Tokens:
    """Ids and first characters; a Python tokenizer's are only exact relative to `places`.

    `special` lets the tokenizer add its BOS. Raises ValueError where a Python tokenizer merges across a
    place.
    """
    if not getattr(tokenizer, "is_fast", False):
        return _by_prefix(tokenizer, text, special, places)
    encoding = backend_of(tokenizer).encode(text, add_special_tokens=special)
    return encoding.ids, [start for start, _ in encoding.offsets]


def tokenized_many(tokenizer: Any, texts: list[str], special: bool) -> Iterator[Tokens]:
    """As `tokenized` of each text, for a Rust-backed tokenizer; its threads share the work."""
    for encoding in backend_of(tokenizer).encode_batch(texts, add_special_tokens=special):
        yield encoding.ids, [start for start, _ in encoding.offsets]


def backend_of(tokenizer: Any) -> Any:
    """The Rust tokenizer; a call such as tokenizer(text, truncation=True) leaves its settings in it."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend


def _by_prefix(
    tokenizer: Any, text: str, special: bool, places: Sequence[int]
) -> tuple[list[int], list[int]]:
    def ids_of(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=special, verbose=False)["input_ids"])

    ids = ids_of(text)
    starts = [0] * len(ids)
    for place in sorted({p for p in places if 0 < p <= len(text)}):
        head = ids_of(text[:place])
        if ids[: len(head)] != head:
            raise ValueError(
                f"{type(tokenizer).__name__} merges across {text[max(0, place - 12) : place + 12]!r}, so "
                "answers "
                "cannot be told apart; load the tokenizer's fast version (tokenizer.json)"
            )
        starts[len(head) :] = [place] * (len(ids) - len(head))
    return ids, starts
