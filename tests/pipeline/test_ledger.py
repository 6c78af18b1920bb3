"""The ledger narrows a unit that kills its engine down to the row at fault."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from llmemb_ray.pipeline.ledger import HOPELESS_DEATHS, LOADS_TRIED, Directions, Ledger


class Engine:
    """Embeds by the ledger's directions and dies on its poison rows, as an actor would."""

    def __init__(self, rows: int, poison: set[int], ledger: Ledger) -> None:
        self.rows, self.poison, self.ledger = rows, poison, ledger

    def attempt(self) -> set[int] | None:
        """The rows embedded, or None if the process died."""
        directions = self.ledger.begin("unit", self.rows)
        if directions.ranges is None:
            return None if self.poison else set(range(self.rows))
        known = directions.poison
        embedded: set[int] = set()
        for first, last in directions.ranges:
            self.ledger.entering("unit", (first, last))
            todo = set(range(first, last)) - set(known)
            if todo & self.poison:
                return None
            embedded |= todo
        return embedded


@given(rows=st.integers(1, 300), data=st.data())
def test_only_the_poison_rows_are_lost(rows: int, data: st.DataObject) -> None:
    poison = data.draw(st.sets(st.integers(0, rows - 1), max_size=3))
    engine = Engine(rows, poison, Ledger(max_attempts=2))
    limit = 2 + (1 + len(poison)) * (math.ceil(math.log2(rows)) + 2) if poison else 1
    for _ in range(limit):
        embedded = engine.attempt()
        if embedded is not None:
            break
    assert embedded == set(range(rows)) - poison


def test_a_unit_is_taken_whole_until_its_attempts_are_used_up() -> None:
    ledger = Ledger(max_attempts=3)
    assert [ledger.begin("unit", 10).ranges for _ in range(3)] == [None, None, None]
    assert ledger.begin("unit", 10).ranges == [(0, 10)]


def test_an_actor_lost_for_another_reason_costs_no_row() -> None:
    ledger = Ledger(max_attempts=1)
    ledger.begin("unit", 8)
    assert ledger.begin("unit", 8) == Directions(ranges=[(0, 8)])
    assert ledger.begin("unit", 8) == Directions(ranges=[(0, 8)]), "it died before it entered any range"


def test_engines_that_die_on_no_row_in_particular_end_the_job() -> None:
    ledger = Ledger(max_attempts=1)
    assert [ledger.died("unit", "broken") for _ in range(HOPELESS_DEATHS)] == [False] * (HOPELESS_DEATHS - 1) + [True]
    ledger.done("unit")
    assert not ledger.died("another", "broken")
    assert [ledger.load_failed() for _ in range(LOADS_TRIED)] == [False] * (LOADS_TRIED - 1) + [True]


def test_a_range_that_is_left_is_not_halved_when_another_unit_kills_the_engine() -> None:
    ledger = Ledger(max_attempts=1)
    ledger.begin("unit", 8)
    ledger.begin("unit", 8)
    ledger.entering("unit", (0, 8))
    ledger.entering("unit", None)
    assert ledger.begin("unit", 8) == Directions(ranges=[(0, 8)])


def test_a_committed_unit_is_forgotten() -> None:
    ledger = Ledger(max_attempts=1)
    ledger.begin("unit", 4)
    ledger.done("unit")
    assert ledger.begin("unit", 4) == Directions()


def test_whole_units_wait_longer_after_each_death_and_rows_told_apart_do_not_wait() -> None:
    ledger = Ledger(max_attempts=9, retry_wait=2.0)
    waits = [ledger.begin("unit", 8).wait for _ in range(10)]
    assert waits == [0, 2, 4, 8, 16, 32, 60, 60, 60, 0]
    assert ledger.begin("another", 8).wait == 0


def test_what_the_engine_said_last_is_told_with_the_rows_at_fault() -> None:
    ledger = Ledger(max_attempts=1)
    ledger.begin("unit", 1)
    ledger.died("unit", "illegal memory access")
    ledger.begin("unit", 1)
    ledger.entering("unit", (0, 1))
    directions = ledger.begin("unit", 1)
    assert (directions.poison, directions.last_words) == ((0,), "illegal memory access")
