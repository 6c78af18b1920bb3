"""The lease: a small object with a heartbeat that keeps a second driver out and feeds ``status``.

It is a courtesy, not a lock: correctness rests on commits alone, so a lease that is lost or overwritten
costs double work, never a wrong result.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from llmemb_ray.errors import LeaseHeld, NotFound, OutputError, StorageError
from llmemb_ray.storage import Storage

PATH = "_llmemb/lease.json"

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 30.0
"""A driver that has not been heard of for so long is taken for dead: six heartbeats missed."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    owner: str
    host: str
    pid: int
    heartbeat: float
    """Unix time, by the driver's clock."""
    progress: dict[str, Any] = field(default_factory=dict)

    def age(self) -> float:
        return max(0.0, time.time() - self.heartbeat)

    def stale(self) -> bool:
        """Whether its driver is dead for all we know: silent for long, or a process of this machine that is gone."""
        if self.age() > STALE_SECONDS:
            return True
        return self.host == socket.gethostname() and not _alive(self.pid)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read(storage: Storage) -> Lease | None:
    try:
        return Lease(**json.loads(storage.read(PATH)))
    except NotFound:
        return None
    except (ValueError, TypeError) as error:
        raise OutputError(f"{storage.display(PATH)} is no lease of this version: {error}; delete it if no driver is at work") from error


class LeaseHolder:
    """Holds the lease while the ``with`` block runs; a thread renews it.

    progress: gives the numbers that ``status`` shows. wait_seconds: how long to wait for a lease that goes stale.
    Raises LeaseHeld if another driver is at work.
    """

    def __init__(
        self,
        storage: Storage,
        progress: Callable[[], dict[str, Any]],
        *,
        wait_seconds: float = STALE_SECONDS + HEARTBEAT_SECONDS,
        waiting: Callable[[str], None],
    ) -> None:
        self._storage, self._progress, self._wait_seconds, self._waiting = storage, progress, wait_seconds, waiting
        self._lease = Lease(owner=uuid.uuid4().hex, host=socket.gethostname(), pid=os.getpid(), heartbeat=0.0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="llmemb-lease", daemon=True)
        self.lost: str | None = None
        """Why the lease is no longer ours, if so; the driver stops when it sees it."""

    def __enter__(self) -> LeaseHolder:
        self._await_free()
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.lost is None:
            with contextlib.suppress(StorageError):  # It goes stale by itself; the job's own error matters more.
                self._storage.delete([PATH])

    def _await_free(self) -> None:
        """A dead driver's heartbeat stands still: waits until it is stale, by either clock, and gives up when it moves."""
        began = time.monotonic()
        first: float | None = None
        while (held := read(self._storage)) is not None and not held.stale():
            first = held.heartbeat if first is None else first
            waited = time.monotonic() - began
            if held.heartbeat == first and waited > STALE_SECONDS:
                return
            if held.heartbeat != first or waited > self._wait_seconds:
                raise LeaseHeld(
                    f"another driver (process {held.pid} on {held.host}, heartbeat {held.age():.0f} s ago) is at work on {self._storage.url}; "
                    "wait for it, or stop it and run this command again"
                )
            self._waiting(f"a driver (process {held.pid} on {held.host}) was at work here {held.age():.0f} s ago; waiting to see whether it still is")
            self._stop.wait(1.0)

    def _write(self) -> None:
        self._lease = replace(self._lease, heartbeat=time.time(), progress=self._progress())
        self._storage.put(PATH, json.dumps(asdict(self._lease)).encode())

    def _renew(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                held = read(self._storage)
                if held is not None and held.owner != self._lease.owner:
                    self.lost = f"process {held.pid} on {held.host} took the lease on {self._storage.url}"
                    return
                self._write()
            except (StorageError, OutputError):
                continue  # A heartbeat missed; the next one, or the job's own storage errors, will tell.
