"""Actors that hang: who counts as hung, and that what hangs is tried again and at last narrowed down. The rest of the way is in test_graph."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from llmemb_ray.pipeline import inprocess, ledger, stalls
from llmemb_ray.pipeline.ledger import CALIBRATION, HOPELESS_STALLS, UNWATCHED_SECONDS, Directions, Ledger, Process
from tests.small_jobs import embed, write

TIMEOUT, STORAGE = 20.0, 100.0

ACTOR = Process("actor", "node", 77, 1)


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
    made.arrived(ACTOR)
    return made


def test_an_actor_that_computes_and_gives_no_sign_hangs(book: Ledger, clock: Clock) -> None:
    book.begin("unit", 8, ACTOR)
    book.computing(ACTOR, "unit")
    clock.passes(TIMEOUT - 1, book)
    book.hello("actor")  # A forward pass.
    clock.passes(TIMEOUT - 1, book)
    assert book.stalled() == []
    clock.passes(2)
    (found,) = book.stalled()
    assert (found.process, found.unit) == (ACTOR, "unit")
    assert book.stalled() == [], "told once, until it is due again"
    clock.passes(TIMEOUT + 1)
    assert len(book.stalled()) == 1


def test_without_work_or_while_it_loads_no_actor_hangs(book: Ledger, clock: Clock) -> None:
    clock.passes(100 * TIMEOUT, book)
    assert book.stalled() == []
    book.begin("unit", 8, ACTOR)
    book.computing(ACTOR, "unit")
    book.loads("actor")  # It died, and its successor loads.
    clock.passes(100 * TIMEOUT, book)
    assert book.stalled() == []


def test_storage_may_be_tried_for_as_long_as_it_may(book: Ledger, clock: Clock) -> None:
    book.begin("unit", 8, ACTOR)
    book.computing(ACTOR, "unit")
    book.computed(ACTOR, "unit")  # What is left is to write.
    clock.passes(TIMEOUT + 4 * STORAGE - 1, book)
    assert book.stalled() == []
    clock.passes(2)
    assert [found.unit for found in book.stalled()] == ["unit"]
    book.done("unit")
    clock.passes(10 * STORAGE, book)
    assert book.stalled() == []


def test_a_machine_that_slept_hangs_nobody(book: Ledger, clock: Clock) -> None:
    book.begin("unit", 8, ACTOR)
    book.computing(ACTOR, "unit")
    clock.passes(10 * TIMEOUT + UNWATCHED_SECONDS)
    assert book.stalled() == []


def test_a_row_that_hangs_again_and_again_is_narrowed_down(book: Ledger, clock: Clock) -> None:
    bad, directions = 5, Directions()
    for _ in range(20):
        directions = book.begin("unit", 8, ACTOR)
        book.computing(ACTOR, "unit")
        hung = next((rows for rows in directions.ranges or [] if bad in range(*rows) and bad not in directions.poison), None)
        if directions.ranges is not None and hung is None:
            break
        if hung is not None:
            book.entering("unit", hung)
        clock.passes(TIMEOUT + 1)
        (found,) = book.stalled()
        book.ended(found, killed=True)
        book.loads("actor")
        book.arrived(replace(ACTOR, pid=78))
    assert directions.poison == (bad,)
    assert directions.last_words.startswith("no progress for 2")


def test_engines_that_hang_on_no_row_in_particular_end_the_job(book: Ledger, clock: Clock) -> None:
    for number in range(HOPELESS_STALLS):
        assert not book.begin(f"unit {number}", 8, ACTOR).give_up
        book.computing(ACTOR, f"unit {number}")
        clock.passes(TIMEOUT + 1)
        (found,) = book.stalled()
        book.ended(found, killed=True)
    assert "hang again and again" in book.begin("another", 8, ACTOR).give_up
    book.done("unit 0")
    assert not book.begin("another", 8, ACTOR).give_up


def test_actors_that_are_lost_with_their_nodes_do_not_count_as_hung(book: Ledger, clock: Clock) -> None:
    for number in range(2 * HOPELESS_STALLS):
        lost = Process(f"actor {number}", "spot", number)
        book.begin(f"unit {number}", 8, lost)
        book.computing(lost, f"unit {number}")
    clock.passes(TIMEOUT + 1)
    found = book.stalled()
    assert len(found) == 2 * HOPELESS_STALLS
    for one in found:
        book.ended(one, killed=False)
    clock.passes(100 * TIMEOUT, book)
    directions = [book.begin("unit 0", 8, ACTOR) for _ in range(3)]
    assert directions[-1] == Directions(ranges=[(0, 8)]), "neither given up nor said to have hung"


def test_what_is_told_of_a_process_does_not_touch_its_successor(book: Ledger, clock: Clock) -> None:
    book.begin("unit", 8, ACTOR)
    book.computing(ACTOR, "unit")
    clock.passes(TIMEOUT + 1)
    (found,) = book.stalled()
    next_one = replace(ACTOR, pid=78)
    book.loads("actor")
    book.arrived(next_one)
    book.begin("unit", 8, next_one)
    book.ended(found, killed=True)
    book.computing(next_one, "unit")
    clock.passes(TIMEOUT + 1)
    assert [one.process for one in book.stalled()] == [next_one]


@pytest.mark.parametrize("told", ["begin", "computing", "computed"])
def test_a_ledger_that_was_started_anew_knows_an_actor_by_its_next_step(clock: Clock, told: str) -> None:
    anew = Ledger(2, 0.0, TIMEOUT)
    anew.hello("actor")
    anew.begin("unit", 8, ACTOR) if told == "begin" else getattr(anew, told)(ACTOR, "unit")
    assert anew.at_work()
    clock.passes(TIMEOUT + 1)
    assert [found.process for found in anew.stalled()] == [ACTOR]
    anew.done("unit")
    assert not anew.at_work()


def test_a_calibration_may_hang_as_well_but_holds_up_no_end(book: Ledger, clock: Clock) -> None:
    book.begin(CALIBRATION, 0, ACTOR)
    book.computing(ACTOR, CALIBRATION)
    assert not book.at_work()
    clock.passes(TIMEOUT + 1)
    assert [found.unit for found in book.stalled()] == [CALIBRATION]
    book.computed(ACTOR, CALIBRATION)
    book.done(CALIBRATION)
    clock.passes(100 * STORAGE, book)
    assert book.stalled() == []


def test_only_the_process_that_is_meant_is_ended() -> None:
    with subprocess.Popen([sys.executable, "-P", "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = Process("actor", "node", child.pid, stalls.started(child.pid))
        assert process.started is not None
        assert not stalls.kill(replace(process, started=process.started - 1)), "another one had this pid"
        assert child.poll() is None
        assert stalls.kill(process)
        assert child.wait() == -9
        assert not stalls.kill(process)


def test_copying_from_an_earlier_run_gives_a_sign_after_each_shard(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in.parquet", [f"text {row}" for row in range(20)], id=list(range(20)))
    embed(source, tmp_path / "earlier", model, rows_per_unit=5)
    packs: list[tuple[int, int]] = []
    monkeypatch.setattr(inprocess.Execution, "_on_pack", lambda self, rows, tokens: packs.append((rows, tokens)))
    assert embed(source, tmp_path / "out", model, reuse=str(tmp_path / "earlier")).reused == 20
    assert len(packs) >= 4
    assert set(packs) == {(0, 0)}, "nothing was computed"
