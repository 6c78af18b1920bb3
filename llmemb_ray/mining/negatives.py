"""Which of the rows found for a query are hard negatives of one of its positives.

Invariant: every row found is either eligible or counted under the first rule that removes it, and what is eligible depends on this query
and this positive alone. Pure: scores and flags in, places out.

Shapes: K rows found for a query, best first; E of them eligible.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from llmemb_ray.config import MineSettings

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

QUERY, POSITIVE, RANK, MIN_SCORE, MAX_SCORE, MARGIN, RELATIVE = "equals the query", "positive", "rank", "min_score", "max_score", "margin", "relative_margin"
DUPLICATE = "equals another negative"
REASONS = (QUERY, POSITIVE, RANK, MIN_SCORE, MAX_SCORE, MARGIN, RELATIVE, DUPLICATE)
"""Why a row found is no negative, in the order in which they are asked."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    rank_from: int = 1
    rank_to: int | None = None
    min_score: float | None = None
    max_score: float | None = None
    margin: float | None = None
    relative_margin: float | None = None
    sample: Literal["top", "random"] = "top"
    seed: int = 0

    @classmethod
    def of(cls, settings: MineSettings) -> Rules:
        return cls(**{name: getattr(settings, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Eligible:
    """places: int64 [E], of the rows found; ranks: int64 [K], from 1, of each row found, 0 where it equals query or positive; removed: by reason."""

    places: Ints
    ranks: Ints
    removed: Counter[str]


def eligible(scores_K: Floats, *, own_K: Bools, positives_K: Bools, positive_score: float, rules: Rules) -> Eligible:
    """scores_K: falling; own_K: the row's text is the query's; positives_K: it is one of the query's positives.

    The relative margin is taken of the score's size, so that it is a margin below the positive where scores are negative too.
    """
    left = ~own_K & ~positives_K
    removed = Counter({QUERY: int(own_K.sum()), POSITIVE: int((positives_K & ~own_K).sum())})
    ranks = np.where(left, np.cumsum(left), 0)
    last = rules.rank_to if rules.rank_to is not None else len(scores_K)
    tests: dict[str, Bools] = {RANK: (ranks < rules.rank_from) | (ranks > last)}
    if rules.min_score is not None:
        tests[MIN_SCORE] = scores_K < rules.min_score
    if rules.max_score is not None:
        tests[MAX_SCORE] = scores_K > rules.max_score
    if rules.margin is not None:
        tests[MARGIN] = scores_K > positive_score - rules.margin
    if rules.relative_margin is not None:
        tests[RELATIVE] = scores_K > positive_score - rules.relative_margin * abs(positive_score)
    for reason, fails_K in tests.items():
        removed[reason] = int((left & fails_K).sum())
        left &= ~fails_K
    return Eligible(np.flatnonzero(left), ranks, +removed)


def preference(places_E: Ints, rules: Rules, *, row: tuple[int, ...]) -> Ints:
    """int64 [E]: the places in the order in which they are taken. row: numbers that name the triple, which seed its draw."""
    if rules.sample == "top":
        return places_E
    return np.random.default_rng([rules.seed, *row]).permutation(places_E)
