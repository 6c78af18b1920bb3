"""Deadline and budget: when a job must begin no more units, so that those it is at are committed in time.

Knows no Ray: the job tells it how many actors are alive and how long a unit takes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from llmemb_ray.config import EmbedSettings, parse_deadline

TICK_SECONDS = 1.0


@dataclass
class Limits:
    """deadline: Unix time; max_cost: in the currency of ``price``, which is for an hour of one actor."""

    deadline: float | None
    max_cost: float | None
    price: float
    unit_seconds: float = 0.0
    """The longest of the latest units: what those begun now will still take."""
    cost: float = 0.0
    """Spent by this command until now."""
    reason: str | None = None
    """Why no more units are begun."""
    _actors: int = 0
    _at: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, settings: EmbedSettings, *, gpus: float) -> Limits:
        """gpus: of one actor; without any the price is for the actor."""
        deadline = parse_deadline(settings.deadline, now=time.time()) if settings.deadline else None
        return cls(deadline=deadline, max_cost=settings.max_cost, price=(settings.price or 0.0) * (gpus or 1.0))

    def took(self, seconds: float) -> None:
        """A unit took so long; of units that differ the longer count, old ones less and less."""
        self.unit_seconds = max(seconds, 0.9 * self.unit_seconds)

    def tick(self, actors: int) -> str | None:
        """Counts the cost of the actors alive since the last call. Returns the reason to stop, if there is one."""
        now = time.monotonic()
        self.cost += (now - self._at) * self._actors * self.price / 3600
        self._at, self._actors = now, actors or self._actors  # None that answer now may only be slow to: they still cost.
        if self.deadline is not None and time.time() + self.unit_seconds >= self.deadline:
            self.reason = self.reason or f"the deadline, {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.deadline))}, is near"
        if self.max_cost is not None and self.cost + self.unit_seconds * actors * self.price / 3600 >= self.max_cost:
            self.reason = self.reason or f"the budget, {self.max_cost:g}, is nearly spent ({self.cost:.2f})"
        return self.reason

    @contextmanager
    def watching(self, actors: Callable[[], int], stop: Callable[[], None]) -> Iterator[None]:
        """Within this block calls ``stop`` once there is a reason to."""
        if self.deadline is None and self.max_cost is None:
            yield
            return
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(TICK_SECONDS):
                if self.tick(actors()):
                    stop()  # Each time: who is told may have been started anew since.

        thread = threading.Thread(target=watch, name="llmemb-limits", daemon=True)
        if self.tick(actors()):
            stop()
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
