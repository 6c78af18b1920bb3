"""Prompts to a model that actors on a Ray cluster load.

Invariant: an answer is that of ``local`` on the same prompts. Chunks of prompts go to whichever actor is free; a chunk whose
actor died goes to it again once it is up.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from llmemb_ray.config import ClusterSettings
from llmemb_ray.errors import LlmembError, RunFailed
from llmemb_ray.generation.generator import Answer
from llmemb_ray.generation.local import BATCH, LocalGenerator, LocalSpec
from llmemb_ray.pipeline.graph import Shape, cluster

RESTARTS = 3
"""Times that an actor, or a chunk of prompts on it, is tried again after a process died."""

UNDER_WAY_PER_ACTOR = 2
"""Chunks submitted to an actor at once, so that it never waits for the driver."""


class _Worker:
    """An actor's process. Loads at its first call, so that what is wrong with the model comes back as the call's own error."""

    def __init__(self, spec: LocalSpec, threads: int | None) -> None:
        self._spec, self._threads = spec, threads
        self._generator: LocalGenerator | None = None

    def load(self) -> None:
        if self._generator is None:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            if self._threads:
                import torch

                torch.set_num_threads(self._threads)
            self._generator = LocalGenerator(self._spec)

    def generate(self, prompts: list[str]) -> list[tuple[int, Answer]]:
        self.load()
        assert self._generator is not None
        return list(self._generator.generate(prompts))


class ActorGenerator:
    """``shape.most`` actors with a model each, or fewer until the cluster has room."""

    def __init__(self, spec: LocalSpec, shape: Shape) -> None:
        self._spec = spec
        kind = ray.remote(num_cpus=shape.cpus, num_gpus=shape.gpus, max_restarts=RESTARTS, max_task_retries=RESTARTS)(_Worker)
        self._actors = [kind.remote(spec, shape.threads) for _ in range(shape.most)]

    @property
    def name(self) -> str:
        return self._spec.name

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def generate(self, prompts: Iterable[str]) -> Iterator[tuple[int, Answer]]:
        """See Generator."""
        numbered = enumerate(prompts)
        under_way: dict[Any, tuple[Any, list[int]]] = {}
        coming = {actor.load.remote(): actor for actor in self._actors}
        left = True
        while left or under_way:
            waiting = [*under_way, *coming]
            for done in ray.wait(waiting)[0]:
                answers = self._get(done)
                if done in coming:
                    actor, free = coming.pop(done), UNDER_WAY_PER_ACTOR
                else:
                    (actor, numbers), free = under_way.pop(done), 1
                    for place, answer in answers:
                        yield numbers[place], answer
                for _ in range(free):
                    chunk = list(itertools.islice(numbered, BATCH))
                    if not chunk:
                        left = False
                        break
                    under_way[actor.generate.remote([prompt for _, prompt in chunk])] = actor, [number for number, _ in chunk]

    def _get(self, done: Any) -> Any:
        try:
            return ray.get(done)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, LlmembError):
                raise error.cause from None
            raise RunFailed(f"{self.name}: {error.cause}") from error
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise RunFailed(f"{self.name}: an actor died again and again: {reason}; what was answered stands, the same command continues") from error


@contextmanager
def on_cluster(spec: LocalSpec, settings: ClusterSettings) -> Iterator[ActorGenerator]:
    """Actors as the settings say, on the Ray that they name, for as long as the block lasts. Raises ConfigError."""
    with cluster(settings) as shape:
        generator = ActorGenerator(spec, shape)
        try:
            yield generator
        finally:
            generator.close()
