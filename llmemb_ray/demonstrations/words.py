"""One-word answers: taken as they are, repaired, or dropped.

Invariant: what comes out is one word, its first letter a capital as in paper 1's demonstrations; what was done to an answer,
or why it was dropped, is said. A word is letters and digits, hyphens and apostrophes inside; Horseback-riding is one word.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

Repair = Literal["reasoning", "first line", "phrase", "quoted word", "quotes", "punctuation", "article", "capital"]
Reason = Literal["empty", "no letters", "several words", "article only", "cut off", "too long"]

LONGEST = 40
"""Characters of a word; the longest of English dictionaries have 45, and a script without blanks writes sentences that are longer."""

_REASONING = re.compile(r"^\s*<think>.*?(</think>|\Z)", re.DOTALL)
_QUOTED = re.compile(r'"([^"\n]+)"|“([^”\n]+)”|‘([^’\n]+)’|«([^»\n]+)»|\*\*([^*\n]+)\*\*|`([^`\n]+)`|(?<!\w)\'([^\'\n]+)\'(?!\w)')
_OPENING = re.compile(r"(?:(?:sure|certainly|okay|ok|of course)\b[,.!]* )?(?:in (?:one|a single) word\b,? )?", re.IGNORECASE)
_NAMING = re.compile(
    r"(?:(?:the|this|that|my|its|a) )?(?:best )?(?:one[- ]word |single[- ]word |single |one )?(?:answer|word|summary|meaning|sentence|it)\b"
    r"[^:.\n]{0,60}?\b(?:is|be|means) ",
    re.IGNORECASE,
)
_LABELS = ("answer", "word", "summary", "meaning")
_QUOTES = "\"'“”‘’«»„`*_ \t"
_PUNCTUATION = ".,;:!?…-–—()[]{}<>#/\\|~ \t"
_JOINTS = "-'’‑"
_ARTICLES = ("a", "an", "the")


@dataclass(frozen=True)
class Reading:
    """What an answer was read as: ``word`` with the repairs made, or ``reason`` why it was dropped."""

    word: str | None
    repairs: tuple[Repair, ...] = ()
    reason: Reason | None = None


def is_word(text: str) -> bool:
    """Whether ``text`` is one word in the sense of this module, of any script."""
    inner = "".join("-" if character in _JOINTS else character for character in text)
    parts = inner.split("-")
    return all(parts) and all(unicodedata.category(character)[0] in "LNM" for part in parts for character in part) and any(c.isalpha() for c in inner)


def capitalized(word: str) -> str:
    return word[:1].upper() + word[1:]


def read(answer: str, *, continues: bool = False, cut: bool = False) -> Reading:
    """Reads an answer.

    continues: it goes on from the template's open quote, and ends with the next one; cut: the limit of tokens ended it
    """
    repairs: list[Repair] = []
    text = answer
    if continues:
        text, closed, _ = text.partition('"')
        cut = cut and not closed
    elif _REASONING.search(text):
        text = _REASONING.sub("", text, count=1)
        repairs.append("reasoning")
    whole, text = text.strip(), text.strip()
    if "\n" in text:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        text = lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]
        cut = False
        repairs.append("first line")
    if not text:
        return Reading(None, tuple(repairs), "cut off" if cut else "empty")
    bare = _stripped(text, repairs)
    if bare and not is_word(bare):
        bare = _out_of_words(whole, text, repairs)
    if not any(character.isalnum() for character in bare):
        return Reading(None, tuple(repairs), "no letters")
    article, blank, rest = bare.partition(" ")
    if blank and article.lower() in _ARTICLES and is_word(rest.strip()):
        bare = rest.strip()
        repairs.append("article")
    if not is_word(bare):
        return Reading(None, tuple(repairs), "several words" if any(character.isalpha() for character in bare) else "no letters")
    if cut:
        return Reading(None, tuple(repairs), "cut off")
    if bare.lower() in _ARTICLES:
        return Reading(None, tuple(repairs), "article only")
    if len(bare) > LONGEST:
        return Reading(None, tuple(repairs), "too long")
    if capitalized(bare) != bare:
        repairs.append("capital")
    return Reading(capitalized(bare), tuple(dict.fromkeys(repairs)))


def _stripped(text: str, repairs: list[Repair]) -> str:
    """Without the quotes and punctuation around it."""
    while True:
        unquoted = text.strip(_QUOTES)
        if unquoted != text.strip():
            repairs.append("quotes")
        bare = unquoted.strip(_PUNCTUATION)
        if bare != unquoted:
            repairs.append("punctuation")
        if bare == text:
            return bare
        text = bare


def _out_of_words(whole: str, line: str, repairs: list[Repair]) -> str:
    """The word that several words name: the only one in quotes, else what an introducing phrase leaves."""
    quoted = [next(group for group in match.groups() if group) for match in _QUOTED.finditer(whole)]
    words = {bare.lower(): bare for bare in (_stripped(text, []) for text in quoted) if is_word(bare)}
    if len(words) == 1:
        repairs.append("quoted word")
        return next(iter(words.values()))
    rest = _after_phrase(line)
    if rest != line:
        repairs.append("phrase")
    return _stripped(rest, repairs)


def _after_phrase(line: str) -> str:
    """What follows 'The answer is', 'In one word:' and their like."""
    before, colon, after = line.rpartition(":")
    if colon and (len(before.split()) > 1 or before.strip().lower() in _LABELS):
        return after
    for phrase in (_OPENING, _NAMING):
        match = phrase.match(line)
        line = line[match.end() :] if match else line
    return line
