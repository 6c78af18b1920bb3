"""Actors that hang: who counts as hung, and that what hangs is tried again and at last narrowed down. The rest of the way is in test_graph."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from llmemb_ray.pipeline import ledger
from llmemb_ray.pipeline.ledger import HOPELESS_STALLS, UNWATCHED_SECONDS, Directions, Ledger

TIMEOUT, STORAGE = 20.0, 100.0


@dataclass
class Clock:
    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def passes(self, seconds: float, watched: Ledger | None = None) -> None:
        """watched: by a driver that looks every five seconds."""
        end = self.now + seconds
        while watched is not None and self.now + 5 < end:
            self.now += 5
            assert watched.stalled() == []
        self.now = end


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(ledger, "time", made)
    return made


@pytest.fixture
def book(clock: Clock) -> Ledger:
    """With one actor that has its model."""
    made = Ledger(2, 0.0, TIMEOUT, STORAGE)
    made.arrived("actor", "node", 77)
    return made


def test_an_actor_that_computes_and_gives_no_sign_hangs(book: Ledger, clock: Clock) -> None:
    book.begin("unit", 8, "actor")
    book.computing("actor", "unit")
    clock.passes(TIMEOUT - 1, book)
    book.hello("actor")  # A forward pass.
    clock.passes(TIMEOUT - 1, book)
    assert book.stalled() == []
    clock.passes(2)
    (found,) = book.stalled()
    assert (found.actor, found.node, found.pid, found.unit) == ("actor", "node", 77, "unit")
    assert book.stalled() == [], "told once, until it is due again"
    clock.passes(TIMEOUT + 1)
    assert len(book.stalled()) == 1


def test_without_work_or_while_it_loads_no_actor_hangs(book: Ledger, clock: Clock) -> None:
    clock.passes(100 * TIMEOUT, book)
    assert book.stalled() == []
    book.begin("unit", 8, "actor")
    book.computing("actor", "unit")
    book.loads("actor")  # It died, and its successor loads.
    clock.passes(100 * TIMEOUT, book)
    assert book.stalled() == []


def test_storage_may_be_tried_for_as_long_as_it_may(book: Ledger, clock: Clock) -> None:
    book.begin("unit", 8, "actor")
    book.computing("actor", "unit")
    book.computing("actor", None)  # What is left is to write.
    clock.passes(TIMEOUT + 4 * STORAGE - 1, book)
    assert book.stalled() == []
    clock.passes(2)
    assert [found.unit for found in book.stalled()] == ["unit"]
    book.done("unit")
    clock.passes(10 * STORAGE, book)
    assert book.stalled() == []


def test_a_machine_that_slept_hangs_nobody(book: Ledger, clock: Clock) -> None:
    book.begin("unit", 8, "actor")
    book.computing("actor", "unit")
    clock.passes(10 * TIMEOUT + UNWATCHED_SECONDS)
    assert book.stalled() == []


def test_a_row_that_hangs_again_and_again_is_narrowed_down(book: Ledger, clock: Clock) -> None:
    bad, directions = 5, Directions()
    for _ in range(20):
        directions = book.begin("unit", 8, "actor")
        book.computing("actor", "unit")
        hung = next((rows for rows in directions.ranges or [] if bad in range(*rows) and bad not in directions.poison), None)
        if directions.ranges is not None and hung is None:
            break
        if hung is not None:
            book.entering("unit", hung)
        clock.passes(TIMEOUT + 1)
        assert [found.unit for found in book.stalled()] == ["unit"]
        book.loads("actor")
        book.arrived("actor", "node", 78)
    assert directions.poison == (bad,)
    assert directions.last_words.startswith("no progress for 2")


def test_engines_that_hang_on_no_row_in_particular_end_the_job(book: Ledger, clock: Clock) -> None:
    for number in range(HOPELESS_STALLS):
        assert not book.begin(f"unit {number}", 8, "actor").give_up
        book.computing("actor", f"unit {number}")
        clock.passes(TIMEOUT + 1)
        assert len(book.stalled()) == 1
    assert "hang again and again" in book.begin("another", 8, "actor").give_up
    book.done("unit 0")
    assert not book.begin("another", 8, "actor").give_up
