"""How many tokens an answer will have: words by what was drawn, tokens for a word by the language. Assumed, and each assumption stands here.

Invariant: of a request alone; nobody is asked. ``most`` is what the schema of the request lets through, so no answer that follows it has more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from llmemb_ray.synthesis import families
from llmemb_ray.synthesis.drawing import Request
from llmemb_ray.synthesis.families import FAMILIES, UNIT_WORDS, Family
from llmemb_ray.synthesis.languages import CHARACTERS_PER_WORD, LANGUAGES

ENGLISH = 1.36
"""Tokens of an English word, measured as below."""

SMALL_VOCABULARY: Mapping[str, float] = {
    "LATIN": 2.5, "CYRILLIC": 2.7, "CJK": 2.5, "HANGUL": 4.5, "THAI": 4.3, "ARABIC": 4.8, "HEBREW": 5.5, "DEVANAGARI": 5.6, "GREEK": 5.9, "BENGALI": 6.2,
    "KHMER": 6.3, "ARMENIAN": 6.5, "GEORGIAN": 7.2, "TAMIL": 9.5, "ETHIOPIC": 10.3, "TELUGU": 11.1, "MALAYALAM": 17.9,
}  # fmt: skip
"""Tokens of a word (``languages.count_words``) by script: Mistral 7B's tokenizer of 32,000 entries on the first 300 sentences of each of Tatoeba's
languages that is one of the 93, the median of a script's languages. Vocabularies of 100,000 and more, made for many languages, need less."""

OTHER_SCRIPT = 8.0
"""Of scripts that Tatoeba has no sentences in, about as those above that few texts are written in."""

LETTERS = 6.0
"""Characters of a word and its blank, where ``CHARACTERS_PER_WORD`` has no other number."""

MORE = 1.2
"""A text of "at least" so many words has so many times as many."""

USUAL, SHORTEST = 1 / 4, 1 / 10
"""Of the words that a text without a rule has at the very most: so many as a rule, and at least (a sentence: 15 and 6 of 60)."""

TASK_WORDS = 18
"""Of one brainstormed task, a sentence; with quotes and comma 20 of them are about 550 tokens."""


class Span(NamedTuple):
    """A number that is not known: as expected, and within what bounds."""

    least: float = 0.0
    expected: float = 0.0
    most: float = 0.0

    def plus(self, other: Span) -> Span:
        return Span(*(one + two for one, two in zip(self, other, strict=True)))

    def times(self, factor: float) -> Span:
        return Span(*(value * factor for value in self))

    def up_to(self, limit: float) -> Span:
        return Span(*(min(value, limit) for value in self))


def tokens_per_word(code: str) -> Span:
    """least: as English; most: a small vocabulary's; expected: their geometric mean."""
    if code == "en":
        return Span(ENGLISH, ENGLISH, ENGLISH)
    script = LANGUAGES[code].scripts[0]
    most = SMALL_VOCABULARY.get("CJK" if script == "HIRAGANA" else script, OTHER_SCRIPT)
    return Span(ENGLISH, math.sqrt(ENGLISH * most), most)


def text_words(family: Family, key: str, placeholders: Mapping[str, str]) -> tuple[float, float]:
    """(least, expected) words of a text of ``key``."""
    wanted = families.words(family, key, placeholders)
    if wanted is None:
        longest = UNIT_WORDS[placeholders["unit"]] if "unit" in placeholders else family.usual[key]
        return longest * SHORTEST, longest * USUAL
    if wanted.most is None:
        least = wanted.least or 1
        return float(least), least * MORE
    return float(wanted.least or 1), ((wanted.least or 1) + wanted.most) / 2


def answer_tokens(request: Request, *, skeleton: float, max_characters: int) -> Span:
    """Tokens of the answer to a request. skeleton: of the JSON object with empty texts; max_characters: of one text."""
    family = FAMILIES[request.family]
    properties = families.schema(family, max_characters, request.placeholders)["properties"]
    total = Span(skeleton, skeleton, skeleton)
    for key in family.keys:
        code = request.target if request.target and key != family.query else request.language
        each = tokens_per_word(code)
        least, expected = text_words(family, key, request.placeholders)
        most = properties[key]["maxLength"] / CHARACTERS_PER_WORD.get(code, LETTERS) * each.most
        total = total.plus(Span(min(least * each.least, most), min(expected * each.expected, most), most))
    return total
