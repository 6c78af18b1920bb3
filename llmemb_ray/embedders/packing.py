"""Sorting rows by length and cutting them into packs under a token budget. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pack:
    """Rows that go through the model in one forward pass.

    rows:   int64 [B] row numbers, longest first
    shared: how many leading tokens all of them take from the shared prefix
    """

    rows: Index
    shared: int


def order(own_lengths: Index, shared: Index) -> Index:
    """int64 [N]: rows grouped by ``shared`` and sorted by length, longest first (so memory runs out early or not at all)."""
    return np.lexsort((-own_lengths, -shared))


def next_pack(own_lengths: Index, shared: Index, rows: Index, budget: int, *, padded: bool) -> Pack:
    """The first of ``rows`` (in ``order``) that make at most ``budget`` tokens and share alike; at least one row.

    own_lengths: int64 [N] tokens of each row beyond the shared prefix
    padded:      count every row as long as the longest of its pack
    """
    candidates = rows[:budget]
    same = shared[candidates] == shared[candidates[0]]
    lengths = own_lengths[candidates]
    cost = lengths[0] * np.arange(1, len(candidates) + 1) if padded else np.cumsum(lengths)
    fits = (cost <= budget) & np.logical_and.accumulate(same)
    count = len(fits) if fits.all() else max(1, int(np.argmin(fits)))
    return Pack(candidates[:count], int(shared[candidates[0]]))


class TokenBudget:
    """How many tokens go into one pack: found while working, by doubling as long as the rate grows.

    A fixed budget is only ever halved, when memory runs out. ``value`` is the budget in force, in tokens.
    """

    GAIN = 1.03
    """A doubling must raise the rate by this factor to be kept: less is within the noise of one pack."""
    FULL = 0.8
    """Only packs at least this full tell something about a budget."""
    PACKS_PER_SIZE = 2

    def __init__(self, start: int, ceiling: int, fixed: int | None = None) -> None:
        self.value = fixed or start
        self.searching = fixed is None
        self._ceiling = ceiling
        self._rates: list[float] = []
        self._best: tuple[float, int] = (0.0, self.value)

    def record(self, tokens: int, seconds: float) -> None:
        """Tells how long a pack of so many computed tokens took."""
        if not self.searching or tokens < self.FULL * self.value:
            return
        self._rates.append(tokens / seconds)
        if len(self._rates) < self.PACKS_PER_SIZE:
            return
        rate = max(self._rates)
        self._rates = []
        if rate < self._best[0] * self.GAIN:
            self.value, self.searching = self._best[1], False
            return
        self._best = (rate, self.value)
        if self.value * 2 > self._ceiling:
            self.searching = False
        else:
            self.value *= 2

    def halve(self) -> None:
        """Memory ran out at this budget: half of it from now on."""
        self.value = max(1, self.value // 2)
        self.searching = False
