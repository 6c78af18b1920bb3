"""One HTML page about one or several evaluations: tables with the nearest published rows, charts, how each was made."""

from __future__ import annotations

from dataclasses import dataclass

from llmemb_ray.evaluation import published
from llmemb_ray.evaluation.compare import Comparison, contaminations
from llmemb_ray.evaluation.text import TEXTS, TITLES, Summary, counterpart, editions, is_long, remarks
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
    remarks: list[str]
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
        tables=tables(comparison),
        methods=published.METHODS,
        method_of=published.method_of,
        contaminated=contaminations(comparison),
        title=comparison.rows[0].name if len(evaluations) == 1 else f"{len(evaluations)} evaluations",
    )


def tables(comparison: Comparison) -> list[Table]:
    """One of each suite."""
    return [_table(suite, comparison) for suite in comparison.suites]


def _table(suite: str, comparison: Comparison) -> Table:
    columns = comparison.suites[suite]
    ours = [Line(name=row.name, cells=[published.shown(row.figures[suite].get(column)) for column in columns], ours=True) for row in comparison.rows]
    ours = _with_best(ours, [[row.figures[suite].get(column) for column in columns] for row in comparison.rows])
    rows: dict[int, tuple[published.Published, frozenset[str]]] = {}
    for made in comparison.evaluations:
        if (row := published.nearest(made, suite)) is not None:
            apart = frozenset(published.incomparable(made, suite))
            rows[id(row)] = row, rows[id(row)][1] & apart if id(row) in rows else apart
    theirs = [
        Line(name=row.title, cells=[counterpart(row, column, apart) for column in columns], ours=False, source=row.source) for row, apart in rows.values()
    ]
    many = is_long(suite, [column for column in columns if column != "avg"])
    return Table(
        suite=suite,
        title=TITLES.get(suite, suite),
        columns=list(Summary.COLUMNS) if many else columns,
        lines=_summed_up(suite, comparison, theirs, columns) if many else [*ours, *theirs],
        texts=list(dict.fromkeys(TEXTS.get(text, text) for made in comparison.evaluations for text in editions(made, suite))),
        remarks=list(dict.fromkeys(remark for made in comparison.evaluations for remark in remarks(made, suite))),
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
    lines = [Line(name=row.name, cells=Summary.of(row.figures[suite]).cells, ours=True) for row in comparison.rows]
    average = columns.index("avg") if "avg" in columns else None
    lines += [Line(name=line.name, cells=["–", "–", "–", "–", line.cells[average]], ours=False, source=line.source) for line in theirs if average is not None]
    return lines
