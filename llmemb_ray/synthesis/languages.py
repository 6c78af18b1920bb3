"""The 93 languages of paper 2, the share of each, and whether a text can be of one.

Invariant: names and shares are those of ``languages.yaml``. A text is called implausible where its letters are mostly of a script that the language
is not written in, or where it is long enough and an identifier is sure of a language that is no near relative; in doubt it is plausible.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True, kw_only=True)
class Language:
    """code: XLM-R's id (zh for both of its own). name: in English. scripts: first words of Unicode's character names, the usual one first."""

    code: str
    name: str
    scripts: tuple[str, ...]


def _table() -> Mapping[str, Any]:
    entries: Mapping[str, Any] = yaml.safe_load(resources.files("llmemb_ray.synthesis").joinpath("languages.yaml").read_text(encoding="utf-8"))
    return entries


def _shares(entries: Mapping[str, Any]) -> dict[str, float]:
    named = {code: float(entry["percent"]) for code, entry in entries.items() if "percent" in entry}
    rest = (100.0 - sum(named.values())) / (len(entries) - len(named))
    return {code: named.get(code, rest) for code in entries}


LANGUAGES: Mapping[str, Language] = {code: Language(code=code, name=entry["name"], scripts=tuple(entry["scripts"])) for code, entry in _table().items()}
"""By code."""

SHARES: Mapping[str, float] = _shares(_table())
"""Per cent of the examples: paper 2, figure 2, names 14 languages; the other 79 have what is left in equal parts, 0.25 each."""

FEW_LETTERS = 4
"""A text with less can be of any language."""

IDENTIFIED_LETTERS = 20
"""A text with less is judged by its script alone: names and loan words are much of it."""

RATIO = 0.01
"""A text is of another language where its own is less than this times as probable as the most probable one. Of Tatoeba's 64,346 sentences in 75 of the
languages 13 are then called implausible, most of them in another language indeed; of those of 20 letters and more, claimed to be of a language drawn
from the other 92 but kin, 94 in 100 are; of English ones 99 in 100."""

SURE = 0.8
"""Probability from which a text is English, where that of its own language is not known."""

KIN: tuple[frozenset[str], ...] = tuple(
    frozenset(group.split())
    for group in (
        "no nn da", "id ms", "hr bs sr", "cs sk", "gl pt", "bg mk", "af nl", "fy nl", "ga gd", "ca oc", "es an ext", "it vec lij", "de lb", "lv ltg",
        "xh zu", "zh yue wuu", "he hbo", "el grc", "bn as", "az tr crh", "kk ky", "kk tt ba", "uz uzs", "ku sdh", "ar arz ary", "mr gom", "sa hi mr ne",
    )
)  # fmt: skip
"""Languages that are written so alike that one is not held against the other; some are none of the 93, but known to the identifier."""

CHARACTERS_PER_WORD: Mapping[str, float] = {"zh": 1.6, "ja": 2.4, "th": 4.1, "lo": 4.1, "km": 4.6, "my": 4.6}
"""Of languages that write no blanks between words: characters but blanks for each word of the English translation, on Tatoeba's sentences; of Lao and
Burmese, which it has none of, those of Thai and Khmer."""

DENSE = 3
"""Letters that one of these scripts counts for beside those of another, since each is a syllable or a word."""
_DENSE = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "ETHIOPIC"})

_NO_SCRIPT = frozenset({"MODIFIER", "MASCULINE", "FEMININE", "MICRO", "MATHEMATICAL", "DOUBLE", "FULLWIDTH", "HALFWIDTH", "IDEOGRAPHIC"})
"""First words of the names of letters that say nothing of a script."""


def plausible(text: str, code: str) -> bool:
    """Whether ``text`` can be of the language ``code``. Half the letters must be of its scripts; then an identifier is asked, if the text is long enough."""
    scripts = [script for script in map(_script, text) if script]
    if len(scripts) < FEW_LETTERS:
        return True
    own = [script for script in scripts if script in LANGUAGES[code].scripts]
    if sum(DENSE if script in _DENSE else 1 for script in own) < len(scripts) - len(own):
        return False
    return len(scripts) < IDENTIFIED_LETTERS or not _of_another(text, code, max(set(own), key=own.count))


def count_words(text: str, code: str) -> float:
    """Words between blanks; of a language that writes none, characters over ``CHARACTERS_PER_WORD``."""
    words = text.split()
    return round(sum(map(len, words)) / CHARACTERS_PER_WORD[code], 1) if code in CHARACTERS_PER_WORD else float(len(words))


def _of_another(text: str, code: str, script: str) -> bool:
    """Whether the identifier is sure of a language that is not ``code`` and no kin of it. script: that of most letters.

    It has not seen every language, nor each in all its scripts; there it can only tell that a text is English, which is what models fall back to.
    """
    probabilities: dict[str, float] = dict(_identifier().rank(text))
    if code not in probabilities or (script != LANGUAGES[code].scripts[0] and code != "sr"):  # It knows both of Serbian.
        return probabilities["en"] >= SURE
    best = max(probabilities, key=lambda name: probabilities[name])
    alike = {code}.union(*(group for group in KIN if code in group))
    return best != "zxx" and max(probabilities.get(name, 0.0) for name in alike) < RATIO * probabilities[best]


@lru_cache(maxsize=2**16)
def _script(character: str) -> str:
    """The script of a letter by its name in Unicode, "" for all that is no letter or belongs to none."""
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "").replace("-", " ").partition(" ")[0]
    return "" if name in _NO_SCRIPT else name


@cache
def _identifier() -> Any:
    from py3langid import langid  # type: ignore[import-untyped]

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
