"""Limits of requests and tokens a minute: what would exceed one waits for its turn.

Invariant: in no minute begin more requests, or requests of more tokens, than allowed, whatever number of threads sends them.
Limits are counted in a sliding window, so that no endpoint's own way of counting sees more. Knows no endpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

WINDOW_PARTS = 10_000
"""A limit of tokens is counted in so many parts: the window then holds at most as many entries, and rounding up costs little."""

LOOK_SECONDS = 0.2
"""Between two looks whether there is still somebody who wants the answer."""


class Pace:
    """One for all threads that send requests to an endpoint.

    requests, tokens: allowed in a minute, None for any number; minute: its seconds
    """

    def __init__(self, requests: int | None = None, tokens: int | None = None, *, minute: float = 60.0) -> None:
        self._part = max(1, ceil((tokens or 0) / WINDOW_PARTS))
        limits = [(requests, 1), (tokens // self._part if tokens else None, self._part)]
        self._limits = [(_Window(limit, minute), part) for limit, part in limits if limit]
        self._by_requests = bool(requests)

    def wait(self, tokens: int, left: Callable[[], bool] = lambda: False) -> bool:
        """Waits until a request of so many tokens may begin; False if it may not, because ``left`` says that nobody waits for its answer.

        A request of more tokens than a minute allows gets a whole minute for itself.
        """
        for place, (window, part) in enumerate(self._limits):
            weight = 1 if place == 0 and self._by_requests else max(1, ceil(tokens / part))
            if not window.enter(weight, left):
                return False
        return not left()


class _Window:
    def __init__(self, limit: int, seconds: float) -> None:
        from pyrate_limiter import InMemoryBucket, Limiter, MonotonicClock, Rate, SingleBucketFactory

        self._limit = limit
        self._clock = MonotonicClock()
        self._bucket = InMemoryBucket([Rate(limit, round(1000 * seconds))])
        # Without the library's thread that clears windows: it would outlive this object. They are cleared here, on each entry.
        self._limiter = Limiter(SingleBucketFactory(self._bucket, schedule_leak=False))

    def enter(self, weight: int, left: Callable[[], bool]) -> bool:
        weight = min(weight, self._limit)
        while not left():
            self._bucket.leak(self._clock.now())
            if self._limiter.try_acquire("all", weight, timeout=LOOK_SECONDS):
                return True
        return False
