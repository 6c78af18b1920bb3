"""Successive halving: all on a small sample, the better half on twice as much, until the best are scored on everything.

Invariant: a sample holds the one before it. With first sample 1/F of the whole, F a power of two, F candidates or more
and log2(F)+1 rounds, the work is (log2(F)+1)/F of scoring all on everything: a half for F = 8. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")

Scores = Mapping[T, float | None]
Score = Callable[[Sequence[T], int], Scores[T]]
"""Scores each of some candidates on the first so many items; None for one that cannot be scored."""


@dataclass(frozen=True)
class Round(Generic[T]):
    """ranked: candidates of this round, best first, those that cannot be scored last; size: items they were scored on."""

    size: int
    ranked: list[T]
    scores: dict[T, float | None]


def sizes(size: int, first: int) -> list[int]:
    """Items in the sample of each round: at most size/first (rounded up), doubled until it is the whole."""
    found = [size]
    while found[-1] > -(-size // first):
        found.append((found[-1] + 1) // 2)
    return found[::-1]


def rank(candidates: Sequence[T], scores: Scores[T]) -> list[T]:
    """Best first; equal scores stay as they are."""
    return sorted(candidates, key=lambda candidate: -value if (value := scores[candidate]) is not None else float("inf"))


def halve(candidates: Sequence[T], size: int, *, first: int, score: Score[T]) -> list[Round[T]]:
    """The rounds; the last one is on all ``size`` items. first: the first sample is one ``first``-th of them."""
    rounds: list[Round[T]] = []
    left = list(candidates)
    for sample in sizes(size, first):
        scores = dict(score(left, sample))
        ranked = rank(left, scores)
        rounds.append(Round(sample, ranked, scores))
        left = [candidate for candidate in ranked[: (len(ranked) + 1) // 2] if scores[candidate] is not None]
    return rounds


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Halving against the full search over the same candidates."""

    candidates: int
    same_winner: bool
    winner_rank: int
    """Of halving's winner in the full search."""
    difference: float
    """Score of the full search's winner less that of halving's, × 100."""
    kept_of_best: int
    """Of the full search's ten best (fewer where halving ends with fewer), how many halving scored on everything."""
    best: int
    """How many these ten are."""
    correlations: list[dict[str, float]]
    """For each round: items, candidates, Spearman and Kendall of their scores on the sample and on everything."""
    work: float
    """Items that halving scored, as a share of the full search's."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def agreement(rounds: Sequence[Round[T]], full: Scores[T]) -> Agreement | None:
    """None unless ``full`` holds every candidate of the first round, scored on everything, and one of them has a score."""
    from scipy.stats import kendalltau, spearmanr

    started = rounds[0].ranked
    if any(candidate not in full for candidate in started) or not rounds[-1].ranked:
        return None
    order = rank(sorted(started, key=lambda candidate: full[candidate] is None), full)
    winner, best = rounds[-1].ranked[0], order[0]
    ours, theirs = full[winner], full[best]
    if ours is None or theirs is None:
        return None
    correlations = []
    for step in rounds:
        pairs = [(step.scores[c], full[c]) for c in step.ranked if step.scores[c] is not None and full[c] is not None]
        told = len(pairs) > 2 and all(len(set(side)) > 1 for side in zip(*pairs, strict=True))
        both = [list(side) for side in zip(*pairs, strict=True)]
        correlations.append(
            {"items": float(step.size), "candidates": float(len(step.ranked))}
            | ({"spearman": float(spearmanr(*both).statistic), "kendall": float(kendalltau(*both).statistic)} if told else {})
        )
    ended = set(rounds[-1].ranked)
    top = order[: min(10, len(ended))]
    return Agreement(
        candidates=len(started),
        same_winner=winner == best,
        winner_rank=1 + sum(1 for score in (full[c] for c in started) if score is not None and score > ours),
        difference=theirs - ours,
        kept_of_best=sum(candidate in ended for candidate in top),
        best=len(top),
        correlations=correlations,
        work=sum(step.size * len(step.ranked) for step in rounds) / (rounds[-1].size * len(started)),
    )
