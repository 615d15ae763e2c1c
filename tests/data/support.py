"""The recorded cases of the reference data path, and its tokenizers as training sets them up."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

GOLDENS = Path(__file__).parents[1] / "goldens" / "data"

# Template and tokenizer that belong together.
FAMILIES = {
    "phi": "phi2",
    "qwen": "qwen1_5",
    "stablelm": "stablelm2",
    "openchat": "openchat_legacy",
    "mistral": "llama_nolegacy",
    "minicpm": "llama_legacy",
    "v1": "llama_legacy",
    "vicuna": "llama_nolegacy",
}
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def tokenizer(folder: str) -> Any:
    """A recorded tokenizer with the special tokens that the reference gives it before training."""
    loaded = fresh_tokenizer(folder)
    facts = json.loads((GOLDENS / "tokenizers" / "INDEX.json").read_text())[folder]
    loaded.eos_token = facts["eos_token"]
    if loaded.unk_token != facts["unk_token_after_setup"]:
        loaded.add_special_tokens({"unk_token": facts["unk_token_after_setup"]})
    loaded.pad_token = loaded.unk_token
    assert (loaded.pad_token_id, loaded.eos_token_id) == (facts["pad_token_id"], facts["eos_token_id"])
    return loaded


def fresh_tokenizer(folder: str) -> Any:
    """A recorded tokenizer as it lies on disk."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(GOLDENS / "tokenizers" / folder)


@functools.cache
def chat_tokenizer() -> Any:
    """A tokenizer with a chat template of its own (ChatML)."""
    loaded = fresh_tokenizer("qwen1_5")
    loaded.add_special_tokens(
        {"unk_token": "<|extra_0|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    )
    loaded.pad_token = loaded.unk_token
    loaded.chat_template = CHATML
    return loaded


@functools.cache
def lines(kind: str) -> list[dict[str, Any]]:
    """The recorded cases of one kind: sample, batch or infer_prompt."""
    with (GOLDENS / "encoding.jsonl").open() as file:
        return [line for line in map(json.loads, file) if line["kind"] == kind]


def talk(*texts: str) -> list[dict[str, str]]:
    """A conversation from its texts, a human's first."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
