"""The space: a digest of everything that decides a vector. Vectors are compared only within one space."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from llmemb_ray.representation.representation import Representation


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form. Raises TypeError for what JSON cannot hold."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Context:
    """What is changed in a model's configuration so that it takes longer prompts (paper 2, section 5.2); nothing by default."""

    rope_theta: float | None = None
    """Base of the rotary positions."""
    sliding_window: int | None = None
    """Tokens that a layer looks back, its own among them; 0: all."""

    def to_dict(self) -> dict[str, Any]:
        """What is changed alone."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Space:
    representation: Representation
    model: str
    """Commit of a hub model, or digest of a directory's files."""
    adapter: str | None
    tokenizer: str
    """Digest of the tokenizer as serialised."""
    context: Context = Context()

    def to_dict(self) -> dict[str, Any]:
        """A context that changes nothing is left out, so that spaces are those of the versions that had none."""
        context = self.context.to_dict()
        return {name: value for name, value in asdict(self).items() if name != "context"} | ({"context": context} if context else {})

    @property
    def digest(self) -> str:
        return digest(self.to_dict())


def differences(ours: Any, theirs: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each field in which two JSON values differ: (dotted name, ours, theirs)."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(set(ours) | set(theirs)):
            yield from differences(ours.get(key), theirs.get(key), f"{path}.{key}" if path else key)
    elif ours != theirs:
        yield path, ours, theirs
