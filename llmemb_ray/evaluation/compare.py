"""Several evaluations as one table: rows named by what differs, columns the tasks that they have in common.

Invariant: figures are those of the records, none is computed anew; where two evaluations did not follow one protocol, a note says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from llmemb_ray.errors import InputError
from llmemb_ray.evaluation import published
from llmemb_ray.evaluation.record import Evaluation
from llmemb_ray.evaluation.sts import DEV
from llmemb_ray.evaluation.tables import table
from llmemb_ray.evaluation.text import MANY, TEXTS, TITLES, editions

PROTOCOL: dict[str, dict[str, Any]] = {
    "transfer": {"classifier": "senteval", "folds": 10, "seed": 1111},
    "retrieval": {"split": "test", "top_k": 1000},
    "passkey": {"seed": 1111},
}
"""Settings that decide a suite's figures besides the vectors, with their defaults."""

NAMES = {"model": "", "adapter": "with ", "method": ""}
"""Fields that name a row by their value alone, and what stands before it."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One evaluation. figures: suite → task, or 'avg', → figure × 100."""

    name: str
    model: str
    parameters: int
    method: str
    adapter: str | None
    space: str
    figures: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """suites: suite → columns, tasks first and 'avg' last. failed: pairs of a study that have no evaluation, and why."""

    rows: list[Row]
    suites: dict[str, list[str]]
    notes: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    """Of the rows, in their order."""

    def to_dict(self) -> dict[str, Any]:
        """All but the evaluations, which stand in their own directories."""
        found = asdict(replace(self, evaluations=[]))
        del found["evaluations"]
        return found


def compare(evaluations: Sequence[Evaluation], names: Sequence[str] | None = None) -> Comparison:
    """One table of several evaluations. names: of the rows, where they are known. Raises InputError where no suite is common to all."""
    if not evaluations:
        raise InputError("compare: there is no evaluation to compare; name directories that llmemb evaluate wrote")
    common = [suite for suite in evaluations[0].suites if all(suite in made.suites for made in evaluations)]
    called = list(names) if names is not None else named(evaluations)
    if not common:
        have = "; ".join(f"{name}: {', '.join(made.suites) or 'none'}" for name, made in zip(called, evaluations, strict=True))
        raise InputError(
            f"compare: no suite was evaluated in all of them ({have}); sts and sts-raw are different texts. Evaluate one suite in all: "
            "llmemb evaluate with the same --out adds a suite to an evaluation"
        )
    suites = {}
    for suite in common:
        tasks = dict.fromkeys(task for made in sorted(evaluations, key=lambda made: -len(made.suites[suite])) for task in made.suites[suite] if task != "avg")
        suites[suite] = [*tasks, *(["avg"] if any("avg" in made.suites[suite] for made in evaluations) else [])]
    rows = [
        Row(
            name=name,
            model=made.model,
            parameters=made.parameters,
            method=published.method_of(made),
            adapter=made.adapter,
            space=made.space,
            figures={suite: dict(made.suites[suite]) for suite in common},
        )
        for name, made in zip(called, evaluations, strict=True)
    ]
    return Comparison(rows=rows, suites=suites, notes=list(_notes(evaluations, called, suites)), evaluations=list(evaluations))


def named(evaluations: Sequence[Evaluation]) -> list[str]:
    """A name for each evaluation, made of what differs between them; those that differ in nothing are numbered."""
    fields = [_fields(made) for made in evaluations]
    differing = [name for name in fields[0] if len({repr(one.get(name)) for one in fields}) > 1]
    if "method" in differing and len({(one["method"], one.get("pooling")) for one in fields}) == len({one["method"] for one in fields}):
        differing = [name for name in differing if name != "pooling"]  # The method tells it.
    if {"model", "method"}.isdisjoint(differing) or len(evaluations) == 1:
        differing = ["model", *differing]
    found = [", ".join(part for name in differing if (part := _part(name, one.get(name)))) or "no adapter" for one in fields]
    return [name if found.count(name) == 1 else f"{name} #{found[: place + 1].count(name)}" for place, name in enumerate(found)]


def _fields(made: Evaluation) -> dict[str, Any]:
    """What may tell an evaluation from another, the plainest first."""
    form = made.representation.get("document", {})
    demonstrations = made.settings.get("demo") or []
    own = made.method in ("template", "e5") or (made.method == "prompteol-icl" and not demonstrations)
    others = {name: value for name, value in made.representation.items() if name not in ("document", "query", "append_eos")}
    return {
        "model": made.model,
        "method": published.METHODS[published.method_of(made)],
        "adapter": made.adapter,
        "demo": "; ".join(demonstrations) or None,
        "template": form.get("template") if own else None,
        "clean": form.get("clean"),
        **others,
        **{name: made.settings.get(name) for name in ("rope_theta", "sliding_window") if name not in others},
        "quantization": made.engine.get("quantization"),
        "compute_dtype": made.engine.get("compute_dtype"),
        "backend": made.engine.get("backend"),
        "commit": made.commit[:12],
    }


def _part(name: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{NAMES[name]}{value}" if name in NAMES else f"{name} {value!r}" if name in ("demo", "template") else f"{name} {value}"


def _notes(evaluations: Sequence[Evaluation], names: Sequence[str], suites: dict[str, list[str]]) -> Iterator[str]:
    for suite in suites:
        texts = [" and ".join(TEXTS.get(text, text) for text in editions(made, suite)) for made in evaluations]
        yield from _differing(suite, "the text", texts, names)
        for setting, default in PROTOCOL.get(suite, {}).items():
            yield from _differing(suite, setting, [str(made.settings.get(setting, default)) for made in evaluations], names)
        tasks = [frozenset(made.suites[suite]) - {"avg", DEV} for made in evaluations]
        if len(set(tasks)) > 1 and "avg" in suites[suite]:
            yield f"{suite}: the averages are of different tasks ({', '.join(f'{name}: {len(found)}' for name, found in zip(names, tasks, strict=True))})"
    commits: dict[str, set[str]] = {}
    for made in evaluations:
        commits.setdefault(made.model, set()).add(made.commit)
    for model, found in commits.items():
        if len(found) > 1:
            yield f"{model} was evaluated at different commits: {', '.join(sorted(commit[:12] for commit in found))}"
    spaces: dict[str, list[str]] = {}
    for made, name in zip(evaluations, names, strict=True):
        spaces.setdefault(made.space, []).append(name)
    for alike in spaces.values():
        if len(alike) > 1:
            yield f"of one vector space, so that only precision and engine can make a difference: {'; '.join(alike)}"


def _differing(suite: str, what: str, values: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    if len(set(values)) > 1:
        by_value: dict[str, list[str]] = {}
        for value, name in zip(values, names, strict=True):
            by_value.setdefault(value or "not told", []).append(name)
        yield f"{suite}: {what} differs: " + "; ".join(f"{value} ({', '.join(alike)})" for value, alike in by_value.items())


def lines(comparison: Comparison) -> list[str]:
    """The tables, notes and failures, for a terminal."""
    return list(_lines(comparison))


def _lines(found: Comparison) -> Iterator[str]:
    for suite, columns in found.suites.items():
        yield TITLES.get(suite, suite)
        many = len(columns) > MANY and suite != "mteb"
        if many:
            rows = [[row.name, *_summary([figure for task, figure in row.figures[suite].items() if task != "avg"])] for row in found.rows]
            yield from table(["", "tasks", "lowest", "median", "highest", "mean"], rows)
        else:
            yield from table(["", *columns], [[row.name, *(published.shown(row.figures[suite].get(column)) for column in columns)] for row in found.rows])
        yield ""
    for note in found.notes:
        yield f"note: {note}"
    for pair, why in found.failed.items():
        yield f"failed: {pair}: {why}"


def _summary(figures: list[float]) -> list[str]:
    values = (min(figures), statistics.median(figures), max(figures), statistics.fmean(figures)) if figures else ()
    return [f"{len(figures):,}", *(f"{value:.2f}" for value in values)] if figures else ["0", "–", "–", "–", "–"]
