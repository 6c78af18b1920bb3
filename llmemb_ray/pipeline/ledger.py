"""What must outlive an embedder actor: how often a unit was tried, where it died or hung, and live counts.

Invariant: a unit whose engine dies or hangs again and again is narrowed down, by halving, to the row at fault. Ray
retries a dead actor's task for ever and does not tell it which attempt it is, so the count lives here. An actor counts as
hung when it has begun units and given no sign for longer than any step of theirs may take; loading is no such step. It is
counted only when its process was there to be ended: one that was lost with its node gives no sign either. Actors say with each
step who they are, so that a ledger that was started anew knows them again.
The class knows no Ray; ``ledger_actor`` runs it as an actor beside the driver.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

Range = tuple[int, int]

ALIVE_SECONDS = 60.0
"""An actor that has neither begun a unit nor computed anything for so long is not counted as alive."""


HOPELESS_DEATHS = 100
"""Deaths of engines, without a unit done in between, that end the job: to find one row in a million takes about twenty."""

HOPELESS_STALLS = 25
"""The same for engines that hang, each of which costs ``stall_timeout``."""

STORAGE_STEPS = 4
"""Storage operations of an attempt, each retried for ``storage_retry_seconds``, between two signs: three writes and a look for a commit.
A sign comes after each read of an earlier run that vectors are copied from."""

CALIBRATION = "calibration"
"""In place of a unit's name, while an actor measures the run's calibration; it is not waited for when the job stops."""

LOADING_SECONDS = 1800.0
"""An actor that began to load so long ago, and has not arrived since, is not shown as loading."""

UNWATCHED_SECONDS = 30.0
"""Between two looks for hung actors: in a longer pause of the whole machine signs are missed, not missing."""

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
    give_up:    why the whole job is to end; empty, if it is not
    attempt:    its number, from 1; no direction
    """

    ranges: list[Range] | None = None
    poison: tuple[int, ...] = ()
    wait: float = 0.0
    last_words: str = ""
    give_up: str = ""
    attempt: int = field(default=1, compare=False)


@dataclass(frozen=True)
class Process:
    """What an actor is in.

    node: hexadecimal id of its node; pid: there; started: when, as the kernel of that node tells: no other process has the same and this pid
    """

    actor: str
    node: str
    pid: int
    started: int | None = None


@dataclass(frozen=True, kw_only=True)
class Stalled:
    """An actor that gives no sign. unit: what it computes, or another that it began."""

    process: Process
    unit: str
    seconds: float
    """Since its last sign."""


@dataclass
class _Unit:
    attempts: int = 0
    last_words: str = ""
    ranges: list[Range] = field(default_factory=list)
    entered: Range | None = None
    poison: set[int] = field(default_factory=set)


@dataclass
class _Actor:
    process: Process
    sign: float
    units: set[str] = field(default_factory=set)
    """Begun and not ended."""
    computing: str | None = None


class Ledger:
    """max_attempts: attempts at a unit before its rows are told apart; retry_wait: seconds before the second of them, doubled for each further one.

    stall_timeout: seconds that may pass between two signs of an actor while it computes; storage_seconds: that it may retry a storage operation.
    """

    def __init__(self, max_attempts: int, retry_wait: float = 0.0, stall_timeout: float = math.inf, storage_seconds: float = 0.0) -> None:
        self._max_attempts, self._retry_wait = max_attempts, retry_wait
        self._stall_timeout, self._storage_seconds = stall_timeout, storage_seconds
        self._units: dict[str, _Unit] = {}
        self._actors: dict[str, _Actor] = {}
        self._looked = time.monotonic()
        self._deaths = self._stalls = self._load_failures = 0
        self._rows = 0
        self._tokens = 0
        self._seen: dict[str, float] = {}
        self._loading: dict[str, float] = {}
        self._calibrator: str | None = None
        self._calibration: str | None = None
        self._active: set[str] = set()
        self._stopping = False

    def hello(self, actor: str) -> None:
        """An actor is at work now."""
        self._seen[actor] = now = time.monotonic()
        if actor in self._actors:
            self._actors[actor].sign = now

    def loads(self, actor: str) -> None:
        """An actor begins to load its model, in a new process: what it was at in an earlier one is no more."""
        self._actors.pop(actor, None)
        self._loading[actor] = time.monotonic()
        self.hello(actor)

    def arrived(self, process: Process) -> None:
        """An actor has its model, and no unit."""
        self._loading.pop(process.actor, None)
        self._actors[process.actor] = _Actor(process, time.monotonic())
        self.hello(process.actor)

    def _has(self, process: Process, unit: str) -> _Actor:
        """What is known of an actor that has begun a unit."""
        known = self._actors.get(process.actor)
        if known is None or known.process != process:
            known = self._actors[process.actor] = _Actor(process, time.monotonic())
        known.units.add(unit)
        if unit != CALIBRATION:
            self._active.add(unit)
        return known

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

    def begin(self, unit: str, rows: int, process: Process | None = None) -> Directions:
        """Counts an attempt. Waiting is for causes that pass; rows that are told apart are tried at once.

        process: of an actor that is to be looked after: it will give signs
        """
        state = self._units.setdefault(unit, _Unit())
        state.attempts += 1
        if self._stalls >= HOPELESS_STALLS:
            return Directions(give_up=f"engines hang again and again, on no row in particular; the last one: {state.last_words or 'on another unit'}")
        wait = min(LONGEST_WAIT, self._retry_wait * 2 ** (state.attempts - 2)) if 1 < state.attempts <= self._max_attempts else 0.0
        if process is not None:
            self._has(process, unit).sign = time.monotonic() + wait
        if state.attempts <= self._max_attempts:
            return Directions(wait=wait, attempt=state.attempts)
        if not state.ranges:
            state.ranges = [(0, rows)]
        elif state.entered is not None:
            self._split(state, state.entered)
        state.entered = None
        return Directions(ranges=list(state.ranges), poison=tuple(sorted(state.poison)), last_words=state.last_words, attempt=state.attempts)

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

    def stalled(self) -> list[Stalled]:
        """Actors that hang, or were lost and have no successor yet. Who asks ends their processes and tells ``ended``; else they are told of anew in time."""
        now = time.monotonic()
        paused, self._looked = now - self._looked, now
        found = []
        for actor in self._actors.values():
            if paused > UNWATCHED_SECONDS:
                actor.sign += paused
            seconds = now - actor.sign
            allowed = self._stall_timeout + (0.0 if actor.computing else STORAGE_STEPS * self._storage_seconds)
            if not actor.units or seconds <= allowed:
                continue
            found.append(Stalled(process=actor.process, unit=actor.computing or min(actor.units), seconds=seconds))
            actor.sign = now
        return found

    def ended(self, stalled: Stalled, *, killed: bool) -> None:
        """The process of such an actor is no more. killed: it was there and was ended; else it was gone already, as with its node, and hung nowhere."""
        actor = stalled.process.actor
        if actor in self._actors and self._actors[actor].process == stalled.process:
            del self._actors[actor]
            self._seen.pop(actor, None)
        if killed:
            self._stalls += 1
            if stalled.unit in self._units:
                self._units[stalled.unit].last_words = f"no progress for {stalled.seconds:.0f} s"

    def load_failed(self) -> bool:
        """An actor could not load its model for want of memory. Returns whether to give up, or to let another try."""
        self._load_failures += 1
        return self._load_failures >= LOADS_TRIED

    def entering(self, unit: str, rows: Range | None) -> None:
        """Rows of a unit are computed from now on; None: no longer."""
        self._units.setdefault(unit, _Unit()).entered = rows

    def computing(self, process: Process, unit: str) -> None:
        """An actor's engine is at a unit from now on."""
        self._has(process, unit).computing = unit
        self.hello(process.actor)

    def computed(self, process: Process, unit: str) -> None:
        """It is at none any longer; what is left of this one is to write."""
        self._has(process, unit).computing = None
        self.hello(process.actor)

    def done(self, unit: str) -> None:
        """Forgets a unit that is committed, so that this never grows with the corpus."""
        self._units.pop(unit, None)
        self._ended(unit)
        self._deaths = self._stalls = 0

    def failed(self, unit: str) -> None:
        """A unit that ended without a commit, for a reason other than its engine's death."""
        self._ended(unit)

    def _ended(self, unit: str) -> None:
        self._active.discard(unit)
        for actor in self._actors.values():
            if unit in actor.units:
                actor.units.discard(unit)
                actor.sign = time.monotonic()

    def add(self, rows: int, tokens: int) -> None:
        """Rows and tokens computed since the last call; retried work counts again, so these are for display alone."""
        self._rows += rows
        self._tokens += tokens

    def counts(self) -> tuple[int, int, int]:
        """(rows, tokens, actors heard of lately)."""
        alive = sum(time.monotonic() - seen < ALIVE_SECONDS for seen in self._seen.values())
        return self._rows, self._tokens, alive

    def standing(self) -> tuple[int, int, int]:
        """(actors with a model, heard of lately; actors that load one; units begun and not done)."""
        now = time.monotonic()
        ready = sum(now - seen < ALIVE_SECONDS for actor, seen in self._seen.items() if actor not in self._loading)
        return ready, sum(now - since < LOADING_SECONDS for since in self._loading.values()), len(self._active)
