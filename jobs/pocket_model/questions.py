"""Question-like queries on the standard library's documentation, by a plain rule.

Invariant: a query is the first sentence of a docstring turned into 'how to …', and the one document that answers it is that docstring without the
sentence, among all other docstrings whole. Nobody chose a query by its result; the texts are kept out of the model's training.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from llmemb_ray.demo import compiled_docstrings, docstrings
from pocket_model.recombine import question

QUERIES = 400
REST_WORDS = 15
"""Fewest words of what is left of a docstring without its first sentence."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """documents: text by qualified name; queries: question by the name that answers it; kept_out: texts that no model of ours may have learnt."""

    documents: dict[str, str]
    queries: dict[str, str]
    kept_out: list[str]


def collection(count: int = QUERIES) -> Asked:
    """``count`` queries, chosen by a digest of the name, less those whose sentence begins another docstring too: more than one would answer."""
    documents = dict(compiled_docstrings()) | dict(docstrings(Path(sysconfig.get_path("stdlib"))))
    found: dict[str, tuple[str, str, str]] = {}
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        first, rest = _split(documents[name])
        asked = question(first)
        if asked and len(rest.split()) >= REST_WORDS and asked not in {other[0] for other in found.values()}:
            found[name] = asked, first, rest
            if len(found) == count:
                break
    kept_out = [text for asked, first, _ in found.values() for text in (asked, f"How do I {asked.removeprefix('how to ')}?", first)]
    beginnings = Counter(_split(text)[0] for text in documents.values())
    found = {name: parts for name, parts in found.items() if beginnings[parts[1]] == 1}
    return Asked(
        documents={name: found[name][2] if name in found else text for name, text in documents.items()},
        queries={name: asked for name, (asked, _, _) in found.items()},
        kept_out=kept_out,
    )


def _split(text: str) -> tuple[str, str]:
    """The first sentence, on one line, and what follows it."""
    paragraph, _, rest = text.strip().partition("\n\n")
    parts = re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()), maxsplit=1)
    return parts[0], "\n\n".join([*parts[1:], rest]).strip()
