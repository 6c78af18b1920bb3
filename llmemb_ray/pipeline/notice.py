"""SIGTERM and Ctrl-C: notice that the job must go, as spot machines and ``ray job stop`` give it.

Invariant: while units are being worked on the first signal is only taken note of: no more are begun, those begun have a grace period
to be committed. A second signal, or one at any other time, ends the job at once. Neither loses what is committed.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_SECONDS = 100.0
"""Where no setting says otherwise: AWS tells two minutes before it takes a spot machine."""

IDLE_SECONDS = 5.0
"""After nothing has been worked on for so long the job ends, whatever it still waits for, such as a model that loads."""

LOOK_SECONDS = 0.5

SIGNALS = {signal.SIGTERM: "SIGTERM came", signal.SIGINT: "Ctrl-C was pressed (SIGINT)"}


class Ended(KeyboardInterrupt):
    """Raised in the main thread when the grace period is over, or nothing is left to wait for."""


class Notice:
    """What signals have told this process."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why no more units are begun, once a signal came."""
        self._finishing = self._over = False

    @contextmanager
    def listening(self) -> Iterator[Notice]:
        """Within this block signals are heard here; in another thread than the main one, where none arrive, nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._over:
            self._over = False  # Once: what unwinds is not interrupted by us again.
            raise Ended
        if self.reason is not None or not self._finishing:
            raise KeyboardInterrupt
        self.reason = SIGNALS[signal.Signals(number)]

    @contextmanager
    def finishing(self, stop: Callable[[], None], at_work: Callable[[], bool], *, grace: float) -> Iterator[None]:
        """Within this block the first signal makes that ``stop`` is called, again and again, and that the block ends with ``Ended``
        once ``at_work`` has been false for a while, or ``grace`` seconds are over."""
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(done, stop, at_work, grace), name="llmemb-notice", daemon=True)
        self._finishing = True
        watch.start()
        try:
            yield
        finally:
            self._finishing = False
            done.set()
            watch.join()

    def _watch(self, done: threading.Event, stop: Callable[[], None], at_work: Callable[[], bool], grace: float) -> None:
        while self.reason is None:
            if done.wait(LOOK_SECONDS):
                return
        told = worked = time.monotonic()
        while True:
            stop()  # Each time: who is told may have been started anew since.
            now = time.monotonic()
            worked = now if at_work() else worked
            if now - told >= grace or now - worked >= IDLE_SECONDS:
                break
            if done.wait(LOOK_SECONDS):
                return
        if not done.is_set():
            self._over = True
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGTERM)  # Also wakes it from what it waits for.
