"""What is asked for in each row: family, language, task and placeholders, drawn.

Invariant: a request is made of the seed, the row number and what is drawn from (weights, shares, pool, prompts), and of nothing else: neither
the number of rows nor who draws which of them changes one. Each decision has a hash of its own, so that another pool leaves family and language as they were.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from llmemb_ray.errors import ConfigError
from llmemb_ray.synthesis.families import FAMILIES, Family
from llmemb_ray.synthesis.languages import LANGUAGES
from llmemb_ray.synthesis.prompts import Prompts
from llmemb_ray.synthesis.tasks import Pool

VERSION = 1
"""Of the way of drawing: rows of different versions are not of one run."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One example asked for.

    language: code; of bitext that of S1, and ``target`` that of S2 and S3. task: the instruction. placeholders: what was drawn, by name; of bitext
    with the English names of both languages. seed: 31 bits, for the generator.
    """

    row: int
    family: str
    language: str
    target: str | None
    task: str
    placeholders: dict[str, str]
    prompt: str
    seed: int


class Draw:
    """Draws the request of any row. families, languages: weights by name, code; they need not sum to one, and what is left out is not drawn."""

    def __init__(self, *, seed: int, families: Mapping[str, float], languages: Mapping[str, float], pool: Pool, prompts: Prompts, generator_name: str) -> None:
        """Raises ConfigError for weights that cannot be drawn by, and for a family without a task in the pool."""
        self.seed, self.prompts, self.generator_name = seed, prompts, generator_name
        self._families = _Weighted(families, FAMILIES, "families")
        self._languages = _Weighted(languages, LANGUAGES, "languages")
        self._tasks = {family: pool.of(family) for family in self._families.names if FAMILIES[family].asymmetric}
        self._pool_digest = pool.digest
        empty = [family for family, tasks in self._tasks.items() if not tasks]
        if empty:
            raise ConfigError(f"tasks: the pool has none of family {' and '.join(empty)}; brainstorm some, add a file of tasks, or give it no weight")
        if "bitext" in self._families.names and len(self._languages.names) < 2:
            raise ConfigError(f"languages: bitext needs two, there is {self._languages.names[0]}; name another, or give bitext no weight in families")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides all requests and who answers them, fit for a run key."""
        return {
            "drawing": VERSION,
            "seed": self.seed,
            "families": self._families.weights,
            "languages": self._languages.weights,
            "tasks": self._pool_digest,
            "prompts": self.prompts.digest,
            "generator": self.generator_name,
        }

    def request(self, row: int) -> Request:
        """row: from 0."""

        def hashed(decision: str) -> int:
            return int.from_bytes(hashlib.blake2b(f"{self.seed}/{row}/{decision}".encode(), digest_size=8).digest(), "big")

        def uniform(decision: str) -> float:
            return float(hashed(decision) >> 11) * 2.0**-53

        def one_of(decision: str, values: tuple[str, ...]) -> str:
            return values[hashed(decision) * len(values) >> 64]

        family = FAMILIES[self._families.at(uniform("family"))]
        language = self._languages.at(uniform("language"))
        target = self._languages.at(uniform("target"), without=language) if family.name == "bitext" else None
        task = family.instruction or one_of("task", self._tasks[family.name])
        placeholders = {name: one_of(name, values) for name, values in family.placeholders.items()}
        names = [LANGUAGES[code].name for code in (language, target) if code]
        spoken = dict(zip(family.language_names, names, strict=True))
        if target:
            placeholders |= spoken
        return Request(
            row=row,
            family=family.name,
            language=language,
            target=target,
            task=task,
            placeholders=placeholders,
            prompt=self.prompts.render(family, self._said(family, task, placeholders | spoken)),
            seed=hashed("seed") >> 33,
        )

    @staticmethod
    def _said(family: Family, task: str, values: dict[str, str]) -> dict[str, str]:
        return values | {"task": task} if family.asymmetric else values


class _Weighted:
    """Names drawn in proportion to their weights."""

    def __init__(self, weights: Mapping[str, float], known: Mapping[str, Any], setting: str) -> None:
        unknown = [name for name in weights if name not in known]
        if unknown:
            raise ConfigError(f"{setting}: {unknown[0]!r} is not known; there are {', '.join(known)}")
        bad = [name for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)]
        if bad:
            raise ConfigError(f"{setting}: {bad[0]} has weight {weights[bad[0]]}; a weight is a number from 0 up")
        self.weights = {name: float(weights[name]) for name in known if weights.get(name)}
        if not self.weights:
            raise ConfigError(f"{setting}: none has a weight above 0; give one of {', '.join(known)}")
        self.names = list(self.weights)
        self._cumulative = [0.0, *accumulate(self.weights.values())]

    def at(self, position: float, without: str | None = None) -> str:
        """The name at a place in [0, 1) of all weights laid end to end, those of ``without`` left out."""
        left_out = self.weights[without] if without else 0.0
        place = position * (self._cumulative[-1] - left_out)
        index = self.names.index(without) if without else 0
        if without and place >= self._cumulative[index]:
            place += left_out
        found = min(bisect_right(self._cumulative, place) - 1, len(self.names) - 1)
        if without and found == index:  # By rounding alone.
            found = index - 1 if index else 1
        return self.names[found]
