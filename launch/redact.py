"""Take secrets out of what leaves this machine: settings, environments, texts.

Two nets: names that say they hold a secret, and values that look like one whatever their name.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from launch.once import once

HIDDEN = "[hidden]"
PLANTED = "holds a secret"  # what a fault says of a setting
FOLDERS = ("PWD", "OLDPWD")  # every shell's folder and the one before it: paths of messages begin with them

_NAME = re.compile(
    r"(?:^|[_\-.])(?:secrets?|tokens?|passw(?:or)?d|passphrase|pwd|api_?keys?|access_?keys?|private_?keys?|jwt|cookie"
    r"|credentials?|auth|key|dsn)(?:$|[_\-.])",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{16,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{12,}|AIza[\w-]{30,}|wandb_v1_\w{16,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
)
_URL = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
_ASSIGNMENT = re.compile(r"([A-Za-z_][\w.-]*)(\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s;&|]+)")
_OPTION = re.compile(r"(--?[A-Za-z][\w.-]*)(\s+)(\"[^\"]*\"|'[^']*'|[^\s;&|-][^\s;&|]*)")
_BEARER = re.compile(r"(?i)(bearer|basic)(\s+)[\w.~+/=-]{8,}")


@lru_cache(maxsize=4096)
def secret_name(name: str) -> bool:
    """Whether a setting or an environment variable of this name is likely to hold a secret."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)  # apiKey -> api_Key
    return bool(_NAME.search(words)) and not name.lower().endswith(("_file", "_path", "_dir"))


def environment_secrets(environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The values of the environment's secrets that are long enough to be recognised in other texts."""
    environment = os.environ if environment is None else environment
    secret = (
        (name, value) for name, value in environment.items() if secret_name(name) and name not in FOLDERS
    )
    return tuple({value for _, value in secret if len(value) >= 8})


def redact(value: Any, known: tuple[str, ...] | None = None) -> Any:
    """A copy of `value` (mappings, lists, texts) without secrets; `known` values are hidden anywhere."""
    known = environment_secrets() if known is None else known
    if isinstance(value, Mapping):
        return {
            str(key): HIDDEN
            if secret_name(str(key)) and isinstance(item, str) and item
            else redact(item, known)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact(item, known) for item in value]
    if isinstance(value, str):
        return redact_text(value, known)
    return value


def redact_text(text: str, known: tuple[str, ...] = ()) -> str:
    """`text` without the known values, without what has the shape of a secret, without `NAME=secret`."""
    for secret in known:
        text = text.replace(secret, HIDDEN)
    text = _URL.sub(HIDDEN, _VALUE.sub(HIDDEN, text))
    text = _BEARER.sub(lambda match: match[1] + match[2] + HIDDEN, text)
    return _ASSIGNMENT.sub(_hide, _OPTION.sub(_hide, text))


def planted(value: Any, path: str = "") -> Iterator[str]:
    """The dotted paths of settings that hold a secret written out; `$NAME`, or a file's path, is none."""
    if dataclasses.is_dataclass(value):
        for place in _planted(value):
            yield f"{path}.{place}" if path and place else path or place
    elif isinstance(value, Mapping):
        for key, item in value.items():
            place = f"{path}.{key}" if path else str(key)
            if isinstance(item, str) and secret_name(str(key)) and _literal(item):
                yield place
            else:
                yield from planted(item, place)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from planted(item, path)
    elif isinstance(value, str) and _tells(value):
        yield path


@once
def _planted(section: Any) -> tuple[str, ...]:
    """Those of a section of a spec."""
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    return tuple(planted(values))


@lru_cache(maxsize=4096)
def _tells(value: str) -> bool:
    """Whether there is a secret in the text."""
    said = [match for rule in (_ASSIGNMENT, _OPTION) for match in rule.finditer(value)]
    named = any(secret_name(match[1]) and _literal(match[3].strip("\"'")) for match in said)
    return bool(named or _VALUE.search(value) or _URL.search(value) or _BEARER.search(value))


def _literal(text: str) -> bool:
    return len(text) >= 6 and not text.startswith(("$", "`", "/", "~", "<"))


def _hide(match: re.Match[str]) -> str:
    return match[1] + match[2] + HIDDEN if secret_name(match[1]) else match[0]
