"""The public training sets of paper 2: what a source is told by ``dataset: NAME``.

Invariant: the words and shares are the paper's, in ``public_sets.yaml``; nothing is downloaded, a source's path names its files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml

from llmemb_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """anchor, positive, negative: names of its columns, the first that a file has is taken; share: of its rows that an epoch takes;
    origin: where a copy is.
    """

    name: str
    origin: str
    anchor: tuple[str, ...]
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    instructions: tuple[str, ...]
    symmetric: bool
    share: float
    languages: str


def find(name: str) -> PublicSet:
    """Raises ConfigError for a name that is not in the table."""
    found = table().get(name.casefold())
    if found is None:
        raise ConfigError(f"dataset: {name!r} is no public set of paper 2; those are {', '.join(table())}. Leave dataset out for files of your own")
    return found


@cache
def table() -> dict[str, PublicSet]:
    """All sets by name."""
    entries = yaml.safe_load(resources.files("llmemb_ray.training").joinpath("public_sets.yaml").read_text(encoding="utf-8"))
    return {
        name: PublicSet(
            name=name,
            origin=entry["from"],
            anchor=tuple(entry["anchor"]),
            positive=tuple(entry["positive"]),
            negative=tuple(entry["negative"]),
            instructions=tuple(entry["instructions"]),
            symmetric=entry.get("symmetric", False),
            share=entry.get("share", 1.0),
            languages=entry["languages"],
        )
        for name, entry in entries.items()
    }
