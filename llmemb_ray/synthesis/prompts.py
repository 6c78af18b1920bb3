"""The wording of all requests: this package's own, or a user's.

Invariant: a prompt names every placeholder of its family and no other, so that nothing that is drawn goes unsaid. Replaced are names in braces
(``{language}``) in one pass; other braces, as those of JSON, stay.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from llmemb_ray.errors import ConfigError, NotFound
from llmemb_ray.storage import Access, absolute, locate, redact
from llmemb_ray.synthesis.families import ASYMMETRIC, FAMILIES, Family
from llmemb_ray.written import parse_yaml

_NAME = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """brainstorm: text by asymmetric family; generate: text by family, with placeholders."""

    brainstorm: Mapping[str, str]
    generate: Mapping[str, str]

    @classmethod
    def load(cls, url: str | None = None, access: Access | None = None) -> Prompts:
        """The package's prompts, those that a YAML file names replaced by its own.

        Raises ConfigError where the file is not there or no YAML, and for an entry that is unknown, no text, or lacks or makes up a placeholder.
        """
        entries = {part: dict(texts) for part, texts in _own().items()}
        if url is not None:
            for part, texts in _read(url, access or Access()).items():
                entries[part] |= texts
        return cls(**entries)

    def render(self, family: Family, values: Mapping[str, str]) -> str:
        """The request for one example. values: by placeholder, ``wanted(family)`` all."""
        return _NAME.sub(lambda match: values[match[1]], self.generate[family.name])

    @property
    def digest(self) -> str:
        """sha256 of all wording."""
        return hashlib.sha256(json.dumps([dict(self.brainstorm), dict(self.generate)], sort_keys=True).encode()).hexdigest()


def wanted(family: Family) -> tuple[str, ...]:
    """The placeholders that a prompt for examples of the family has."""
    return (*(("task",) if family.asymmetric else ()), *family.placeholders, *family.language_names)


@cache
def _own() -> dict[str, dict[str, str]]:
    data = yaml.safe_load(resources.files("llmemb_ray.synthesis").joinpath("prompts.yaml").read_text(encoding="utf-8"))
    return _checked(data, "prompts.yaml")


def _read(url: str, access: Access) -> dict[str, dict[str, str]]:
    shown = redact(url)
    storage, name = locate(absolute(url), access)
    try:
        data = parse_yaml(storage.read(name).decode())
    except NotFound as error:
        raise ConfigError(f"prompts: {shown} is not there; leave prompts out for those of the package") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"prompts: {shown} is not YAML" + (f", line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else "")) from error
    return _checked(data, shown)


def _checked(data: Any, shown: str) -> dict[str, dict[str, str]]:
    parts = {"brainstorm": ASYMMETRIC, "generate": tuple(FAMILIES)}
    if not isinstance(data, dict) or not data:
        raise ConfigError(f"prompts: {shown} holds no mapping; write brainstorm and generate, each with texts by family")
    checked: dict[str, dict[str, str]] = {}
    for part, texts in data.items():
        if part not in parts:
            raise ConfigError(f"prompts: {shown}: unknown {part}; there are {' and '.join(parts)}")
        if not isinstance(texts, dict):
            raise ConfigError(f"prompts: {shown}: {part} is no mapping of families to texts")
        for family, text in texts.items():
            entry = f"prompts: {shown}: {part} {family}"
            if family not in parts[part]:
                raise ConfigError(f"{entry} is not known; the families are {', '.join(parts[part])}")
            if not isinstance(text, str) or not text.strip():
                raise ConfigError(f"{entry} is no text")
            _check_placeholders(text, wanted(FAMILIES[family]) if part == "generate" else (), entry)
        checked[part] = {family: text.strip() for family, text in texts.items()}
    return checked


def _check_placeholders(text: str, names: tuple[str, ...], entry: str) -> None:
    found = dict.fromkeys(_NAME.findall(text))
    has = f"it has {', '.join(f'{{{name}}}' for name in names)}" if names else "it has no placeholders"
    if unknown := [name for name in found if name not in names]:
        raise ConfigError(f"{entry}: placeholder {{{unknown[0]}}} is not known; {has}")
    if missing := [name for name in names if name not in found]:
        raise ConfigError(f"{entry}: placeholder {{{missing[0]}}} is missing; {has}")
