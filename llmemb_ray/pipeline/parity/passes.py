"""One engine with one model, and the passes of the same rows through it: alone, in batches, in another order.

Invariant: a row's vector is put back in the row's place, whatever went with it. Knows nothing of processes, of Ray, of bounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from llmemb_ray import engines
from llmemb_ray.embedders import models
from llmemb_ray.embedders.embedder import Embedder, EmbedderSpec
from llmemb_ray.representation import Role, TokenRows

Order = Literal["one by one", "batched", "shuffled", "repeated"]
ORDERS: tuple[Order, ...] = ("one by one", "batched", "shuffled", "repeated")
"""One row a call; all rows in one call; rows in another order, in calls of uneven sizes; that once more in yet another order,
with all that the engine keeps of the rows it had. Before each of the others the engine forgets."""

SHUFFLED_CALLS = 4
"""Calls that shuffled rows are cut into, where there are so many."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """An engine to load, and the passes to make with it.

    plain: transformers without packing and without a shared prefix: the inference of the papers
    """

    spec: EmbedderSpec
    """With backend and compute dtype settled."""
    plain: bool = False
    orders: tuple[Order, ...] = ORDERS

    @property
    def weights(self) -> str | None:
        """Format in which the weights are quantised."""
        return self.spec.quantization if self.spec.quantization != "none" else self.spec.stored

    @property
    def title(self) -> str:
        """``transformers bfloat16 nf4, plain``."""
        assert self.spec.backend != "auto"
        weights = f" {self.weights}" if self.weights else ""
        return f"{engines.TITLES[self.spec.backend]} {self.spec.compute_dtype}{weights}{', plain' if self.plain else ''}"


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one pass gave.

    vectors: float32 [N, D], zero where the row failed
    failed:  row number -> why it has no vector
    tokens:  of all prompts; shared: of those, taken from a shared prefix
    """

    vectors: npt.NDArray[np.float32]
    failed: dict[int, str]
    tokens: int
    shared: int


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What one load gave.

    device:  ``cpu``, ``mps``, or the name of the GPU
    seconds: to load the model, and for all passes
    """

    by_order: dict[Order, Pass]
    device: str
    seconds_load: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """All that a process needs to make the passes of one load; plain data."""

    load: Load
    rows: TokenRows
    role: Role
    seed: int
    """Of the shuffled order."""


Runner = Callable[[Work], Passes]
"""Makes the passes somewhere: in this process, in one of its own, on a cluster. Raises the LlmembError that was raised there."""


def make(work: Work) -> Passes:
    """Loads the engine here and makes its passes. Raises ConfigError, ModelError or EngineDied."""
    started = time.monotonic()
    embedder = Embedder(work.load.spec, plain=work.load.plain)
    loaded = time.monotonic()
    by_order = {order: _pass(embedder, work, order) for order in work.load.orders}
    return Passes(by_order=by_order, device=_device(), seconds_load=loaded - started, seconds=time.monotonic() - loaded)


def calls(order: Order, rows: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """The row numbers of each call of a pass; every row in exactly one."""
    everything = np.arange(rows)
    if order == "one by one":
        return list(everything[:, None])
    if order == "batched":
        return [everything]
    generator = np.random.default_rng([seed, ORDERS.index(order)])
    borders = generator.choice(np.arange(1, rows), min(SHUFFLED_CALLS, rows) - 1, replace=False) if rows > 1 else np.zeros(0, np.int64)
    return np.split(generator.permutation(rows), np.sort(borders))


def _pass(embedder: Embedder, work: Work, order: Order) -> Pass:
    vectors = np.zeros((len(work.rows), embedder.dimension), np.float32)
    failed: dict[int, str] = {}
    if order != "repeated":
        embedder.forget()
    tokens = shared = 0
    for numbers in calls(order, len(work.rows), work.seed):
        embedded = embedder.embed_tokens(work.rows.take(numbers.tolist()), work.role)
        vectors[numbers] = embedded.vectors
        failed |= {int(numbers[row]): why for row, why in embedded.failed.items()}
        tokens, shared = tokens + embedded.work.tokens, shared + embedded.work.shared
    return Pass(vectors=vectors, failed=failed, tokens=tokens, shared=shared)


def _device() -> str:
    """The device that a model without a device named goes to."""
    import torch

    device = models.default_device()
    return torch.cuda.get_device_name() if device == "cuda" else device
