"""Embedders that stay loaded while a program asks them one thing after another: actors on the cluster, or one in this process.

Invariant: work is a function called beside a loaded embedder, and an item is answered once (``crew``). For corpora there is the
embedding job; this is for what wants answers at once and many representations of one model: the search for demonstrations,
mteb. Nothing is kept on disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from llmemb_ray.config import ClusterSettings, parse_actors
from llmemb_ray.embedders import models
from llmemb_ray.embedders.embedder import Embedder, EmbedderSpec, settle
from llmemb_ray.errors import InputError
from llmemb_ray.representation import Representation, Role

if TYPE_CHECKING:
    from llmemb_ray.pipeline.shape import Shape

Item = TypeVar("Item")
Result = TypeVar("Result")

PIECE_TEXTS, PIECE_CHARACTERS = 1024, 400_000
"""Texts and characters of one call at most: seconds of an actor, so that actors end together."""


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
    from llmemb_ray.pipeline.shape import cluster

    with cluster(settings) as shape:
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
    def __init__(self, spec: EmbedderSpec, shape: Shape, *, attempts: int) -> None:
        from llmemb_ray.pipeline.crew import Crew

        super().__init__(spec)
        self._crew: Crew[Embedder] = Crew(partial(Embedder, spec), shape, attempts=attempts)
        self.close = self._crew.close

    def run(self, function: Callable[[Embedder, Item], Result], items: Iterable[Item]) -> Iterator[tuple[int, Result]]:
        return self._crew.run(function, items)
