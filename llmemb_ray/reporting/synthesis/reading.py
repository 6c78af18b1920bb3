"""One pass over the rows of a synthesis: what is counted of all of them, and the few that are kept.

Invariant: memory holds counts and the rows kept. Which are kept follows from the run key and the row alone: the same ones each time.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from llmemb_ray.synthesis import duplicates
from llmemb_ray.synthesis.families import FAMILIES
from llmemb_ray.synthesis.languages import LANGUAGES, count_words

OF_A_CELL, OF_A_REASON = 3, 6
"""Rejects kept of each reason and family; rejects shown of each reason, of all families in turn."""

RAW_CHARACTERS = 4000
"""Of an answer that was rejected."""

_CODES = {language.name: code for code, language in LANGUAGES.items()}


@dataclass(kw_only=True)
class Tally:
    """Requests by what became of them."""

    asked: int = 0
    accepted: int = 0
    rejected: int = 0
    duplicates: int = 0

    def add(self, kind: str, count: int = 1) -> None:
        self.asked += count
        setattr(self, kind, getattr(self, kind) + count)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Texts of one kind in one family, in words. low and high: 5 and 95 in 100 are shorter."""

    family: str
    text: str
    low: float
    q1: float
    median: float
    q3: float
    high: float
    longest: float


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One example. language, target: in English; target: of positive and negative, where it is another."""

    row: int
    task: str
    language: str
    target: str | None
    placeholders: dict[str, str]
    notes: list[str]
    query: str
    positive: str
    negative: str | None


@dataclass(frozen=True, kw_only=True)
class Reject:
    row: int
    family: str
    language: str
    task: str
    detail: str
    raw: str | None
    """The beginning of the answer; None where there was none."""
    raw_characters: int


@dataclass(frozen=True, kw_only=True)
class Reason:
    reason: str
    count: int
    families: dict[str, int]
    examples: list[Reject]


Item = TypeVar("Item")


class _Reservoir(Generic[Item]):
    """The ``size`` items of the smallest keys."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[int, int, Item]] = []

    def wants(self, key: int) -> bool:
        return len(self._heap) < self._size or -key > self._heap[0][0]

    def add(self, key: int, row: int, item: Item) -> None:
        """row: tells items of one key apart."""
        (heapq.heappush if len(self._heap) < self._size else heapq.heapreplace)(self._heap, (-key, row, item))

    def items(self) -> list[Item]:
        """In the order of their keys."""
        return [item for _, _, item in sorted(self._heap, key=lambda kept: (-kept[0], kept[1]))]


@dataclass
class Reading:
    """What is kept of the rows read so far."""

    run_key: str
    sample_size: int
    families: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    languages: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    tasks: dict[tuple[str, str], Tally] = field(default_factory=lambda: defaultdict(Tally))
    notes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    lengths: dict[tuple[str, str], Counter[float]] = field(default_factory=lambda: defaultdict(Counter))
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    samples: dict[str, _Reservoir[Sample]] = field(init=False)
    rejects: dict[tuple[str, str], _Reservoir[Reject]] = field(default_factory=lambda: defaultdict(lambda: _Reservoir(OF_A_CELL)))

    def __post_init__(self) -> None:
        self.samples = defaultdict(lambda: _Reservoir(self.sample_size))

    def example(self, row: Mapping[str, Any]) -> None:
        family, language, key = row["family"], row["language"], self._key(row["row"])
        self._count(row, "accepted")
        for note in row["notes"] or ():
            self.notes[note][family] += 1
        placeholders = json.loads(row["placeholders"])
        target = placeholders.get("tgt_lang") if family == "bitext" else None
        for name in duplicates.TEXTS:
            if row[name] is not None:
                code = language if name == "query" or target is None else _CODES.get(target, language)
                self.lengths[family, name][count_words(row[name], code)] += 1
        if self.samples[family].wants(key):
            others = {name: value for name, value in placeholders.items() if name not in ("src_lang", "tgt_lang")}
            texts = {name: row[name] for name in ("row", "task", *duplicates.TEXTS)}
            sample = Sample(**texts, language=_named(language), target=target, placeholders=others, notes=row["notes"] or [])
            self.samples[family].add(key, row["row"], sample)

    def reject(self, row: Mapping[str, Any]) -> None:
        reason, family, key = row["reason"], row["family"], self._key(row["row"])
        self._count(row, "duplicates" if reason in duplicates.REASONS else "rejected")
        self.counts[reason][family] += 1
        kept = self.rejects[reason, family]
        if kept.wants(key):
            raw = row["raw"]
            made = Reject(
                row=row["row"],
                family=family,
                language=_named(row["language"]),
                task=row["task"],
                detail=row["detail"] or "",
                raw=None if raw is None else raw[:RAW_CHARACTERS],
                raw_characters=len(raw or ""),
            )
            kept.add(key, row["row"], made)

    def all_lengths(self) -> Iterator[Lengths]:
        for family in FAMILIES:
            for text in duplicates.TEXTS:
                if counts := self.lengths.get((family, text)):
                    low, q1, median, q3, high, longest = quantiles(counts, (0.05, 0.25, 0.5, 0.75, 0.95, 1.0))
                    yield Lengths(family=family, text=text, low=low, q1=q1, median=median, q3=q3, high=high, longest=longest)

    def reasons(self, with_text: bool) -> Iterator[Reason]:
        for reason, counts in sorted(self.counts.items(), key=lambda item: (-item[1].total(), item[0])):
            families = {name: counts[name] for name in ordered(counts)}
            by_family = [self.rejects[reason, family].items() for family in families]
            in_turn = [kept[place] for place in range(OF_A_CELL) for kept in by_family if place < len(kept)]
            yield Reason(reason=reason, count=counts.total(), families=families, examples=in_turn[:OF_A_REASON] if with_text else [])

    def _count(self, row: Mapping[str, Any], kind: str) -> None:
        family = row["family"]
        self.families[family].add(kind)
        self.languages[_named(row["language"])].add(kind)
        if family in FAMILIES and FAMILIES[family].asymmetric:
            self.tasks[family, row["task"]].add(kind)

    def _key(self, row: int) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self.run_key}/{row}".encode(), digest_size=8).digest(), "big")


def quantiles(counts: Mapping[float, int], shares: Sequence[float]) -> list[float]:
    """Of values that stand ``counts`` times: the smallest value that the share of all is not above."""
    ordered, whole = sorted(counts.items()), sum(counts.values())
    found: list[float] = []
    place, running = 0, ordered[0][1]
    for share in shares:
        while running < math.ceil(share * whole):
            place += 1
            running += ordered[place][1]
        found.append(ordered[place][0])
    return found


def ordered(names: Mapping[str, Any]) -> list[str]:
    """Families as the paper has them, others behind."""
    return [*(name for name in FAMILIES if name in names), *sorted(name for name in names if name not in FAMILIES)]


def _named(code: str) -> str:
    return LANGUAGES[code].name if code in LANGUAGES else code
