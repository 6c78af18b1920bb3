"""An evaluation in words, for a terminal: a table for each suite with the nearest published row beneath ours.

Invariant: the published row is shown as its source gives it, with '≈' where it is approximate. Knows only what an ``Evaluation`` and the published rows hold.
"""

from __future__ import annotations

import statistics
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmemb_ray.evaluation import contamination, published
from llmemb_ray.evaluation.record import PATH, Evaluation
from llmemb_ray.evaluation.tables import table
from llmemb_ray.pipeline.estimates.text import quantity

EXTREMES = 6
"""Lowest and highest tasks shown of a suite that has too many for a table."""

MANY = 24
"""Tasks from which on a suite is summed up."""

TITLES = {
    "sts": "sts, Spearman × 100",
    "sts-raw": "sts-raw, Spearman × 100",
    "transfer": "transfer, accuracy × 100",
    "retrieval": "retrieval, nDCG@10 × 100",
    "bitext": "bitext, accuracy × 100",
    "passkey": "passkey, top-1 accuracy × 100 by prompt length in tokens",
    "mteb": "mteb, main score × 100",
}

TEXTS = {"tokenized": "lower-cased, tokenised text (SentEval's files)", "raw": "text in its original case and punctuation"}
"""Editions of the STS sentences, in words."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A suite in five numbers. mean: the suite's own average, which may leave tasks out, or else that of all; None without tasks."""

    tasks: int
    lowest: float | None
    median: float | None
    highest: float | None
    mean: float | None

    COLUMNS = ("tasks", "lowest", "median", "highest", "mean")

    @classmethod
    def of(cls, figures: Mapping[str, float]) -> Summary:
        """figures: by task, and 'avg' if there is one."""
        values = [figure for task, figure in figures.items() if task != "avg"]
        if not values:
            return cls(tasks=0, lowest=None, median=None, highest=None, mean=None)
        mean = figures["avg"] if "avg" in figures else statistics.fmean(values)
        return cls(tasks=len(values), lowest=min(values), median=statistics.median(values), highest=max(values), mean=mean)

    @property
    def cells(self) -> list[str]:
        """Under ``COLUMNS``."""
        return [f"{self.tasks:,}", *(published.shown(value) for value in (self.lowest, self.median, self.highest, self.mean))]


def lines(evaluation: Evaluation) -> list[str]:
    """The whole evaluation: what was evaluated, its suites, counts and times, contamination."""
    return list(_lines(evaluation))


def _lines(made: Evaluation) -> Iterator[str]:
    engine = ", ".join(str(value) for name, value in made.engine.items() if value not in (None, "none"))
    adapter = f" with {made.adapter}" if made.adapter else ""
    yield f"{made.model}{adapter}: {quantity(made.parameters)} parameters, {made.dimension:,} dimensions; {engine}"
    yield f"{published.METHODS[published.method_of(made)]}: {made.representation.get('document', {}).get('template', '')!r}"
    for suite in made.suites:
        yield ""
        yield from _suite(made, suite)
    yield ""
    yield from _sums(made)
    if made.contamination:
        yield ""
        yield from contamination.from_dict(made.contamination).lines()


def _suite(made: Evaluation, suite: str) -> Iterator[str]:
    tasks = [task for task in made.suites[suite] if task != "avg"]
    yield TITLES.get(suite, suite) + "".join(f"; {TEXTS.get(text, text)}" for text in editions(made, suite))
    row = published.nearest(made, suite)
    apart = published.incomparable(made, suite)
    if is_long(suite, tasks):
        yield from _summed_up(made, suite, tasks, None if "avg" in apart else row)
    else:
        columns = [*tasks, *(["avg"] if "avg" in made.suites[suite] else [])]
        rows = [["ours", *(published.shown(made.suites[suite].get(task)) for task in columns)]]
        if row is not None:
            rows.append([f"published: {row.title}", *(counterpart(row, task, apart) for task in columns)])
        yield from table(["", *columns], rows)
    if row is not None:
        yield f"source: {row.source}" + ("; ≈ is recalled, or read off a figure" if row.approximate != "none" else "")
        if published.SAME_TASKS.get(suite, suite) in published.AVERAGED and "avg" in apart:
            yield "the published average is of all seven tasks, and has no counterpart here"
    yield from (f"note: {remark}" for remark in remarks(made, suite))
    yield from _further(made, suite, tasks)


def is_long(suite: str, tasks: Sequence[str]) -> bool:
    """Whether a suite is summed up. tasks: without 'avg'. Those of mteb are of many kinds and always stand one by one."""
    return len(tasks) >= MANY and suite != "mteb"


def remarks(made: Evaluation, suite: str) -> list[str]:
    """What is to be known of a suite's tasks: why no published figure stands beside one, and what was left out."""
    found = [f"{task}: {why}; no published figure is comparable" for task, why in published.incomparable(made, suite).items() if task != "avg"]
    left_out = dict.fromkeys(parts["left_out"] for parts in made.details.get(suite, {}).values() if parts.get("left_out"))
    return [*found, *(f"{suite}: left out {what}" for what in left_out)]


def editions(made: Evaluation, suite: str) -> list[str]:
    """Which texts the tasks of a suite were scored on, where they say so."""
    return list(dict.fromkeys(str(parts["text"]) for parts in made.details.get(suite, {}).values() if isinstance(parts.get("text"), str)))


def counterpart(row: published.Published, task: str, apart: Container[str]) -> str:
    """A published figure as shown beside ours. apart: columns that are not comparable (``published.incomparable``)."""
    return "–" if task in apart else published.shown(row.figure(task), approximate=row.is_approximate(task))


def _summed_up(made: Evaluation, suite: str, tasks: Sequence[str], row: published.Published | None) -> Iterator[str]:
    figures = made.suites[suite]
    ranked = sorted(tasks, key=lambda task: (figures[task], task))
    summary = Summary.of(figures)
    yield f"mean of {len(tasks):,}: {published.shown(summary.mean)}, median {published.shown(summary.median)}"
    if row is not None:
        yield f"published: {row.title}: {counterpart(row, 'avg', ())}"
    yield "lowest:  " + ", ".join(f"{task} {figures[task]:.2f}" for task in ranked[:EXTREMES])
    yield "highest: " + ", ".join(f"{task} {figures[task]:.2f}" for task in reversed(ranked[-EXTREMES:]))
    yield f"all {len(tasks):,} stand in {PATH} (suites.{suite}) and on the page"


def _further(made: Evaluation, suite: str, tasks: Sequence[str]) -> Iterator[str]:
    """Other metrics of a retrieval task, as its details have them."""
    if suite != "retrieval":
        return
    parts: Mapping[str, Mapping[str, Any]] = {task: made.details.get(suite, {}).get(task, {}) for task in tasks}
    numbers = {task: {name: value for name, value in parts[task].items() if isinstance(value, int | float) and not isinstance(value, bool)} for task in tasks}
    names = [
        name
        for name in dict.fromkeys(name for found in numbers.values() for name in found)
        if any(isinstance(found.get(name), float) or found.get(name) for found in numbers.values())
    ]
    if names:
        yield from table(["", *names], [[task, *(_number(numbers[task].get(name)) for name in names)] for task in tasks])


def _number(value: Any) -> str:
    return "–" if not isinstance(value, int | float) else f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _sums(made: Evaluation) -> Iterator[str]:
    counts = dict(made.counts)
    if counts.get("texts"):
        yield f"{counts['texts']:,} texts wanted, {counts.get('texts_embedded', 0):,} embedded (each once), {counts.get('tokens', 0):,} tokens"
    if made.seconds:
        yield "seconds: " + ", ".join(f"{name} {value:,.1f}" for name, value in made.seconds.items())
    yield f"space {made.space}"
