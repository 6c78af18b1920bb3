"""Prompts to a model that actors on a Ray cluster load.

Invariant: an answer is that of ``local`` on the same prompts. Chunks of prompts go to whichever actor is free (``pipeline.crew``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from llmemb_ray.config import ClusterSettings
from llmemb_ray.generation.generator import Answer
from llmemb_ray.generation.local import BATCH, LocalGenerator, LocalSpec
from llmemb_ray.pipeline.crew import Crew
from llmemb_ray.pipeline.graph import Shape, cluster


class ActorGenerator:
    """A model in each actor."""

    def __init__(self, spec: LocalSpec, shape: Shape, *, attempts: int) -> None:
        self._spec = spec
        self._crew: Crew[LocalGenerator] = Crew(partial(LocalGenerator, spec), shape, attempts=attempts)
        self.close = self._crew.close

    @property
    def name(self) -> str:
        return self._spec.name

    def generate(self, prompts: Iterable[str]) -> Iterator[tuple[int, Answer]]:
        """See Generator."""
        for chunk, answers in self._crew.run(_answers, _chunks(prompts)):
            for place, answer in answers:
                yield chunk * BATCH + place, answer


def _answers(generator: LocalGenerator, prompts: list[str]) -> list[tuple[int, Answer]]:
    return list(generator.generate(prompts))


def _chunks(prompts: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(prompts)
    while chunk := list(itertools.islice(rest, BATCH)):
        yield chunk


@contextmanager
def on_cluster(spec: LocalSpec, settings: ClusterSettings) -> Iterator[ActorGenerator]:
    """Actors as the settings say, on the Ray that they name, for as long as the block lasts. Raises ConfigError."""
    with cluster(settings) as shape:
        generator = ActorGenerator(spec, shape, attempts=settings.max_attempts)
        try:
            yield generator
        finally:
            generator.close()
