"""Packs respect the token budget, hold rows that share alike, and lose no row; the budget finds its size and is halved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmemb_ray.embedders.packing import TokenBudget, next_pack, order

ROWS = st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0, 5, 9])), min_size=1, max_size=60)


@given(rows=ROWS, budget=st.integers(1, 120), padded=st.booleans())
def test_every_row_once_and_never_above_the_budget(rows: list[tuple[int, int]], budget: int, padded: bool) -> None:
    own, shared = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    todo, seen = order(own, shared), []
    while len(todo):
        pack = next_pack(own, shared, todo, budget, padded=padded)
        lengths = own[pack.rows]
        cost = int(lengths.max()) * len(lengths) if padded else int(lengths.sum())
        assert len(pack.rows) == 1 or cost <= budget
        assert set(shared[pack.rows].tolist()) == {pack.shared}
        assert (np.diff(lengths) <= 0).all()
        seen += pack.rows.tolist()
        todo = todo[len(pack.rows) :]
    assert sorted(seen) == list(range(len(rows)))


@given(rows=ROWS, budget=st.integers(1, 120), padded=st.booleans())
def test_a_pack_takes_every_row_that_still_fits(rows: list[tuple[int, int]], budget: int, padded: bool) -> None:
    own, shared = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    todo = order(own, shared)
    taken = next_pack(own, shared, todo, budget, padded=padded).rows
    if len(taken) == len(todo):
        return
    following = todo[len(taken)]
    more = int(own[taken].max()) * (len(taken) + 1) if padded else int(own[taken].sum() + own[following])
    assert shared[following] != shared[taken[0]] or more > budget


def work(budget: TokenBudget, best: int, *, fill: float = 1.0, packs: int = 60) -> None:
    """A machine whose rate grows in proportion up to ``best`` tokens a pack and stays there."""
    for _ in range(packs):
        tokens = int(budget.value * fill)
        budget.record(tokens, tokens / min(tokens, best))


@pytest.mark.parametrize(("best", "found"), [(64, 64), (256, 256), (10_000, 1024), (500, 512)])
def test_the_search_stops_where_the_rate_stops_growing_or_at_the_ceiling(best: int, found: int) -> None:
    budget = TokenBudget(64, 1024)
    work(budget, best)
    assert (budget.value, budget.searching) == (found, False)


def test_packs_that_are_not_full_teach_nothing() -> None:
    budget = TokenBudget(64, 1024)
    work(budget, 10_000, fill=0.5)
    assert (budget.value, budget.searching) == (64, True)


def test_one_slow_pack_does_not_end_the_search() -> None:
    budget = TokenBudget(64, 128)
    budget.record(64, 1.0)
    budget.record(64, 1.0)
    assert budget.value == 128
    budget.record(128, 50.0)
    budget.record(128, 1.0)
    assert budget.value == 128


def test_a_fixed_budget_is_kept_until_memory_runs_out() -> None:
    budget = TokenBudget(64, 1024, fixed=100)
    work(budget, 10_000)
    assert (budget.value, budget.searching) == (100, False)
    budget.halve()
    assert budget.value == 50


def test_halving_ends_the_search_and_never_reaches_nothing() -> None:
    budget = TokenBudget(64, 1024)
    for _ in range(20):
        budget.halve()
    assert (budget.value, budget.searching) == (1, False)
