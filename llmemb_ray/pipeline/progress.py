"""Telling the person what is happening: a live bar on a terminal, a line every few seconds elsewhere.

Knows no Ray: the job feeds it numbers.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from llmemb_ray.errors import printable

LINE_SECONDS = 10.0
"""Between two lines in a log; the bar of a terminal is drawn every second."""

RATE_SECONDS = 60.0
"""Rates are over so much of the past, so that they follow changes and do not jump with every unit."""


ETA_AFTER_SECONDS = 5.0
"""Of work seen before a time of arrival is told: the first second's rate is no guide."""


@dataclass
class Counts:
    """Where a job stands. ``rows`` and ``tokens`` count up within a unit; the rest moves with commits."""

    units: int = 0
    units_total: int = 0
    rows: int = 0
    rows_total: int = 0
    tokens: int = 0
    rejects: int = 0
    not_finite: int = 0
    failed_units: int = 0
    actors: int = 0
    storage_retries: int = 0


class Reporter:
    """Shows ``Counts`` while its ``with`` block runs.

    quiet: show nothing.
    """

    def __init__(self, counts: Counts, *, quiet: bool = False, stream: Any = None) -> None:
        self.counts = counts
        self._live: Callable[[], tuple[int, int, int]] | None = None
        self._lock = threading.Lock()
        self._quiet = quiet
        self._console = Console(file=stream or sys.stderr, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="llmemb-progress", daemon=True)
        self._history: list[tuple[float, int, int]] = []
        self._next_line = 0.0
        self._last_line = ""
        self._shown = (0, 0, 0)

    def __enter__(self) -> Reporter:
        if not self._quiet and self._console.is_terminal:
            columns = (TextColumn("{task.fields[units]}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, console=self._console, refresh_per_second=4)
            self._bar.add_task("embed", total=None, units="", text="starting")
            self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._bar:
            self._draw()
            self._bar.stop()
        else:
            self._line()  # A log ends with where the job stands, however short it was.

    @contextmanager
    def watching(self, live: Callable[[], tuple[int, int, int]]) -> Iterator[None]:
        """Within this block asks ``live`` for (rows, tokens, actors alive) as workers report them between commits; never after it."""
        self._live = live
        try:
            yield
        finally:
            with self._lock:
                self._live = None

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if not self._quiet:
            (self._bar.console if self._bar else self._console).print(printable(text), markup=False)

    def snapshot(self) -> dict[str, Any]:
        """The numbers, with rates per second, for the lease."""
        rows_rate, tokens_rate = self._rates()
        rows, tokens, actors = (max(shown, counted) for shown, counted in zip(self._shown, (self.counts.rows, self.counts.tokens, 0), strict=True))
        rates = {"rows_per_s": round(rows_rate, 1), "tokens_per_s": round(tokens_rate, 1)}
        return asdict(self.counts) | {"rows": rows, "tokens": tokens, "actors": actors} | rates

    def _tick(self) -> None:
        while not self._stop.wait(1.0):
            self._look()
            if self._bar:
                self._draw()
            elif time.monotonic() >= self._next_line:
                self._line()

    def _look(self) -> None:
        with self._lock:
            rows, tokens, actors = self._live() if self._live else self._shown
        # Workers count what they have computed, commits what is safe: the larger is where the job stands.
        self._shown = (max(self.counts.rows, min(rows, self.counts.rows_total)), max(self.counts.tokens, tokens), actors or self.counts.actors)
        if not self.counts.units_total:
            return
        now = time.monotonic()
        if self._history and self._history[0][1:] == self._shown[:2]:
            self._history.clear()  # Nothing is done yet: the time in which the model loads is no part of a rate.
        self._history.append((now, self._shown[0], self._shown[1]))
        while len(self._history) > 2 and self._history[0][0] < now - RATE_SECONDS:
            self._history.pop(0)

    def _line(self) -> None:
        """A line in a log, if it says something new."""
        line = f"{self._units()}  {self._text()}"
        if self.counts.units_total and line != self._last_line:
            self._last_line, self._next_line = line, time.monotonic() + LINE_SECONDS
            self.say(line)

    def _rates(self) -> tuple[float, float]:
        if len(self._history) < 2:
            return 0.0, 0.0
        (t0, rows0, tokens0), (t1, rows1, tokens1) = self._history[0], self._history[-1]
        seconds = max(t1 - t0, 1e-9)
        return max(0.0, (rows1 - rows0) / seconds), max(0.0, (tokens1 - tokens0) / seconds)

    def _units(self) -> str:
        return f"units {self.counts.units}/{self.counts.units_total}"

    def _text(self) -> str:
        counts = self.counts
        rows, _, actors = self._shown
        rows = max(rows, counts.rows)
        rows_rate, tokens_rate = self._rates()
        parts = [f"rows {rows:,}/{counts.rows_total:,}", f"{rows_rate:,.0f} rows/s", f"{tokens_rate:,.0f} tokens/s"]
        if rows_rate > 0 and counts.rows_total > rows and self._history[-1][0] - self._history[0][0] >= ETA_AFTER_SECONDS:
            parts.append(f"ETA {duration((counts.rows_total - rows) / rows_rate)}")
        parts.append(f"rejects {counts.rejects:,}")
        if counts.failed_units:
            parts.append(f"FAILED units {counts.failed_units}")
        if counts.storage_retries:
            parts.append(f"storage retries {counts.storage_retries}")
        parts.append(f"actors {actors}")
        return " · ".join(parts)

    def _draw(self) -> None:
        if self._bar and self.counts.units_total:
            rows = max(self._shown[0], self.counts.rows)
            self._bar.update(self._bar.task_ids[0], total=self.counts.rows_total, completed=rows, units=self._units(), text=self._text())


def duration(seconds: float) -> str:
    """``95`` -> ``1m35s``; hours and days likewise."""
    seconds = int(seconds)
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
