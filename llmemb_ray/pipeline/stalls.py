"""Actors that hang: the driver ends their processes, so that Ray starts others and their units come again.

Invariant: a process is ended only if it is still the one that the actor was in, and the ledger hears whether it was there: what is gone with
its node, or waits to be started again, did not hang. Knows nothing of what a sign of life is; the ledger does. Ray's own way to kill an actor
asks its process, which may not answer.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmemb_ray.pipeline.ledger import Process, Stalled
from llmemb_ray.pipeline.ledger_actor import LedgerActor

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""Between two looks for actors that hang, and what a node may take to say whether it ended one until it is asked for others."""


@contextmanager
def ended(ledger: LedgerActor) -> Iterator[None]:
    """Within this block actors that hang, as ``ledger`` tells, are ended."""
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(ledger, over), name="llmemb-stalls", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()


def _watch(ledger: LedgerActor, over: threading.Event) -> None:
    asked: dict[Any, Stalled] = {}
    while not over.wait(LOOK_SECONDS):
        try:
            asked |= _asked(ledger)
            for answer in ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_SECONDS)[0] if asked else []:
                _told(ledger, asked.pop(answer), killed=ray.get(answer))
        except ray.exceptions.RayError:
            continue  # The ledger tells of it again; by then the node is gone, or answers.


def _asked(ledger: LedgerActor) -> dict[Any, Stalled]:
    """Asks the nodes of actors that hang to end them: what each was asked. Of those whose node is gone the ledger is told."""
    asked: dict[Any, Stalled] = {}
    stalled = ledger.stalled()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} if stalled else set()
    for actor in stalled:
        if actor.process.node in alive:
            here = NodeAffinitySchedulingStrategy(actor.process.node, soft=False)
            asked[ray.remote(num_cpus=0, max_retries=0)(kill).options(scheduling_strategy=here).remote(actor.process)] = actor
        else:
            _told(ledger, actor, killed=False)
    return asked


def _told(ledger: LedgerActor, actor: Stalled, *, killed: bool) -> None:
    if killed:
        logger.warning("unit %s: no progress for %.0f s; process %d of its actor ends, the unit is tried again", actor.unit, actor.seconds, actor.process.pid)
    ledger.ended(actor, killed=killed)


def this_process(actor: str) -> Process:
    """The one that this is called in, as that of an actor."""
    return Process(actor, ray.get_runtime_context().get_node_id(), os.getpid(), started(os.getpid()))


def kill(process: Process) -> bool:
    """Ends a process of this node at once. Returns whether it was still there, and not another of its pid in its place."""
    if process.started is None or started(process.pid) != process.started:
        return False
    try:
        os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def started(pid: int) -> int | None:
    """When a process of this machine was started, in ticks of its kernel's clock (proc_pid_stat(5)); None where there is none, or no /proc."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in ("Z", "X") else int(fields[18])
