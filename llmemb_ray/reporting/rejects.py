"""Rejects by reason, with a few examples of each.

Invariant: counts are those of the commits, all of them; of the rejects files only as many are read as the examples need.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pyarrow.compute as pc

from llmemb_ray.reporting.texts import Excerpts
from llmemb_ray.shards.run import Run, read_groups
from llmemb_ray.storage import redact

EXAMPLES = 5
"""Examples of each reason."""


@dataclass(frozen=True, kw_only=True)
class Example:
    source_file: int
    url: str
    source_row: int
    id: str | None
    detail: str
    text: str | None = None
    """The beginning of the source text; None where it has none or was not asked for."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    reason: str
    count: int
    examples: list[Example]


def by_reason(run: Run) -> list[Reason]:
    """The most frequent first. Raises OutputError for a rejects file that cannot be read."""
    counts: Counter[str] = Counter()
    for commit in run.commits:
        counts.update(commit.reasons)
    examples: dict[str, list[Example]] = {reason: [] for reason in counts}
    for commit in run.commits:
        wanted = {reason for reason in commit.reasons if len(examples[reason]) < EXAMPLES}
        if commit.rejects is None or not wanted:
            continue
        for table in read_groups(run.storage, commit.rejects, None):
            for reason in sorted(wanted):
                here = table.filter(pc.equal(table["reason"], reason)).slice(0, EXAMPLES - len(examples[reason]))
                examples[reason] += [
                    Example(
                        source_file=row["source_file"],
                        url=redact(run.plan.files[row["source_file"]].url),
                        source_row=row["source_row"],
                        id=row["id"],
                        detail=row["detail"] or "",
                    )
                    for row in here.to_pylist()
                ]
    return [Reason(reason=reason, count=count, examples=examples[reason]) for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def with_texts(reasons: list[Reason], found: Excerpts) -> list[Reason]:
    """The same, each example with the beginning of its text where there is one."""
    return [
        replace(reason, examples=[replace(e, text=found.texts.get(((e.source_file, e.source_row), 0, None))) for e in reason.examples]) for reason in reasons
    ]
