"""The representation: everything that decides a vector besides the weights.

One frozen object serves embedding, search, training and evaluation. It is saved as ``llmemb.json``
beside an adapter and digested into the space. It knows neither tokenizer nor model.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from llmemb_ray.errors import ConfigError
from llmemb_ray.representation import templates
from llmemb_ray.representation.cleaning import CLEANINGS, Cleaning

Role = Literal["document", "query"]
ROLES: tuple[Role, ...] = get_args(Role)
Pooling = Literal["last", "mean", "weighted-mean"]
POOLINGS: tuple[str, ...] = get_args(Pooling)

FILE_NAME = "llmemb.json"


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a text of one role becomes a prompt."""

    template: str = templates.NONE
    """Holds ``{text}`` once; demonstrations and instruction are written out in it."""
    clean: Cleaning = "none"

    def __post_init__(self) -> None:
        templates.split(self.template)
        if self.clean not in CLEANINGS:
            raise ConfigError(f"clean: {self.clean!r} is unknown; choose one of {', '.join(CLEANINGS)}")


@dataclass(frozen=True, kw_only=True)
class Representation:
    document: Form = field(default_factory=Form)
    query: Form = field(default_factory=Form)
    append_eos: bool = False
    """End every prompt with the tokenizer's EOS token, unless it puts one there itself (paper 2)."""
    max_tokens: int | None = None
    """Longest prompt in tokens, special tokens included; a longer one has its *text* cut. None: the model's limit."""
    pooling: Pooling = "last"
    layer: int = -1
    """Index into the hidden states: -1 is the state after the final norm, 0 the token embedding."""
    normalize: bool = True
    """Divide each vector by its L2 norm."""
    dimensions: int | None = None
    """Keep the first so many dimensions (before normalising). None: all."""

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ConfigError(f"pooling: {self.pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens: {self.max_tokens} is not a positive number of tokens")
        if self.dimensions is not None and self.dimensions < 1:
            raise ConfigError(f"dimensions: {self.dimensions} is not a positive number")

    def form(self, role: Role) -> Form:
        return self.query if role == "query" else self.document

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any], origin: str = "representation") -> Representation:
        """The inverse of ``to_dict``. Raises ConfigError naming ``origin`` and the unknown or wrong field."""
        data = dict(data)
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ConfigError(f"{origin}: unknown fields {', '.join(sorted(unknown))}; this version knows {', '.join(f.name for f in fields(cls))}")
        try:
            for role in ROLES:
                if role in data:
                    data[role] = Form(**data[role])
            return cls(**data)
        except TypeError as error:
            raise ConfigError(f"{origin}: {error}") from error

    def save(self, directory: str | Path) -> Path:
        path = Path(directory) / FILE_NAME
        path.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Representation:
        """Reads a ``llmemb.json``, or the one in a directory. Raises ConfigError."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            return cls.parse(path.read_bytes(), str(path))
        except OSError as error:
            raise ConfigError(f"representation {path}: {error.strerror}") from error

    @classmethod
    def parse(cls, text: bytes, origin: str) -> Representation:
        """The representation in the text of a ``llmemb.json``. Raises ConfigError naming ``origin``."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"representation {origin} is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"representation {origin} is not a JSON object")
        return cls.from_dict(data, origin=origin)


def preset(
    prompt: str,
    *,
    demonstrations: tuple[templates.Demonstration, ...] = (),
    instruction: str | None = None,
    role: Role = "document",
    clean: Cleaning = "none",
) -> tuple[Form, Form, bool]:
    """(document form, query form, append_eos) of a named prompt or of a template with ``{text}``.

    For ``e5`` the instruction belongs to ``role``: on its own it makes a query, and a symmetric task
    (paper 2: STS, classification, clustering …) embeds its documents with ``role="document"`` and an
    instruction. Raises ConfigError for a setting that the prompt would silently ignore.
    """
    if demonstrations and prompt != "prompteol-icl":
        raise ConfigError(f"demo: demonstrations belong to prompt 'prompteol-icl', not to {prompt!r}; set prompt prompteol-icl")
    if instruction is not None and prompt != "e5":
        raise ConfigError(f"instruction: belongs to prompt 'e5', not to {prompt!r}; write it into a template of your own, or set prompt e5")
    if prompt == "e5":
        instructed, plain = Form(template=templates.e5_query(instruction or ""), clean=clean), Form(clean=clean)
        return (instructed, instructed, True) if role == "document" and instruction else (plain, instructed, True)
    if prompt == "prompteol-icl":
        if not demonstrations:
            raise ConfigError("prompt prompteol-icl needs at least one demonstration; give demo 'sentence=>Word'")
        template = templates.prompteol(demonstrations)
    elif prompt == "prompteol":
        template = templates.prompteol()
    elif prompt == "none":
        template = templates.NONE
    elif "{" in prompt:
        template = prompt
    else:
        raise ConfigError(f"prompt: {prompt!r} is neither one of {', '.join(templates.PRESETS)} nor a template with {{text}}")
    form = Form(template=template, clean=clean)
    return form, form, False


def is_e5(representation: Representation) -> bool:
    """Whether both forms are those of prompt e5, with whatever instruction or none."""
    head, tail = templates.E5_QUERY.split("{instruction}")
    found = [representation.form(role).template for role in ROLES]
    return representation.append_eos and all(template == templates.NONE or (template.startswith(head) and template.endswith(tail)) for template in found)
