"""A tokenizer folder read with the `tokenizers` library alone, for the tools that prepare data.

It gives the ids that the training's own class gives for the same tokenizer.json, and so the same index.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


class TokenizerFile:
    """As much of a fast tokenizer as data preparation needs."""

    is_fast = True

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"{folder}: there is no tokenizer.json; name a run's tokenizer folder, or a model's folder"
            )
        try:
            self.backend_tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path}: not a tokenizer that can be read ({error}); copy it again") from None
        said: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                try:
                    said |= json.loads((folder / name).read_text(encoding="utf-8"))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{folder / name}: not a JSON object ({error}); copy it again") from None
        self.chat_template = said.get("chat_template")
        if isinstance(self.chat_template, list):  # several, by name
            named = {each["name"]: each["template"] for each in self.chat_template}
            self.chat_template = named.get("default")
        if (folder / "chat_template.jinja").is_file():  # it goes before the configuration's
            self.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self._special: dict[str, str] = {
            name: token["content"] if isinstance(token, dict) else token
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (token := said.get(name)) is not None
        }

        if "unk_token" in self._special:
            self._special["pad_token"] = self._special["unk_token"]  # as training does, for every backbone

    def __getattr__(self, name: str) -> Any:
        """bos_token, bos_token_id and their like; None when the tokenizer has no such token."""
        if name.removesuffix("_id") not in ("bos_token", "eos_token", "pad_token", "unk_token"):
            raise AttributeError(name)
        token = self._special.get(name.removesuffix("_id"))
        if not name.endswith("_id") or token is None:
            return token
        return self.backend_tokenizer.token_to_id(token)

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size())

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        encoding = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return {"input_ids": encoding.ids}

    @property
    def all_special_tokens(self) -> list[str]:
        """The texts that become one token wherever they stand."""
        added = self.backend_tokenizer.get_added_tokens_decoder().values()
        return sorted({token.content for token in added if token.special} | set(self._special.values()))

    def get_vocab(self) -> dict[str, int]:
        """Tokens and their ids."""
        return dict(self.backend_tokenizer.get_vocab())

    def get_added_vocab(self) -> dict[str, int]:
        """The tokens that are no part of the model, special or not, and their ids."""
        added = self.backend_tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items()}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of ids."""
        return str(self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        **settings: Any,
    ) -> str:
        """A conversation in the tokenizer's own template, as text."""
        given = {**self._special, **settings, "add_generation_prompt": add_generation_prompt}
        return str(
            _compiled(self.chat_template or "").render(messages=messages, tools=None, documents=None, **given)
        )


@functools.lru_cache(4)
def _compiled(template: str) -> Any:
    """A chat template with what transformers gives one: its settings, tags, filter and functions."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what is the assistant's; to us it is text as any other."""

        tags = {"generation"}  # noqa: RUF012 - jinja declares it so

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)  # jinja's own escapes for HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)
