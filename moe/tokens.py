"""Tokenizers: the backbones' own, set up as the reference does, and small ones trained on a run's texts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe.backbones import BackboneError, language
from moe.spec import ModelSpec
from moe.weights import found

Tokenizer = Any  # transformers.PreTrainedTokenizerBase; transformers ships no types


def load_tokenizer(spec: ModelSpec, folder: Path | None = None) -> Tokenizer:
    """The tokenizer with unk, pad and eos as the reference sets them (moellava/train/train.py, ~1325).

    A `tokenizer.json` is taken word for word: transformers 5 would rebuild Llama's and GPT-2's from their
    class and give other ids to text that begins with a space, as every text after an image does.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    row = language(spec)
    if folder is None and spec.tokenizer.startswith("train:"):
        raise BackboneError(
            f"model.tokenizer is {spec.tokenizer!r}: it has to be trained on the run's texts first, "
            "and the run's folder holds none yet"
        )
    name = str(folder) if folder is not None else spec.tokenizer or spec.weights or row.hub

    def load(**kw: Any) -> Tokenizer:
        if not Path(name).is_dir() or (Path(name) / "tokenizer.json").is_file():
            try:
                return PreTrainedTokenizerFast.from_pretrained(name, **kw)
            except (OSError, ValueError):
                if Path(name).is_dir():
                    raise
        return AutoTokenizer.from_pretrained(name, **kw)

    tokenizer = found("model.tokenizer", name, load)
    tokenizer.padding_side = "right"
    if row.eos and row.eos in tokenizer.get_vocab():
        tokenizer.eos_token = row.eos
    if tokenizer.unk_token is None or tokenizer.unk_token == tokenizer.eos_token:
        wanted = row.unk or "<|extra_0|>"
        if wanted in tokenizer.get_vocab():
            tokenizer.unk_token = wanted
        else:
            tokenizer.add_special_tokens({"unk_token": wanted})
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of `size` tokens that never adds a first token; unk and pad are `<unk>`.

    `</s>` and `<|endoftext|>`, the ends of the v1 and phi templates, are one token each; eos is `</s>`.
    """
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "</s>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + len(specials):
        raise BackboneError(
            f"model.tokenizer: train:{size} has no room for the 256 bytes and {len(specials)} specials; "
            f"say train:{len(alphabet) + len(specials)} or more"
        )
    trained = Trained(models.BPE(unk_token=None))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=size, special_tokens=specials, initial_alphabet=sorted(alphabet), show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, unk_token="<unk>", pad_token="<unk>", eos_token="</s>", padding_side="right"
    )
