"""Templates: the words around a text. Exact strings, byte for byte as the papers' code uses them.

A template is a string with ``{text}`` once; ``{{`` and ``}}`` stand for braces. This module knows no tokens.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

from llmemb_ray.errors import ConfigError

PROMPTEOL = 'This sentence : "{text}" means in one word:"'
"""Paper 1, ``train_llm.sh`` and ``eval_checkpoints.sh``: a space before the first colon, none before the last quote."""

E5_QUERY = "Instruct: {instruction}\nQuery: {text}"
"""Paper 2, equation 1, and ``get_detailed_instruct`` of its code."""

NONE = "{text}"

PRESETS = ("prompteol", "prompteol-icl", "e5", "none")


@dataclass(frozen=True)
class Demonstration:
    """One in-context example: a sentence and the one word it means (paper 1, section 3.2)."""

    sentence: str
    word: str

    @classmethod
    def parse(cls, text: str) -> Demonstration:
        """Reads ``'sentence=>Word'``. Raises ConfigError."""
        sentence, arrow, word = text.rpartition("=>")
        if not arrow or not sentence.strip() or not word.strip():
            raise ConfigError(f"demo {text!r} is not of the form 'sentence=>Word', for example 'A jockey riding a horse.=>Equestrian'")
        return cls(sentence.strip(), word.strip())


def split(template: str) -> tuple[str, str]:
    """The literal text before and after ``{text}``. Raises ConfigError if it does not stand there once."""
    before, after, seen = "", "", 0
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template {template!r}: {error}; write {{{{ and }}}} for literal braces") from error
    for literal, field, spec, conversion in parts:
        if seen:
            after += literal
        else:
            before += literal
        if field is None:
            continue
        if field != "text" or spec or conversion:
            raise ConfigError(f"template {template!r}: unknown field {{{field}}}; only {{text}} is filled in, write {{{{ and }}}} for literal braces")
        seen += 1
    if seen != 1:
        raise ConfigError(f"template {template!r} needs {{text}} once, it stands there {seen} times")
    return before, after


def literal(text: str) -> str:
    """``text`` with its braces doubled, so that a template takes it as it is."""
    return text.replace("{", "{{").replace("}", "}}")


def prompteol(demonstrations: tuple[Demonstration, ...] = ()) -> str:
    """PromptEOL, with the demonstrations before it as paper 1's ``run_icl.sh`` writes them (no blank between)."""
    shots = "".join(f'This sentence : "{literal(demo.sentence)}" means in one word:"{literal(demo.word)}".' for demo in demonstrations)
    return shots + PROMPTEOL


def e5_query(instruction: str) -> str:
    """The query template of paper 2; without an instruction the bare text, as its code does."""
    return E5_QUERY.replace("{instruction}", literal(instruction)) if instruction else NONE
