"""Beginnings of source texts, read back from the corpus by file and row.

Invariant: no more than a batch of whole texts is in memory at a time; what is kept is cut to EXCERPT characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llmemb_ray.corpus.lookup import RowKey, beginning, texts_at
from llmemb_ray.shards.run import Run

EXCERPT = 200
"""Characters of a text that are shown."""

BATCH = 256
"""Texts read at a time: whole documents may be megabytes each."""

Span = tuple[RowKey, int, int | None]
"""A row of the corpus, and the first and last+1 character of the part that was embedded (None: to its end)."""


@dataclass
class Excerpts:
    """texts: by span; missing: why a row has no text, by row key."""

    texts: dict[Span, str] = field(default_factory=dict)
    missing: dict[RowKey, str] = field(default_factory=dict)


def excerpts(run: Run, spans: Iterable[Span]) -> Excerpts:
    """The beginnings of the texts at ``spans``, white space run together. Texts that cannot be had are ``missing``, with the reason."""
    found = Excerpts()
    by_row: dict[RowKey, list[Span]] = {}
    for span in spans:
        by_row.setdefault(span[0], []).append(span)
    keys = sorted(by_row)
    for start in range(0, len(keys), BATCH):
        batch = keys[start : start + BATCH]
        read = texts_at(run.plan.files, run.plan.selection, run.storage.access, batch)
        found.missing |= read.missing
        for key, text in read.texts.items():
            for span in by_row[key]:
                found.texts[span] = excerpt(text[span[1] : span[2]])
    return found


def excerpt(text: str) -> str:
    """What the page shows of a text."""
    return beginning(text, EXCERPT)


def reasons(missing: dict[RowKey, str], shown: int = 3) -> Sequence[str]:
    """The different reasons, the first few of them."""
    different = list(dict.fromkeys(missing.values()))
    more = [f"… and {len(different) - shown} more reasons"] if len(different) > shown else []
    return [*different[:shown], *more]
