"""Actors that each hold something loaded, an embedder or a generator, and work that goes to whichever of them is free.

Invariant: an item is answered once. An actor that dies is started again, wherever there is room, and Ray gives it again what it had
been given, so many times; what is wrong with loading comes back as its own error. Nothing is kept on disk.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import ray

from llmemb_ray.errors import EngineDied, ItemsFailed, LlmembError
from llmemb_ray.pipeline.shape import Shape, use_threads

logger = logging.getLogger(__name__)

Held = TypeVar("Held")
Item = TypeVar("Item")
Result = TypeVar("Result")

UNDER_WAY_PER_ACTOR = 2
"""Calls submitted to an actor at once: the next one waits there while the driver is told of the last."""

START_SECONDS = 60.0
"""After so long without any actor it is said what the cluster has free."""


class Crew(Generic[Held]):
    """``shape.most`` actors, or fewer until the cluster has room. For one user at a time."""

    def __init__(self, load: Callable[[], Held], shape: Shape, *, attempts: int) -> None:
        """load: called in each actor; attempts: at a call whose actor dies."""
        resources = {"num_gpus": shape.gpus} if shape.on_gpu else {}
        kind = ray.remote(num_cpus=shape.cpus, max_restarts=-1, max_task_retries=attempts - 1, **resources)(_Worker)
        self._attempts = attempts
        self._load = ray.put(load)  # Held here, for actors that are started again.
        self._actors = [kind.remote([self._load], shape.threads) for _ in range(shape.most)]
        self._coming = {actor.load.remote(): actor for actor in self._actors}
        self._up: list[Any] = []

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def run(self, function: Callable[[Held, Item], Result], items: Iterable[Item]) -> Iterator[tuple[int, Result]]:
        """(number of the item, what ``function(held, item)`` returned), as they come; ``items`` is read as there is room.

        Raises the LlmembError that loading or the function raised, and ItemsFailed for what else ended them.
        """
        call = ray.put(function)
        numbered = enumerate(items)
        under_way: dict[Any, tuple[int, Any]] = {}
        following = next(numbered, None)
        while following is not None or under_way:
            busy = [actor for _, actor in under_way.values()]
            for load in range(UNDER_WAY_PER_ACTOR):  # One for each first, then a second.
                for actor in self._up:
                    if following is not None and busy.count(actor) == load:
                        under_way[actor.run.remote(call, following[1])] = following[0], actor
                        busy.append(actor)
                        following = next(numbered, None)
            done, _ = ray.wait([*under_way, *self._coming], num_returns=1, timeout=START_SECONDS)
            if not done and not self._up:
                logger.warning("no actor could start yet; what is free in the cluster: %s", ray.available_resources())
            for reference in done:
                if reference in self._coming:
                    self._get(reference)
                    self._up.append(self._coming.pop(reference))
                else:
                    number, actor = under_way[reference]
                    given = sorted(other for other, where in under_way.values() if where is actor)  # An answer may die with its actor.
                    answer = self._get(reference, number, given)
                    del under_way[reference]
                    yield number, answer

    def _get(self, reference: Any, number: int | None = None, given: Sequence[int] = ()) -> Any:
        """number: of the item that a function which raises was at, None for loading; given: what an actor that dies may have been at."""
        loading = "while it loaded"
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, LlmembError):
                raise error.cause from None
            at, items = (loading, []) if number is None else (f"at item {number}", [number])
            raise ItemsFailed(f"an actor failed {at}: {type(error.cause).__name__}: {error.cause}", items) from error
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            at = f"with items {', '.join(map(str, given))} given to it" if given else loading
            raise ItemsFailed(f"an actor died {self._attempts} times {at}: {reason}; what was answered stands, the same command continues", given) from error


class _Worker:
    """The actor's process. Loads at its first call, so that what is wrong with it comes back as the call's own error."""

    def __init__(self, load: list[Any], threads: int | None) -> None:
        """load: a reference to the function, in a list so that Ray does not count it among what it must have to start an actor again."""
        self._load, self._held = load[0], None
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        use_threads(threads)

    def load(self) -> None:
        if self._held is None:
            self._held = ray.get(self._load)()

    def run(self, function: Callable[[Any, Any], Any], item: Any) -> Any:
        self.load()
        try:
            return function(self._held, item)
        except EngineDied as error:
            logger.error("%s; this process ends and another takes its place", error)
            logging.shutdown()
            os._exit(1)
