"""One-by-one inference as the papers do it, and rows that a backend must give the same vectors for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from llmemb_ray.embedders.embedder import Backend
from llmemb_ray.representation import TokenRows

FP32_BOUND = 1e-5
"""Largest difference of a component of two vectors of norm 1 that are to be the same, in float32 on a CPU."""

RANDOM = np.random.default_rng(1)
PREFIX = RANDOM.integers(3, 300, 20).astype(np.int32)


def make_rows(prefix: np.ndarray[Any, np.dtype[np.int32]]) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    """Rows of up to 50 tokens and the prefix: without it, with it, with all of it but three tokens, exactly it; in no order."""
    rows = []
    for index in range(24):
        own = RANDOM.integers(3, 300, int(RANDOM.integers(1, 50))).astype(np.int32)
        rows.append([own, np.concatenate([prefix, own]), np.concatenate([prefix[:-3], own])][index % 3])
    return [*rows, prefix, prefix[:1], rows[4]]


ROWS = make_rows(PREFIX)
Reference = Callable[[list[Any], str, int], torch.Tensor]


def reference_of(model: Any) -> Reference:
    """Normalised vectors of one sequence at a time, without mask, padding or cache; every state kept for other poolings."""
    states: dict[bytes, tuple[torch.Tensor, ...]] = {}

    def one(row: Any) -> tuple[torch.Tensor, ...]:
        key = np.asarray(row, np.int32).tobytes()
        if key not in states:
            with torch.no_grad():
                states[key] = model(input_ids=torch.tensor(np.asarray(row, np.int64))[None], output_hidden_states=True).hidden_states
        return states[key]

    def vectors(rows: list[Any], pooling: str = "last", layer: int = -1) -> torch.Tensor:
        pooled = []
        for row in rows:
            hidden_LD = one(row)[layer][0].float()
            if pooling == "last":
                pooled.append(hidden_LD[-1])
            elif pooling == "mean":
                pooled.append(hidden_LD.mean(0))
            else:
                weights = torch.arange(1, len(hidden_LD) + 1).float()
                pooled.append((weights[:, None] * hidden_LD).sum(0) / weights.sum())
        return normalize(torch.stack(pooled), dim=1)

    return vectors


def embed(backend: Backend, rows: list[Any], prefix: Any = None) -> torch.Tensor:
    pooled = backend.embed(TokenRows.from_lists(rows), prefix)
    assert not pooled.failed
    return normalize(pooled.vectors, dim=1)


def assert_spread(vectors: torch.Tensor) -> None:
    """The rows' vectors differ by far more than the bound, or the comparison would say nothing."""
    distances = torch.cdist(vectors[:10], vectors[:10]) + torch.eye(10)
    assert distances.min() > 100 * FP32_BOUND
