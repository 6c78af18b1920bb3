"""Checks of an answer: whether it is the example that was asked for, and what it is rejected for if not.

Invariant: an answer becomes one example or one problem; texts are taken as they stand but for white space around them, and nothing is repaired but a code
fence. Knows neither files nor other answers: duplicates and evaluation sets are for others.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmemb_ray.corpus.rows import is_unicode
from llmemb_ray.generation.generator import Answer
from llmemb_ray.synthesis import families
from llmemb_ray.synthesis.drawing import Request
from llmemb_ray.synthesis.families import FAMILIES, Family
from llmemb_ray.synthesis.languages import LANGUAGES, count_words, plausible
from llmemb_ray.synthesis.strict import NotStrict, parse

Reason = Literal["refused", "cut", "not_json", "wrong_keys", "not_text", "empty", "language", "same_texts", "label_in_input", "length"]
"""In the order in which they are looked for; the first is told. Later stages have contaminated, duplicate and near_duplicate."""

LABEL_LETTERS = 4
"""Of a label, words with fewer are not looked for by themselves."""

_COMMON = (
    "about after also because before been being between both could does each every from have into less like many more most much neither none"
    " only other over same should some such text than that their them then there these they this those under very were what when where which while"
    " will with without would your"
)
COMMON = frozenset(_COMMON.split())
"""English words without a meaning of their own that labels share with any text. Of other languages none is excepted."""


@dataclass(frozen=True)
class Problem:
    """Why an answer is no example. detail: for a person, in one line."""

    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """instruction: the task. negative: None where the family has none. notes: ``fence`` where the answer stood in one, and the length rules
    (``query_length``, ``num_words``) that it breaks.
    """

    row: int
    instruction: str
    query: str
    positive: str
    negative: str | None
    notes: tuple[str, ...] = ()


def read(request: Request, answer: Answer, *, strict: bool = False, check_language: bool = True) -> Example | Problem:
    """The example that an answer gives. strict: a length rule that is broken is a problem, else a note."""
    if answer.text is None:
        return Problem("refused", answer.problem or "no answer")
    if answer.cut:
        return Problem("cut", f"the limit of new tokens ended it after {len(answer.text):,} characters")
    family = FAMILIES[request.family]
    try:
        value, repairs = parse(answer.text)
    except NotStrict as error:
        return Problem("not_json", str(error))
    texts = _texts(family, value)
    if isinstance(texts, Problem):
        return texts
    if check_language:
        for key, text in texts.items():
            code = request.target if request.target and key != family.query else request.language
            if not plausible(text, code):
                return Problem("language", f"{key} is not {LANGUAGES[code].name}: {text[:60]!r}")
    if problem := _same(texts) or _label_in_input(family, texts):
        return problem
    broken = _broken(family, request, texts)
    if broken and strict:
        return Problem("length", "; ".join(broken.values()))
    return Example(
        row=request.row,
        instruction=request.task,
        query=texts[family.query],
        positive=texts[family.positive],
        negative=texts[family.negative] if family.negative else None,
        notes=(*repairs, *broken),
    )


def _texts(family: Family, value: Any) -> dict[str, str] | Problem:
    if not isinstance(value, dict):
        return Problem("wrong_keys", f"a JSON {type(value).__name__} and no object with {', '.join(family.keys)}")
    missing, more = [key for key in family.keys if key not in value], [key for key in value if key not in family.keys]
    if missing or more:
        what = [f"{word} {', '.join(map(repr, keys))}" for word, keys in (("without", missing), ("with", more)) if keys]
        return Problem("wrong_keys", f"an object {' and '.join(what)}"[:200])
    for key in family.keys:
        if not isinstance(value[key], str) or not is_unicode(value[key]):
            return Problem("not_text", f"{key} is {repr(value[key])[:60]}")
        if not value[key].strip():
            return Problem("empty", f"{key} is empty")
    return {key: value[key].strip() for key in family.keys}


def _same(texts: Mapping[str, str]) -> Problem | None:
    seen: dict[str, str] = {}
    for key, text in texts.items():
        other = seen.setdefault(" ".join(text.casefold().split()), key)
        if other != key:
            return Problem("same_texts", f"{other} and {key} are both {text[:60]!r}")
    return None


def _label_in_input(family: Family, texts: Mapping[str, str]) -> Problem | None:
    """Of long-short: a label as a whole, or a word of it that means something, stands in the text that it is for."""
    if family.name != "long-short":
        return None
    words = _words(texts["input_text"])
    text = f" {' '.join(words)} "
    for key in ("label", "misleading_label"):
        label = _words(texts[key])
        telling = [word for word in label if sum(map(str.isalpha, word)) >= LABEL_LETTERS and word not in COMMON]
        found = next((word for word in telling if word in words), None)
        if found is None and label and f" {' '.join(label)} " in text:
            found = " ".join(label)
        if found is not None:
            return Problem("label_in_input", f"input_text has {found!r} of {key} {texts[key][:60]!r}")
    return None


def _words(text: str) -> list[str]:
    """Runs of letters, marks and digits, without case. In scripts that write no blanks a run is longer than a word."""
    return "".join(character if unicodedata.category(character)[0] in "LMN" else " " for character in text.casefold()).split()


def _broken(family: Family, request: Request, texts: Mapping[str, str]) -> dict[str, str]:
    """What is said of each length rule that a text breaks, by the rule."""
    broken: dict[str, str] = {}
    for key, text in texts.items():
        wanted = families.words(family, key, request.placeholders)
        if wanted is None:
            continue
        count = count_words(text, request.language)
        if not (wanted.least or 0) <= count <= (count if wanted.most is None else wanted.most):
            broken.setdefault(wanted.rule, f"{key} has {count:g} words, asked for were {wanted.wanted}")
    return broken
