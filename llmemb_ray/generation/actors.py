"""Prompts to a model that actors on a Ray cluster load.

Invariant: an answer is that of the same engine in one process on the same prompts. Chunks of prompts go to whichever actor is free
(``pipeline.crew``); an actor whose engine died is replaced, and its chunk asked again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from llmemb_ray.config import ClusterSettings
from llmemb_ray.generation import local
from llmemb_ray.generation.generator import Answer, Generator, Prompt
from llmemb_ray.generation.opening import load
from llmemb_ray.generation.tokens import ModelSpec
from llmemb_ray.generation.vllm_engine import VllmSpec
from llmemb_ray.pipeline.crew import Crew
from llmemb_ray.pipeline.shape import Shape, cluster

VLLM_CHUNK = 256
"""Prompts in a call of an actor with vLLM: the engine fills its passes with many at once, and only a chunk's last ones leave it room."""


class ActorGenerator:
    """A model in each actor."""

    def __init__(self, spec: ModelSpec, shape: Shape, *, attempts: int) -> None:
        self._spec = spec
        self._chunk = VLLM_CHUNK if isinstance(spec, VllmSpec) else local.BATCH
        self._crew: Crew[Generator] = Crew(partial(load, spec), shape, attempts=attempts)
        self.close = self._crew.close

    @property
    def name(self) -> str:
        return self._spec.name

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Answer]]:
        """See Generator."""
        for chunk, answers in self._crew.run(_answers, _chunks(prompts, self._chunk)):
            for place, answer in answers:
                yield chunk * self._chunk + place, answer


def _answers(generator: Generator, prompts: list[Prompt]) -> list[tuple[int, Answer]]:
    return list(generator.generate(prompts))


def _chunks(prompts: Iterable[Prompt], size: int) -> Iterator[list[Prompt]]:
    rest = iter(prompts)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk


@contextmanager
def on_cluster(spec: ModelSpec, settings: ClusterSettings) -> Iterator[ActorGenerator]:
    """Actors as the settings say, on the Ray that they name, for as long as the block lasts. Raises ConfigError."""
    with cluster(settings) as shape:
        generator = ActorGenerator(spec, shape, attempts=settings.max_attempts)
        try:
            yield generator
        finally:
            generator.close()
