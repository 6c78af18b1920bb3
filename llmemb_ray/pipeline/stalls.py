"""Actors that hang: the driver ends their processes, so that Ray starts others and their units come again.

Knows nothing of what a sign of life is; the ledger does. Ray's own way to kill an actor asks its process, which may not answer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmemb_ray.pipeline.ledger import Stalled

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""Between two looks for actors that hang, and what the ledger may take to answer."""


@contextmanager
def ended(ledger: Any) -> Iterator[None]:
    """Within this block actors that hang, as ``ledger`` (an actor handle) tells, are ended."""
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(ledger, over), name="llmemb-stalls", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()


def _watch(ledger: Any, over: threading.Event) -> None:
    end = ray.remote(num_cpus=0, max_retries=0)(kill)
    while not over.wait(LOOK_SECONDS):
        try:
            stalled: list[Stalled] = ray.get(ledger.stalled.remote(), timeout=LOOK_SECONDS)
        except ray.exceptions.RayError:
            continue  # It is asked again.
        for actor in stalled:
            logger.warning("unit %s: no progress for %.0f s; process %d of its actor ends, the unit is tried again", actor.unit, actor.seconds, actor.pid)
            end.options(scheduling_strategy=NodeAffinitySchedulingStrategy(actor.node, soft=False)).remote(actor.pid)


def kill(pid: int) -> None:
    """Ends a process of this machine at once, if it is there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
