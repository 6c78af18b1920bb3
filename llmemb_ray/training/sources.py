"""The rows of a training's sources: which columns are taken, and what makes a row a training row or a reject.

Invariant: a row is either a training row or a reject with file, row, column and reason; nothing is repaired but a negative that equals a
positive, which is dropped. Knows nothing of batches.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmemb_ray.config.training import FinetuneSettings
from llmemb_ray.corpus import rows as corpus_rows
from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.storage import redact
from llmemb_ray.training import public_sets

ANCHORS = ("anchor", "sent0", "query", "question", "text")
POSITIVES = ("positive", "sent1", "pos", "positive_passages")
NEGATIVES = (r"negative(_\d+)?", r"negatives", r"hard_neg(_\d+)?", r"neg", r"negative_passages")
"""Patterns of names; all columns of the first that a file has are taken."""
TEACHER = "teacher"
SCORES = (("scores",), ("positive_score", "negative_scores"), ("pos_scores", "neg_scores"))
"""Columns that together hold the scores of the positives and the negatives; the second are those that `llmemb mine` writes."""
STRICT = "instruction"
INSTRUCTIONS = (STRICT, "task")
"""Columns of a row's own instruction, the first that is there. In ``instruction`` a value that is not text makes the row a reject; ``task`` is
also a common name of numbers and labels, so that there it is passed over."""

Distill = Literal["none", "vectors", "scores"]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A source with all that is settled for it. anchor … scores: the column that the settings name, or None; usual …: else the first that is there."""

    place: str
    """In the settings, such as train[0]."""
    name: str
    files: tuple[str, ...]
    weight: float
    instructions: tuple[str, ...]
    symmetric: bool
    anchor: str | None
    positive: str | None
    negatives: tuple[str, ...]
    teacher: str | None
    scores: str | None
    usual_anchors: tuple[str, ...]
    usual_positives: tuple[str, ...]
    usual_negatives: tuple[str, ...]

    def described(self) -> dict[str, Any]:
        """What batches depend on besides the files."""
        return {name: value for name, value in vars(self).items() if name not in ("place", "files")}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names in one file."""

    anchor: str
    positive: str | None
    negatives: tuple[str, ...]
    teacher: str | None
    scores: tuple[str, ...]
    instruction: str | None

    @property
    def names(self) -> list[str]:
        return [name for name in dict.fromkeys((self.anchor, self.positive, *self.negatives, self.teacher, *self.scores, self.instruction)) if name]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A training row. positives: one is drawn for each epoch, none where there is a teacher's vector alone; scores: of positives, then negatives."""

    anchor: str
    positives: list[str]
    negatives: list[str]
    teacher: list[float] | None
    scores: list[float] | None
    instruction: str | None
    """Its own; None for those of its source."""

    @property
    def characters(self) -> float:
        """About what it adds to a batch with one negative."""
        positive = sum(map(len, self.positives)) / max(1, len(self.positives))
        return len(self.anchor) + positive + sum(map(len, self.negatives)) / max(1, len(self.negatives)) + 4 * len(self.teacher or ())


@dataclass(frozen=True, kw_only=True)
class Bad:
    """Why a row is none. column: at fault."""

    column: str
    reason: str
    detail: str


def settle(settings: FinetuneSettings) -> list[Origin]:
    """The sources with their files. Raises ConfigError, or InputError where there are no files."""
    made: list[Origin] = []
    for number, source in enumerate(settings.train):
        place = f"train[{number}]"
        known = public_sets.find(source.dataset) if source.dataset else None
        files = tuple(corpus_rows.files_of(source.path, settings.access, setting=f"{place}.path"))
        name = source.name or (known.name if known else _name_of(source.path[0])) or place
        if any(name == other.name for other in made):
            name = f"{name}-{number}"
        made.append(
            Origin(
                place=place,
                name=name,
                files=files,
                weight=source.weight if source.weight is not None else known.share if known else 1.0,
                instructions=tuple(source.instruction) or (known.instructions if known else ()),
                symmetric=source.symmetric if source.symmetric is not None else bool(known and known.symmetric),
                anchor=source.anchor_column,
                positive=source.positive_column,
                negatives=tuple(source.negative_column),
                teacher=source.teacher_column,
                scores=source.scores_column,
                usual_anchors=tuple(dict.fromkeys((*(known.anchor if known else ()), *ANCHORS))),
                usual_positives=tuple(dict.fromkeys((*(known.positive if known else ()), *POSITIVES))),
                usual_negatives=tuple(dict.fromkeys((*(known.negative if known else ()), *NEGATIVES))),
            )
        )
    return made


def _name_of(path: str) -> str:
    """Of a source: its file's or directory's; of a glob the directory's."""
    while any(mark in posixpath.basename(path) for mark in "*?["):
        path = posixpath.dirname(path)
    return posixpath.splitext(posixpath.basename(path.rstrip("/")))[0]


def columns(origin: Origin, names: Sequence[str], url: str, distill: Distill) -> Columns:
    """What is taken of a file with columns ``names``. Raises ConfigError naming file, its columns and the setting."""
    shown = redact(url)

    def find(setting: str, named: str | None, usual: Sequence[str], must: bool) -> str | None:
        if named is not None and named not in names:
            raise ConfigError(f"{origin.place}.{setting}: {shown} has no column {named!r}; its columns are {', '.join(names)}")
        found = named or _first(usual, names)
        if found is None and must:
            raise ConfigError(f"{origin.place}.{setting}: {shown} has no column {' or '.join(usual)}; name one of its columns, {', '.join(names)}")
        return found

    teacher = find("teacher_column", origin.teacher, (TEACHER,), False) if distill == "vectors" else None
    anchor = find("anchor_column", origin.anchor, origin.usual_anchors, True)
    assert anchor is not None
    positive = find("positive_column", origin.positive, origin.usual_positives, teacher is None)
    for name in origin.negatives:
        find("negative_column", name, (), True)
    negatives, scores = _negatives(origin, positive, names), _scores(positive, names, distill)
    if distill == "scores" and positive is not None and (named := find("scores_column", origin.scores, (), False)):
        scores = (named,)
    return Columns(anchor=anchor, positive=positive, negatives=negatives, teacher=teacher, scores=scores, instruction=_first(INSTRUCTIONS, names))


def columns_of_row(origin: Origin, file: Columns, names: Sequence[str], distill: Distill) -> Columns:
    """What is taken of a row of JSON lines, which has columns ``names`` of its own. file: of the file's first rows.

    Anchor, positive and teacher are those of ``file`` where it has them, so that a row without is a reject and no other column stands in for them.
    Negatives, scores and instruction are the row's own; without scores where ``file`` has them it is a reject too.
    """
    teacher = file.teacher or (_first((TEACHER,), names) if distill == "vectors" else None)
    positive = file.positive or _first(origin.usual_positives, names)
    return Columns(
        anchor=file.anchor,
        positive=positive,
        negatives=_negatives(origin, positive, names),
        teacher=teacher,
        scores=(() if origin.scores else _scores(positive, names, distill)) or file.scores,
        instruction=_first(INSTRUCTIONS, names),
    )


def _first(usual: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in usual if name in names), None)


def _negatives(origin: Origin, positive: str | None, names: Sequence[str]) -> tuple[str, ...]:
    for pattern in () if origin.negatives or positive is None else origin.usual_negatives:
        if taken := sorted((name for name in names if re.fullmatch(pattern, name)), key=lambda name: [int(part) for part in re.findall(r"\d+", name)]):
            return tuple(taken)
    return origin.negatives


def _scores(positive: str | None, names: Sequence[str], distill: Distill) -> tuple[str, ...]:
    if distill != "scores" or positive is None:
        return ()
    return next((together for together in SCORES if all(name in names for name in together)), ())


def check(values: Mapping[str, Any], columns: Columns, *, teacher_length: int | None = None, blanks: bool = False) -> Row | Bad:
    """A training row of a file's row. teacher_length: of the teacher's vectors, None for any; blanks: an empty cell is a negative that is absent (CSV)."""
    anchor = values.get(columns.anchor)
    if problem := corpus_rows.text_problem(anchor):
        return _bad(columns.anchor, problem, anchor)
    positives: list[Any] = []
    if columns.positive is not None:
        value = values.get(columns.positive)
        positives = [_passage(item) for item in (value if isinstance(value, list) else [value])]
        if columns.teacher is not None and value is None:
            positives = []
        elif not positives:
            return Bad(column=columns.positive, reason="no positive", detail=f"column {columns.positive!r}: the list is empty")
        for item in positives:
            if problem := corpus_rows.text_problem(item):
                return _bad(columns.positive, problem, item)
    negatives: list[Any] = []
    for name in columns.negatives:
        value = values.get(name)
        for raw in value if isinstance(value, list) else [value]:
            item = _passage(raw)
            if item is None or (blanks and item == ""):
                continue
            if problem := corpus_rows.text_problem(item):
                return _bad(name, problem, item)
            if item.strip() == str(anchor).strip():
                return Bad(column=name, reason="negative equals anchor", detail=f"column {name!r}: {_shown(item)} is the anchor too")
            negatives.append(item)
    teacher = _numbers(values.get(columns.teacher)) if columns.teacher is not None else None
    if columns.teacher is not None:
        if values.get(columns.teacher) is None:
            return Bad(column=columns.teacher, reason="null", detail=f"column {columns.teacher!r}: no vector of the teacher")
        if not teacher or (teacher_length is not None and len(teacher) != teacher_length):
            wanted = f"{teacher_length} numbers as in the rows before" if teacher_length else "a list of numbers"
            return Bad(column=columns.teacher, reason="teacher vector malformed", detail=f"column {columns.teacher!r}: not {wanted}, but {_size(teacher)}")
        if not all(map(math.isfinite, teacher)):
            return Bad(column=columns.teacher, reason="teacher vector not finite", detail=f"column {columns.teacher!r}: has values that are not finite")
    scores: list[float] | None = None
    if columns.scores:
        scores = []
        for name in columns.scores:
            value = values.get(name)
            found = _numbers(value if isinstance(value, list) else [value])
            if found is None or not all(map(math.isfinite, found)):
                return Bad(column=name, reason="scores malformed", detail=f"column {name!r}: {_shown(value)} is no list of finite numbers")
            scores += found
        if len(scores) != len(positives) + len(negatives):
            detail = f"column {columns.scores[-1]!r}: {len(scores)} scores of {len(positives)} positives and {len(negatives)} negatives"
            return Bad(column=columns.scores[-1], reason="scores of a wrong count", detail=detail)
    forbidden = {text.strip() for text in positives}
    kept = [number for number, text in enumerate(negatives) if text.strip() not in forbidden]
    if negatives and not kept:
        return Bad(
            column=columns.negatives[0], reason="negative equals positive", detail=f"{_shown(negatives[0])} is positive and negative, and there is no other"
        )
    own = values.get(columns.instruction) if columns.instruction else None
    problem = corpus_rows.text_problem(own)
    if problem == "not text" and columns.instruction != STRICT:
        own = None
    elif problem in ("not text", "not valid Unicode"):
        return _bad(columns.instruction or "", problem, own)
    return Row(
        anchor=str(anchor),
        positives=positives,
        negatives=[negatives[number] for number in kept],
        teacher=teacher,
        scores=None if scores is None else scores[: len(positives)] + [scores[len(positives) + number] for number in kept],
        instruction=own if own is None or own.strip() else None,
    )


def require_majority(origin: Origin, rows: int, reasons: Mapping[str, int], examples: Mapping[str, str]) -> None:
    """examples: 'file row number: detail' by reason. Raises InputError where more than half of a source's rows are rejects, or it has none."""
    rejected = sum(reasons.values())
    if rows and rejected * 2 <= rows:
        return
    if not rows:
        raise InputError(f"{origin.place}.path: {', '.join(map(redact, origin.files[:3]))} {'hold' if len(origin.files) > 1 else 'holds'} no rows")
    worst = max(reasons, key=lambda reason: reasons[reason])
    raise InputError(
        f"{origin.place} ({origin.name}): {rejected:,} of {rows:,} rows cannot be trained on, {reasons[worst]:,} of them for '{worst}': {examples[worst]}; "
        "name the right columns, or mend the file"
    )


def _passage(item: Any) -> Any:
    """Its title and text in one, of an item that is a passage with them (paper 2's form of documents)."""
    if isinstance(item, dict) and isinstance(item.get("text"), str):
        return f"{item.get('title') or ''} {item['text']}".strip()
    return item


def _bad(column: str, reason: str, value: Any) -> Bad:
    return Bad(column=column, reason=reason, detail=f"column {column!r}: {_shown(value)} is no text")


def _numbers(value: Any) -> list[float] | None:
    if not isinstance(value, list) or not all(isinstance(item, int | float) and not isinstance(item, bool) for item in value):
        return None
    return [float(item) for item in value]


def _size(numbers: list[float] | None) -> str:
    return "something else" if numbers is None else f"{len(numbers)} numbers"


def _shown(value: Any) -> str:
    return repr(value)[:60]
