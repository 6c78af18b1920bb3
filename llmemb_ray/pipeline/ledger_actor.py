"""The ledger of a job as an actor on the driver's node, and what the driver asks of it.

Invariant: no question of the driver's waits for long. Where the ledger does not answer in time, the driver goes on with what is safe.
"""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmemb_ray.pipeline.ledger import Ledger, Stalled
from llmemb_ray.pipeline.metrics import Meter

ANSWER_SECONDS = 5.0
"""That the ledger may take to answer; where it does not, it is asked again."""

LIVE_SECONDS = 0.5
"""The same for counts that are for display alone."""


class LedgerActor:
    """handle: for the actors of the job."""

    def __init__(self, meter: Meter, *known: float) -> None:
        """meter: is told how many actors there are; known: the parameters of Ledger, in their order."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.handle: Any = ray.remote(Ledger).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote(*known)
        self.meter = meter

    def stop(self) -> None:
        """Lets no more units begin."""
        with contextlib.suppress(ray.exceptions.RayError):  # It is told again every second.
            ray.get(self.handle.stop.remote(), timeout=ANSWER_SECONDS)

    def at_work(self) -> bool:
        """Whether units are begun that are not done yet, for all that is known."""
        try:
            return bool(ray.get(self.handle.at_work.remote(), timeout=ANSWER_SECONDS))
        except ray.exceptions.RayError:
            return True

    def stalled(self) -> list[Stalled]:
        """Actors that give no sign; none while the ledger does not answer."""
        try:
            told: list[Stalled] = ray.get(self.handle.stalled.remote(), timeout=ANSWER_SECONDS)
        except ray.exceptions.RayError:
            return []
        return told

    def ended(self, stalled: Stalled, *, killed: bool) -> None:
        """Tells it what became of one of them. Does not wait."""
        self.handle.ended.remote(stalled, killed=killed)

    def live(self) -> tuple[int, int, int]:
        """(rows, tokens, actors) as the actors report them between commits; zeros while the ledger does not answer."""
        try:
            (rows, tokens, actors), (ready, loading, at_work) = ray.get([self.handle.counts.remote(), self.handle.standing.remote()], timeout=LIVE_SECONDS)
        except ray.exceptions.RayError:
            return 0, 0, 0
        self.meter.actors(ready=ready, loading=loading, at_work=at_work)
        return rows, tokens, actors
