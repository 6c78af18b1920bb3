"""One HTML page about one or several evaluations: tables with the nearest published rows, charts, how each was made."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from llmemb_ray.evaluation import contamination, published
from llmemb_ray.evaluation.compare import Comparison
from llmemb_ray.evaluation.text import MANY, TEXTS, TITLES, counterpart, editions
from llmemb_ray.reporting import document
from llmemb_ray.reporting.evaluation.charts import charts
from llmemb_ray.storage import Storage

NAME = "evaluation.html"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a table: ours, or a published one with its source. best: columns in which no other evaluation's figure is higher."""

    name: str
    cells: list[str]
    ours: bool
    best: frozenset[int] = frozenset()
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One suite. folded: columns and lines of a table too wide to stand open, shown on request."""

    suite: str
    title: str
    columns: list[str]
    lines: list[Line]
    texts: list[str]
    sources: list[str]
    approximate: bool
    folded: tuple[list[str], list[Line]] | None = None


def write(comparison: Comparison, place: Storage, name: str = NAME) -> None:
    """Writes the page of a comparison, which may be of one evaluation. Raises StorageError."""
    place.put(name, render(comparison).encode())


def render(comparison: Comparison) -> str:
    """The page."""
    evaluations = comparison.evaluations
    return document.render(
        "evaluation/page.html",
        charts(comparison),
        evaluations=list(zip([row.name for row in comparison.rows], evaluations, strict=True)),
        comparison=comparison,
        tables=[_table(suite, comparison) for suite in comparison.suites],
        methods=published.METHODS,
        method_of=published.method_of,
        contaminated=_contaminated(comparison),
        title=comparison.rows[0].name if len(evaluations) == 1 else f"{len(evaluations)} evaluations",
    )


def _table(suite: str, comparison: Comparison) -> Table:
    columns = comparison.suites[suite]
    ours = [Line(name=row.name, cells=[published.shown(row.figures[suite].get(column)) for column in columns], ours=True) for row in comparison.rows]
    ours = _with_best(ours, [[row.figures[suite].get(column) for column in columns] for row in comparison.rows])
    rows = {id(row): (row, published.is_whole(made, suite)) for made in comparison.evaluations if (row := published.nearest(made, suite)) is not None}
    theirs = [
        Line(name=row.title, cells=[counterpart(row, column, whole) for column in columns], ours=False, source=row.source) for row, whole in rows.values()
    ]
    many = len(columns) > MANY and suite != "mteb"
    return Table(
        suite=suite,
        title=TITLES.get(suite, suite),
        columns=["tasks", "lowest", "median", "highest", "mean"] if many else columns,
        lines=_summed_up(suite, comparison, theirs, columns) if many else [*ours, *theirs],
        texts=list(dict.fromkeys(TEXTS.get(text, text) for made in comparison.evaluations for text in editions(made, suite))),
        sources=list(dict.fromkeys(line.source for line in theirs)),
        approximate=any(row.approximate != "none" for row, _ in rows.values()),
        folded=(columns, ours) if many else None,
    )


def _with_best(lines: list[Line], figures: list[list[float | None]]) -> list[Line]:
    if len(lines) < 2:
        return lines
    highest = [max((value for value in column if value is not None), default=None) for column in zip(*figures, strict=True)]
    return [
        Line(
            name=line.name,
            cells=line.cells,
            ours=True,
            best=frozenset(place for place, value in enumerate(row) if value is not None and value == highest[place]),
        )
        for line, row in zip(lines, figures, strict=True)
    ]


def _summed_up(suite: str, comparison: Comparison, theirs: list[Line], columns: list[str]) -> list[Line]:
    """A suite of very many tasks; of a published row its average stands."""
    lines = []
    for row in comparison.rows:
        figures = [figure for task, figure in row.figures[suite].items() if task != "avg"]
        values = (min(figures), statistics.median(figures), max(figures), row.figures[suite].get("avg", statistics.fmean(figures))) if figures else (None,) * 4
        lines.append(Line(name=row.name, cells=[f"{len(figures):,}", *(published.shown(value) for value in values)], ours=True))
    average = columns.index("avg") if "avg" in columns else None
    lines += [Line(name=line.name, cells=["–", "–", "–", "–", line.cells[average]], ours=False, source=line.source) for line in theirs if average is not None]
    return lines


def _contaminated(comparison: Comparison) -> list[tuple[str, Any]]:
    """(name, what was found) of the evaluations that were checked."""
    return [
        (row.name, contamination.from_dict(made.contamination)) for row, made in zip(comparison.rows, comparison.evaluations, strict=True) if made.contamination
    ]
