"""Embedders that stay loaded while a program asks them one thing after another: actors on the cluster, or one in this process.

Invariant: work is a function called beside a loaded embedder; an item whose actor died is tried again on another one,
and an item is answered once. For corpora there is the embedding job; this is for what wants answers at once and many
representations of one model: the search for demonstrations, mteb. Nothing is kept on disk.
"""

from __future__ import annotations

import logging
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from llmemb_ray.config import ClusterSettings, parse_actors
from llmemb_ray.embedders import models
from llmemb_ray.embedders.embedder import Embedder, EmbedderSpec, settle
from llmemb_ray.errors import EngineDied, InputError, LlmembError, RunFailed
from llmemb_ray.representation import Representation, Role

if TYPE_CHECKING:
    from llmemb_ray.pipeline.graph import Shape

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

PIECE_TEXTS, PIECE_CHARACTERS = 1024, 400_000
"""Texts and characters of one call at most: seconds of an actor, so that actors end together."""

UNDER_WAY_PER_ACTOR = 2
"""Calls submitted to an actor at once: the next one waits there while the driver is told of the last."""

START_SECONDS = 60.0
"""After so long without any actor it is said what the cluster has free."""

RESTART_SECONDS = 0.5
"""Before an actor that is being restarted is asked again."""

LOOK_SECONDS = 1.0
"""How long results are waited for before actors that came up meanwhile are given work."""


class Pool(ABC):
    """Loaded embedders of one spec."""

    def __init__(self, spec: EmbedderSpec) -> None:
        self.spec = spec

    @abstractmethod
    def run(self, function: Callable[[Embedder, Item], Result], items: Iterable[Item]) -> Iterator[tuple[int, Result]]:
        """(number of the item, what ``function(embedder, item)`` returned), as they come; ``items`` is read as there is room.

        function, items and results travel between processes. Raises the LlmembError that the function raised, and RunFailed for
        an item whose actors died each time.
        """

    def encode(self, texts: Sequence[str], *, role: Role = "document", representation: Representation | None = None) -> npt.NDArray[np.float32]:
        """float32 [N, D], a row a text, in order; equal texts are embedded once.

        representation: in place of the pool's own; see ``Embedder.under``. Raises InputError naming the first text that cannot be embedded.
        """
        distinct = list(dict.fromkeys(texts))
        distinct.sort(key=len, reverse=True)
        places = {text: place for place, text in enumerate(distinct)}
        vectors = np.zeros((len(distinct), self.spec.dimension), np.float32)
        pieces = list(_pieces(distinct))
        starts = np.cumsum([0, *map(len, pieces)])
        for number, (made, failed) in self.run(_Encode(role, representation), pieces):
            if failed:
                row, reason = min(failed.items())
                text = pieces[number][row]
                raise InputError(f"text {list(texts).index(text)} ({text[:60]!r}): {reason}")
            vectors[starts[number] : starts[number + 1]] = made
        return vectors[[places[text] for text in texts]]


@contextmanager
def pool(settings: ClusterSettings, spec: EmbedderSpec | None = None) -> Iterator[Pool]:
    """Embedders as the settings say: with ``actors=0`` one in this process, else actors on the Ray of the settings.

    spec: of the embedders, if it is settled already. Raises ConfigError or ModelError.
    """
    spec = spec or settle(settings)
    if parse_actors(settings.actors) == (0, 0):
        yield _Alone(spec.on(models.default_device() == "cuda"))
        return
    from llmemb_ray.pipeline import graph

    with graph.cluster(settings) as shape:
        actors = _Actors(spec.on(shape.on_gpu), shape, attempts=settings.max_attempts)
        try:
            yield actors
        finally:
            actors.close()


class _Encode:
    def __init__(self, role: Role, representation: Representation | None) -> None:
        self._role, self._representation = role, representation

    def __call__(self, embedder: Embedder, texts: list[str]) -> tuple[npt.NDArray[np.float32], dict[int, str]]:
        embedded = (embedder.under(self._representation) if self._representation else embedder).encode_rows(texts, self._role)
        return embedded.vectors, embedded.failed


def _pieces(texts: Sequence[str]) -> Iterator[list[str]]:
    piece: list[str] = []
    characters = 0
    for text in texts:
        if piece and (len(piece) >= PIECE_TEXTS or characters + len(text) > PIECE_CHARACTERS):
            yield piece
            piece, characters = [], 0
        piece.append(text)
        characters += len(text)
    if piece:
        yield piece


class _Alone(Pool):
    def __init__(self, spec: EmbedderSpec) -> None:
        super().__init__(spec)
        self._embedder = Embedder(spec)

    def run(self, function: Callable[[Embedder, Item], Result], items: Iterable[Item]) -> Iterator[tuple[int, Result]]:
        for number, item in enumerate(items):
            yield number, function(self._embedder, item)


class _Actors(Pool):
    """Actors that are up get work; one that is still to come, as on a cluster that grows, gets some when it is there."""

    def __init__(self, spec: EmbedderSpec, shape: Shape, *, attempts: int) -> None:
        import ray

        super().__init__(spec)
        self._attempts = attempts
        resources = {"num_gpus": shape.gpus} if shape.on_gpu else {}
        kind = ray.remote(num_cpus=shape.cpus, max_restarts=-1, max_task_retries=0, **resources)(_Worker)
        settled = ray.put(spec)
        self._actors = [kind.remote(settled, shape.threads) for _ in range(shape.most)]
        self._coming = {actor.ready.remote(): actor for actor in self._actors}
        self._up: list[Any] = []

    def close(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def run(self, function: Callable[[Embedder, Item], Result], items: Iterable[Item]) -> Iterator[tuple[int, Result]]:
        import ray

        call = ray.put(function)
        source = enumerate(items)
        again: deque[tuple[int, Item]] = deque()
        deaths: dict[int, int] = {}
        under_way: dict[Any, tuple[int, Item, Any]] = {}
        exhausted = False
        while not exhausted or again or under_way:
            self._look_for_actors(wait=not self._up)
            loads = dict.fromkeys(self._up, 0)
            for _, _, actor in under_way.values():
                loads[actor] = loads.get(actor, 0) + 1
            for load in range(UNDER_WAY_PER_ACTOR):  # First one for each, then a second.
                for actor in [actor for actor, busy in loads.items() if busy == load]:
                    if again:
                        entry = again.popleft()
                    elif (following := next(source, None)) is not None:
                        entry = following
                    else:
                        exhausted = True
                        break
                    under_way[actor.run.remote(call, entry[1])] = (*entry, actor)
                    loads[actor] += 1
            if not under_way:
                continue
            done, _ = ray.wait(list(under_way), num_returns=1, timeout=LOOK_SECONDS)
            for reference in done:
                number, _, actor = under_way[reference]
                try:
                    answer = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, LlmembError):
                        raise error.cause from None
                    raise
                except ray.exceptions.RayActorError as error:
                    lost = [other for other, (_, _, where) in under_way.items() if where == actor]
                    again.extend(under_way.pop(other)[:2] for other in lost)
                    at_work = again[-len(lost)][0]  # Calls are answered in their order: the first was being worked on.
                    deaths[at_work] = deaths.get(at_work, 0) + 1
                    if deaths[at_work] >= self._attempts:
                        raise RunFailed(f"an actor died {deaths[at_work]} times at one piece of work: {str(error).strip().splitlines()[0]}") from error
                    logger.warning("an actor died; its work is done again")
                    self._up.remove(actor)
                    self._coming[actor.ready.remote()] = actor
                    break
                under_way.pop(reference)
                yield number, answer

    def _look_for_actors(self, *, wait: bool) -> None:
        import ray

        if not self._coming:
            return
        ready, _ = ray.wait(list(self._coming), num_returns=1, timeout=START_SECONDS if wait else 0)
        if wait and not ready:
            logger.warning("no actor could start yet; what is free in the cluster: %s", ray.available_resources())
        for reference in ready:
            actor = self._coming.pop(reference)
            try:
                problem = ray.get(reference)
            except ray.exceptions.RayActorError:
                time.sleep(RESTART_SECONDS)
                self._coming[actor.ready.remote()] = actor
                continue
            if problem is not None:
                raise problem
            self._up.append(actor)


class _Worker:
    """The actor."""

    def __init__(self, spec: EmbedderSpec, threads: int | None) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if threads:
            os.environ["OMP_NUM_THREADS"] = str(threads)  # As the actors of the job do.
            import torch

            torch.set_num_threads(threads)
        self._failure: LlmembError | None = None
        try:
            self._embedder = Embedder(spec)
        except LlmembError as error:
            self._failure = error  # Told when asked: Ray would take an error here for a lost actor, and try again for ever.

    def ready(self) -> LlmembError | None:
        return self._failure

    def run(self, function: Callable[[Embedder, Any], Any], item: Any) -> Any:
        if self._failure is not None:
            raise self._failure
        try:
            return function(self._embedder, item)
        except EngineDied as error:
            logger.error("%s; this process ends and another takes its place", error)
            logging.shutdown()
            os._exit(1)
