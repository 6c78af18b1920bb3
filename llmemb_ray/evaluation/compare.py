"""Several evaluations as one table: rows named by what differs, columns the tasks that they have in common.

Invariant: figures are those of the records, none is computed anew; where two evaluations did not follow one protocol, a note says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from llmemb_ray.errors import InputError
from llmemb_ray.evaluation import published
from llmemb_ray.evaluation.contamination import Contamination, from_dict
from llmemb_ray.evaluation.record import Evaluation
from llmemb_ray.evaluation.sts import DEV
from llmemb_ray.evaluation.tables import table
from llmemb_ray.evaluation.text import TEXTS, TITLES, Summary, editions, is_long, remarks
from llmemb_ray.evaluation.vectors import ENGINE

NAMES = {"model": "", "adapter": "with ", "method": "", "task_instructions": ""}
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
    contamination: dict[str, Any] = field(default_factory=dict)
    """What a study's own check found; empty without one. An evaluation's stands in its record."""
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
    methods = {one["method"] for one in fields}
    told = [name for name in ("pooling", "template", "query") if len({(one["method"], one.get(name)) for one in fields}) == len(methods)]
    differing = [name for name in differing if name not in told]  # The method tells it.
    if {"model", "method"}.isdisjoint(differing) or len(evaluations) == 1:
        differing = ["model", *differing]
    found = [", ".join(part for name in differing if (part := _part(name, one.get(name)))) or "no adapter" for one in fields]
    return [name if found.count(name) == 1 else f"{name} #{found[: place + 1].count(name)}" for place, name in enumerate(found)]


def _fields(made: Evaluation) -> dict[str, Any]:
    """What may tell an evaluation from another, the plainest first."""
    form = made.representation.get("document", {})
    demonstrations = made.settings.get("demo") or []
    query = made.representation.get("query", form).get("template")
    method = published.method_of(made)
    own = method in ("template", "e5") or (made.method == "prompteol-icl" and not demonstrations)
    instructed = {protocol["task_instructions"] for suite in made.suites if "task_instructions" in (protocol := _protocol(made, suite))}
    others = {name: value for name, value in made.representation.items() if name not in ("document", "query", "append_eos")}
    return {
        "model": made.model,
        "method": published.METHODS[method],
        "adapter": made.adapter,
        "demo": "; ".join(demonstrations) or None,
        "template": form.get("template") if own else None,
        "query": query if own and query != form.get("template") else None,
        "task_instructions": "without task instructions" if instructed == {False} else None,
        "append_eos": True if made.representation.get("append_eos") and method != "e5" else None,
        "clean": form.get("clean"),
        **others,
        **{name: made.settings.get(name) for name in ("rope_theta", "sliding_window") if name not in others},
        "quantization": made.engine.get("quantization"),
        "compute_dtype": made.engine.get("compute_dtype"),
        "backend": made.engine.get("backend"),
        "commit": made.commit[:12],
    }


def _protocol(made: Evaluation, suite: str) -> dict[str, Any]:
    """Settings and engine that a suite's figures were made with; empty in records that do not tell."""
    found = made.protocol.get(suite)
    return found if isinstance(found, dict) else {}


def _part(name: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{NAMES[name]}{value}" if name in NAMES else f"{name} {value!r}" if name in ("demo", "template", "query") else f"{name} {value}"


def _notes(evaluations: Sequence[Evaluation], names: Sequence[str], suites: dict[str, list[str]]) -> Iterator[str]:
    for suite in suites:
        texts = [" and ".join(TEXTS.get(text, text) for text in editions(made, suite)) for made in evaluations]
        yield from _differing(suite, "the text", texts, names)
        protocols = [_protocol(made, suite) for made in evaluations]
        for setting in dict.fromkeys(name for protocol in protocols for name in protocol):
            if setting not in ENGINE or any(protocol.get(setting) != made.engine.get(setting) for protocol, made in zip(protocols, evaluations, strict=True)):
                yield from _differing(suite, setting, [str(protocol[setting]) if setting in protocol else "" for protocol in protocols], names)
        tasks = [frozenset(made.suites[suite]) - {"avg", DEV} for made in evaluations]
        if len(set(tasks)) > 1 and "avg" in suites[suite]:
            yield f"{suite}: the averages are of different tasks ({', '.join(f'{name}: {len(found)}' for name, found in zip(names, tasks, strict=True))})"
    commits: dict[str, set[str]] = {}
    for made in evaluations:
        commits.setdefault(made.model, set()).add(made.commit)
    for model, found in commits.items():
        if len(found) > 1:
            yield f"{model} was evaluated at different commits: {', '.join(sorted(commit[:12] for commit in found))}"
    alike_in: dict[str, list[str]] = {}
    for made, name in zip(evaluations, names, strict=True):
        protocols = [{setting: value for setting, value in _protocol(made, suite).items() if setting not in ENGINE} for suite in suites]
        alike_in.setdefault(repr([made.space, protocols, [editions(made, suite) for suite in suites]]), []).append(name)
    for alike in alike_in.values():
        if len(alike) > 1:
            yield f"of one vector space and protocol, so that only precision and engine can make a difference: {'; '.join(alike)}"


def _differing(suite: str, what: str, values: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    """values: by name; empty where a record does not tell or a setting does not apply, which is no difference."""
    by_value: dict[str, list[str]] = {}
    for value, name in zip(values, names, strict=True):
        if value:
            by_value.setdefault(value, []).append(name)
    if len(by_value) > 1:
        yield f"{suite}: {what} differs: " + "; ".join(f"{value} ({', '.join(alike)})" for value, alike in by_value.items())


def lines(comparison: Comparison) -> list[str]:
    """The tables, notes and failures, for a terminal."""
    return list(_lines(comparison))


def _lines(found: Comparison) -> Iterator[str]:
    for suite, columns in found.suites.items():
        yield TITLES.get(suite, suite)
        if is_long(suite, [column for column in columns if column != "avg"]):
            yield from table(["", *Summary.COLUMNS], [[row.name, *Summary.of(row.figures[suite]).cells] for row in found.rows])
        else:
            yield from table(["", *columns], [[row.name, *(published.shown(row.figures[suite].get(column)) for column in columns)] for row in found.rows])
        yield from (f"note: {remark}" for remark in dict.fromkeys(remark for made in found.evaluations for remark in remarks(made, suite)))
        yield ""
    for note in found.notes:
        yield f"note: {note}"
    for pair, why in found.failed.items():
        yield f"failed: {pair}: {why}"
    for place, (names, checked) in enumerate(contaminations(found)):
        yield from ([""] if place or found.notes or found.failed else [])
        yield from ([f"{names}:"] if names else [])
        yield from checked.lines()


def contaminations(found: Comparison) -> list[tuple[str, Contamination]]:
    """(names of the rows, what the check found), alike ones once; a study's own has no name."""
    made: list[tuple[list[str], dict[str, Any]]] = [([], found.contamination)] if found.contamination else []
    for row, evaluation in zip(found.rows, found.evaluations, strict=True):
        if evaluation.contamination:
            alike = next((names for names, checked in made if names and checked == evaluation.contamination), None)
            if alike is None:
                made.append(([row.name], evaluation.contamination))
            else:
                alike.append(row.name)
    return [("; ".join(names), from_dict(checked)) for names, checked in made]
