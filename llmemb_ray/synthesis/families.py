"""The six task families of paper 2: their keys, placeholders and proportions, and what an example of each becomes in training.

Invariant: the structure is the paper's (section 3.1, tables 7 to 12, 16); wording is in ``prompts.yaml``. Knows neither languages nor generators.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ASYMMETRIC_DIFFICULTY = ("high school", "college", "PhD")
SYMMETRIC_DIFFICULTY = ("elementary school", "high school", "college")
CLARITY = ("clear", "understandable with some effort", "ambiguous")
UNIT = ("sentence", "phrase", "passage")

CHARACTERS_PER_WORD = 16
"""With its blank. Generous, since a schema's limit must end the strings of a model that does not, and cut none of one that does."""

OVERSHOOT = 2
"""A text may have so many times the words that were asked for before the schema's limit ends it."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """How many words a text is to have. least, most: inclusive; None: no bound. rule: the placeholder that says it."""

    least: int | None = None
    most: int | None = None
    rule: str

    @property
    def wanted(self) -> str:
        if self.least is not None and self.most is not None:
            return f"{self.least} to {self.most} words"
        return f"at least {self.least} words" if self.least is not None else f"at most {self.most} words"


@dataclass(frozen=True, kw_only=True)
class Family:
    """keys: of the JSON object, in order. query, positive, negative: the keys that become the columns of a training example, negative None where the
    family has none. asymmetric: it draws a task from the pool, which is the instruction; else ``instruction`` is.
    placeholders: name → values, one of which is drawn for each request; languages are apart. usual: words that a text of a key has at the very most
    where no placeholder says a number.
    """

    name: str
    keys: tuple[str, ...]
    query: str
    positive: str
    negative: str | None
    instruction: str | None = None
    placeholders: Mapping[str, tuple[str, ...]]
    usual: Mapping[str, int]

    @property
    def asymmetric(self) -> bool:
        return self.instruction is None

    @property
    def language_names(self) -> tuple[str, ...]:
        """The placeholders that a language's English name is put in for."""
        return ("src_lang", "tgt_lang") if self.name == "bitext" else ("language",)


_ALL = (
    Family(
        name="short-long",
        keys=("user_query", "positive_document", "hard_negative_document"),
        query="user_query",
        positive="positive_document",
        negative="hard_negative_document",
        placeholders={
            "query_type": ("extremely long-tail", "long-tail", "common"),
            "query_length": ("less than 5 words", "5 to 15 words", "at least 10 words"),
            "clarity": CLARITY,
            "num_words": ("50", "100", "200", "300", "400", "500"),
            "difficulty": ASYMMETRIC_DIFFICULTY,
        },
        usual={"user_query": 60},
    ),
    Family(
        name="long-short",
        keys=("input_text", "label", "misleading_label"),
        query="input_text",
        positive="label",
        negative="misleading_label",
        placeholders={
            "num_words": ("less than 10", "at least 10", "at least 50", "at least 100", "at least 200"),
            "clarity": CLARITY,
            "difficulty": ASYMMETRIC_DIFFICULTY,
        },
        usual={"input_text": 60, "label": 15, "misleading_label": 15},
    ),
    Family(
        name="sts",
        keys=("S1", "S2", "S3"),
        query="S1",
        positive="S2",
        negative="S3",
        instruction="Retrieve semantically similar text.",
        placeholders={"unit": UNIT, "high_score": ("4", "4.5", "5"), "low_score": ("2.5", "3", "3.5"), "difficulty": SYMMETRIC_DIFFICULTY},
        usual={},
    ),
    Family(
        name="bitext",
        keys=("S1", "S2", "S3"),
        query="S1",
        positive="S2",
        negative="S3",
        instruction="Retrieve parallel sentences.",
        placeholders={"unit": UNIT, "high_score": ("4", "4.5", "5"), "low_score": ("1.5", "2", "2.5"), "difficulty": SYMMETRIC_DIFFICULTY},
        usual={},
    ),
    Family(
        name="long-long",
        keys=("input", "positive_document"),
        query="input",
        positive="positive_document",
        negative=None,
        placeholders={},
        usual={},
    ),
    Family(
        name="short-short",
        keys=("input", "positive_document"),
        query="input",
        positive="positive_document",
        negative=None,
        placeholders={},
        usual={"input": 40, "positive_document": 40},
    ),
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}
"""By name, the most frequent of the paper first."""

ASYMMETRIC = tuple(family.name for family in _ALL if family.asymmetric)

WEIGHTS: Mapping[str, float] = dict(zip(FAMILIES, (167.0, 122.0, 99.0, 89.0, 17.0, 13.0), strict=True))
"""Thousands of examples in paper 2 (figure 2)."""

LONG_LONG_WORDS = 300
"""At least, of both texts of a long-long example (paper 2, table 11)."""

UNIT_WORDS = {"sentence": 60, "phrase": 25, "passage": 250}
"""The longest unit of sts and bitext that no schema should cut."""


def words(family: Family, key: str, placeholders: Mapping[str, str]) -> Words | None:
    """The number of words that was asked for, None where a text of this key has no rule. placeholders: name → the value drawn."""
    if family.name == "long-long":
        return Words(least=LONG_LONG_WORDS, rule="num_words")
    if family.name == "short-long":
        return _read("query_length", placeholders) if key == family.query else _read("num_words", placeholders)
    return _read("num_words", placeholders) if family.name == "long-short" and key == family.query else None


def schema(family: Family, max_length: int, placeholders: Mapping[str, str]) -> dict[str, Any]:
    """The JSON schema of an answer: exactly the keys, in their order, each a string of 1 to ``maxLength`` characters.

    max_length: characters that no text exceeds; a text of which less is asked for gets twice what it needs, and no more than this.
    placeholders: name → the value drawn.
    """
    properties = {key: {"type": "string", "minLength": 1, "maxLength": min(max_length, _characters(family, key, placeholders))} for key in family.keys}
    return {"type": "object", "properties": properties, "required": list(family.keys), "additionalProperties": False}


def _characters(family: Family, key: str, placeholders: Mapping[str, str]) -> int:
    wanted = words(family, key, placeholders)
    usual = family.usual.get(key, 0) if "unit" not in placeholders else UNIT_WORDS[placeholders["unit"]]
    if wanted is None:
        return usual * CHARACTERS_PER_WORD
    if wanted.most is not None:
        return OVERSHOOT * wanted.most * CHARACTERS_PER_WORD
    return max(usual, OVERSHOOT * (wanted.least or 0)) * CHARACTERS_PER_WORD


def _read(rule: str, placeholders: Mapping[str, str]) -> Words:
    value = placeholders[rule]
    numbers = [int(number) for number in re.findall(r"\d+", value)]
    if value.startswith("less than"):
        return Words(most=numbers[0] - 1, rule=rule)
    if len(numbers) == 2:
        return Words(least=numbers[0], most=numbers[1], rule=rule)
    return Words(least=numbers[0], rule=rule)
