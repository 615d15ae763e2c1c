"""Token ids word by word, from a memory of words seen before: equal to the tokenizer's own, in a third of the time.

A byte-level BPE cuts a text into pieces with a regular expression and tokenises each alone. By none of those known
here does a piece hold a space after anything but white space, nor does what is on one side of such a space change how
the other is cut. So the ids of a text are those of its words, each taken with the
space before it. Other tokenizers are not remembered: `ByWord.of` gives None for them.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from data.offsets import backend_of

MOST = 1 << 18  # words remembered, about 60 MB
_GAP = re.compile(r"(?<=\S) ")
_AWKWARD = re.compile(r"\s ")  # white space before a space: there a text may not be cut

# Of Qwen2 and of cl100k; that of GPT-2, CodeGen and Phi-2 is built into ByteLevel.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
EXPRESSIONS = tuple(_WORDS + numbers + _REST for numbers in (r"\p{N}", r"\p{N}{1,3}"))

Part = tuple[int, list[str]]  # where it starts in its text, and its words


class ByWord:
    """A byte-level tokenizer's ids by word. `head` is what it puts before a text when asked for specials."""

    def __init__(self, backend: Any, apart: Iterable[str], head: list[int]) -> None:
        self._backend, self._apart, self.head = backend, tuple(apart), head
        self._first: dict[str, list[int]] = {}  # words that start a part
        self._later: dict[str, list[int]] = {}  # words after a space

    @classmethod
    def of(cls, tokenizer: Any, special: bool) -> ByWord | None:
        """For a tokenizer of which all this is known to hold, else None. `special` as in data.offsets."""
        if not getattr(tokenizer, "is_fast", False):
            return None
        backend = backend_of(tokenizer)
        facts = json.loads(backend.to_str())
        added = [token for token in facts["added_tokens"] if token["content"]]
        if not _cuts_before_spaces(facts) or not all(map(_keeps_to_itself, added)):
            return None
        bare = backend.encode("a", add_special_tokens=False).ids
        told = backend.encode("a", add_special_tokens=special).ids
        head = told[: len(told) - len(bare)]
        if told != head + bare or head not in ([], [tokenizer.bos_token_id]):
            return None
        names = [token["content"] for token in added if " " not in token["content"]]
        alone = [name for name in names if not any(name != other and name in other for other in names)]
        return cls(backend, alone, head)

    def parts(self, text: str, places: Iterable[int]) -> list[Part] | None:
        """The words of a text, in parts that start at its start and at `places`; None where it cannot be cut there."""
        cuts = sorted({0, *(place for place in places if 0 < place < len(text))})
        for cut in cuts[1:]:
            before_space = text[cut] == " " and not text[cut - 1].isspace()
            if not before_space and not text.endswith(self._apart, 0, cut):
                return None
        ends = [*cuts[1:], len(text)]
        return [(start, _words(text[start:end])) for start, end in zip(cuts, ends, strict=True)]

    def learn(self, parts: Iterable[Part]) -> None:
        """Tokenise the words that are new."""
        first: dict[str, None] = {}
        later: dict[str, None] = {}
        for _, words in parts:
            first[words[0]] = None
            later.update(dict.fromkeys(words[1:]))
        if len(self._later) + len(self._first) > MOST:
            self._first.clear()
            self._later.clear()
        for known, asked, space in ((self._first, first, ""), (self._later, later, " ")):
            new = [word for word in asked if word not in known]
            found = self._backend.encode_batch([space + word for word in new], add_special_tokens=False)
            known.update((word, encoding.ids) for word, encoding in zip(new, found, strict=True))

    def add(self, words: Sequence[str], ids: list[int]) -> None:
        """Append a part's ids; KeyError where a word has not been learnt."""
        ids += self._first[words[0]]
        ids += itertools.chain.from_iterable(map(self._later.__getitem__, words[1:]))


def _words(text: str) -> list[str]:
    """What stands between the spaces at which a text may be cut."""
    # Only a text with other white space than single spaces has to be looked at closely.
    if "  " in text or (not text.isprintable() and _AWKWARD.search(text)):
        return _GAP.split(text)
    return text.split(" ")


def _cuts_before_spaces(facts: dict[str, Any]) -> bool:
    model, normalizer, pre = facts["model"], facts["normalizer"], facts["pre_tokenizer"]
    if model["type"] != "BPE" or model.get("dropout") or (normalizer or {}).get("type", "NFC") != "NFC":
        return False
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    steps = (pre or {}).get("pretokenizers", [pre])
    last, split = steps[-1] or {}, steps[:-1]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or last["use_regex"] == bool(split):
        return False
    return len(split) < 2 and all(
        step["type"] == "Split"
        and step["pattern"].get("Regex") in EXPRESSIONS
        and step["behavior"] == "Isolated"
        and not step["invert"]
        for step in split
    )


def _keeps_to_itself(token: dict[str, Any]) -> bool:
    """An added token that never reaches over a cut: without a space inside, or white space only, two at least."""
    content = token["content"]
    if token["lstrip"] or token["rstrip"] or token["single_word"]:
        return False
    return " " not in content or (content.isspace() and len(content) > 1)
