"""What checkpoints are chosen by: a figure of the model as it is, from the evaluation of the project or from rows held out.

Invariant: a judge reads data and scores vectors; who makes the vectors, and on how many workers, is not its matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from llmemb_ray.representation import Role
from llmemb_ray.training.batches import Batch

Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Texts to embed, as one role under one instruction."""

    texts: Sequence[str]
    role: Role
    instruction: str | None = None
    symmetric: bool = False


Encode: TypeAlias = Callable[[Asked], Floats]
"""To unit vectors, float32 [N, D]."""


class Judge(Protocol):
    name: str

    def score(self, encode: Encode) -> float:
        """× 100; higher is better."""


class StsDev:
    """Spearman on STS-B dev, as ``llmemb evaluate --suite sts:STS-B-dev`` has it."""

    name = "STS-B dev"

    def __init__(self, data: str | None) -> None:
        """Raises ConfigError or InputError where the data are missing."""
        from llmemb_ray.evaluation import sts
        from llmemb_ray.evaluation.data import DataPlace

        self._task = sts.read(DataPlace.of(data), sts.DEV)

    def score(self, encode: Encode) -> float:
        from llmemb_ray.evaluation.suite import Texts

        vectors = [
            encode(Asked(texts=need.texts, role="document", instruction=need.instruction, symmetric=True))
            for need in self._task.needs()
            if isinstance(need, Texts)
        ]
        return self._task.score(vectors).main


class HeldOut:
    """How often an anchor's positive is the nearest of all positives and negatives held out with it."""

    name = "held-out accuracy"

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = [batch for batch in batches if batch.positives]

    def score(self, encode: Encode) -> float:
        right = total = 0
        for batch in self._batches:
            others = [*batch.positives, *(text for row in batch.negatives for text in row)]
            rows = [*range(len(batch.positives)), *(number for number, row in enumerate(batch.negatives) for _ in row)]
            anchors = _under(encode, batch.anchors, "query", batch.instructions, batch.symmetric)
            candidates = _under(encode, others, "document", [batch.instructions[row] for row in rows], batch.symmetric)
            texts = np.array(others, dtype=object)
            for number, scores in enumerate(anchors @ candidates.T):
                # A candidate with the positive's own text is no rival of it.
                rival = scores[texts != batch.positives[number]]
                right += bool(not len(rival) or scores[number] > rival.max())
                total += 1
        return 100 * right / total if total else 0.0


def _under(encode: Encode, texts: Sequence[str], role: Role, instructions: Sequence[str | None], symmetric: bool) -> Floats:
    """float32 [N, D]: each text under its instruction."""
    if role == "document" and not symmetric:
        return encode(Asked(texts=texts, role=role))
    places: dict[str | None, list[int]] = {}
    for place, instruction in enumerate(instructions):
        places.setdefault(instruction, []).append(place)
    parts = [
        encode(Asked(texts=[texts[place] for place in own], role=role, instruction=instruction, symmetric=symmetric)) for instruction, own in places.items()
    ]
    order = np.concatenate([np.array(own) for own in places.values()])
    vectors = np.empty((len(texts), parts[0].shape[1]), np.float32)
    vectors[order] = np.concatenate(parts)
    return vectors
