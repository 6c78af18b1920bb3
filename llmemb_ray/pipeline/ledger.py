"""What must outlive an embedder actor: how often a unit was tried, where it died, and live counts.

Invariant: a unit whose engine dies again and again is narrowed down, by halving, to the row at fault. Ray
retries a dead actor's task for ever and does not tell it which attempt it is, so the count lives here.
The class knows no Ray; ``graph`` runs it as an actor beside the driver.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

Range = tuple[int, int]

ALIVE_SECONDS = 60.0
"""An actor that has neither begun a unit nor computed anything for so long is not counted as alive."""


HOPELESS_DEATHS = 100
"""Deaths of engines, without a unit done in between, that end the job: to find one row in a million takes about twenty."""

LOADS_TRIED = 3
"""Loads that may fail for want of memory: that of an engine which was killed may not be free yet."""

LONGEST_WAIT = 60.0
"""Seconds, between two attempts at a unit."""


@dataclass(frozen=True, kw_only=True)
class Directions:
    """How to go about a unit.

    ranges:     None to embed it as a whole, else the row ranges to embed one by one
    poison:     rows known to kill their engine
    wait:       seconds to wait first
    last_words: what the engine said when it died, if anything
    """

    ranges: list[Range] | None = None
    poison: tuple[int, ...] = ()
    wait: float = 0.0
    last_words: str = ""


@dataclass
class _Unit:
    attempts: int = 0
    last_words: str = ""
    ranges: list[Range] = field(default_factory=list)
    entered: Range | None = None
    poison: set[int] = field(default_factory=set)


class Ledger:
    """max_attempts: attempts at a unit before its rows are told apart; retry_wait: seconds before the second of them, doubled for each further one."""

    def __init__(self, max_attempts: int, retry_wait: float = 0.0) -> None:
        self._max_attempts, self._retry_wait = max_attempts, retry_wait
        self._units: dict[str, _Unit] = {}
        self._deaths = self._load_failures = 0
        self._rows = 0
        self._tokens = 0
        self._seen: dict[str, float] = {}
        self._calibrator: str | None = None
        self._calibration: str | None = None
        self._active: set[str] = set()
        self._stopping = False

    def hello(self, actor: str) -> None:
        """An actor is at work now."""
        self._seen[actor] = time.monotonic()

    def calibrates(self, actor: str) -> bool:
        """Whether it is this actor's turn to make the calibration: the first that asks, or the next when that one has died."""
        holder = self._calibrator
        if holder is None or time.monotonic() - self._seen.get(holder, 0.0) > ALIVE_SECONDS:
            self._calibrator = actor
        self.hello(actor)
        return self._calibrator == actor

    def first_calibration(self, made: str) -> str:
        """The calibration that was told here first: this one, or that of an actor that was quicker."""
        self._calibration = self._calibration or made
        return self._calibration

    def stop(self) -> None:
        """No unit is begun from now on."""
        self._stopping = True

    def stopping(self) -> bool:
        return self._stopping

    def may_begin(self, unit: str) -> bool:
        """Whether a unit may still be begun; one that may counts as being worked on until ``done`` or ``failed``."""
        if self._stopping:
            self._active.discard(unit)  # One whose actor died comes again.
            return False
        self._active.add(unit)
        return True

    def at_work(self) -> bool:
        """Whether units that were begun are not done yet."""
        return bool(self._active)

    def begin(self, unit: str, rows: int) -> Directions:
        """Counts an attempt. Waiting is for causes that pass; rows that are told apart are tried at once."""
        state = self._units.setdefault(unit, _Unit())
        state.attempts += 1
        if state.attempts <= self._max_attempts:
            return Directions(wait=min(LONGEST_WAIT, self._retry_wait * 2 ** (state.attempts - 2)) if state.attempts > 1 else 0.0)
        if not state.ranges:
            state.ranges = [(0, rows)]
        elif state.entered is not None:
            self._split(state, state.entered)
        state.entered = None
        return Directions(ranges=list(state.ranges), poison=tuple(sorted(state.poison)), last_words=state.last_words)

    @staticmethod
    def _split(state: _Unit, died_in: Range) -> None:
        first, last = died_in
        place = state.ranges.index(died_in)
        if last - first <= 1:
            state.poison.add(first)
            state.ranges[place : place + 1] = []
        else:
            middle = (first + last) // 2
            state.ranges[place : place + 1] = [(first, middle), (middle, last)]

    def died(self, unit: str, words: str) -> bool:
        """What the engine said when it died on a unit. Returns whether to give up: it died so often that no single row can be at fault."""
        self._units.setdefault(unit, _Unit()).last_words = words
        self._deaths += 1
        return self._deaths >= HOPELESS_DEATHS

    def load_failed(self) -> bool:
        """An actor could not load its model for want of memory. Returns whether to give up, or to let another try."""
        self._load_failures += 1
        return self._load_failures >= LOADS_TRIED

    def entering(self, unit: str, rows: Range | None) -> None:
        """Rows of a unit are computed from now on; None: no longer."""
        self._units.setdefault(unit, _Unit()).entered = rows

    def done(self, unit: str) -> None:
        """Forgets a unit that is committed, so that this never grows with the corpus."""
        self._units.pop(unit, None)
        self._active.discard(unit)
        self._deaths = 0

    def failed(self, unit: str) -> None:
        """A unit that ended without a commit, for a reason other than its engine's death."""
        self._active.discard(unit)

    def add(self, rows: int, tokens: int) -> None:
        """Rows and tokens computed since the last call; retried work counts again, so these are for display alone."""
        self._rows += rows
        self._tokens += tokens

    def counts(self) -> tuple[int, int, int]:
        """(rows, tokens, actors heard of lately)."""
        alive = sum(time.monotonic() - seen < ALIVE_SECONDS for seen in self._seen.values())
        return self._rows, self._tokens, alive
