"""The best rows for each of many queries, gathered a block of vectors at a time.

Invariant: what is kept are the largest float64 inner products, equal ones in the order of positions, however the
vectors are cut into blocks and in whatever order the blocks come. Products in float32 only choose which rows
are worth the exact one. Knows no run: a position is a number that sorts like the corpus.

Shapes: Q queries, B queries of a block, N vectors of a block, D dimensions, K results, P pairs of query and vector.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

QUERY_BLOCK = 1024
"""Queries multiplied at once: with BLOCK_ROWS vectors their scores take 32 MB."""

BLOCK_ROWS, BLOCK_BYTES = 8192, 32 * 2**20
"""Vectors of a block at most, and their size as float32 at most."""

PAIR_VALUES = 4 * 2**20
"""Values multiplied in float64 at once: 32 MB on each side."""

CROWDED = 4
"""From so many candidates for each result on, the block's own border is looked for first."""


def block_rows(dimension: int) -> int:
    """Vectors of a block."""
    return max(1, min(BLOCK_ROWS, BLOCK_BYTES // (4 * dimension)))


class Best:
    """``top_k`` results for each query so far, best first.

    scores_QK:    float64, -inf where there is no result yet
    positions_QK: int64, -1 where there is no result yet
    """

    def __init__(self, queries: int, top_k: int) -> None:
        self.scores_QK: Doubles = np.full((queries, top_k), -np.inf)
        self.positions_QK: Ints = np.full((queries, top_k), -1, np.int64)

    def look_at(self, queries_QD: Floats, vectors_ND: Floats, positions_N: Ints) -> None:
        """Takes what belongs among the best out of one block. Call it once for each block, with the same queries each time."""
        longest = float(np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64).max(initial=0.0)))
        for first in range(0, len(queries_QD), QUERY_BLOCK):
            queries_BD = queries_QD[first : first + QUERY_BLOCK]
            queries_P, rows_P = self._candidates(queries_BD, vectors_ND, first, longest)
            if len(queries_P):
                self._add(first + queries_P, _products(queries_BD, vectors_ND, queries_P, rows_P), positions_N[rows_P])

    def merge(self, other: Best) -> None:
        """Takes in the best of other vectors for the same queries."""
        queries, places = np.nonzero(other.positions_QK >= 0)
        self._add(queries, other.scores_QK[queries, places], other.positions_QK[queries, places])

    def _candidates(self, queries_BD: Floats, vectors_ND: Floats, first: int, longest: float) -> tuple[Ints, Ints]:
        """(query in its block, row) of every pair that may belong among the best, and of few others."""
        scores_BN = queries_BD @ vectors_ND.T
        count, dimension = vectors_ND.shape
        top_k = self.scores_QK.shape[1]
        # A sum of D products in float32 is off by at most D · 2^-24 · |query| · |vector|, and two sums are compared.
        slack_B = (dimension + 4) * np.finfo(np.float32).eps * longest * np.linalg.norm(queries_BD, axis=1)
        floor_B = (self.scores_QK[first : first + len(queries_BD), -1] - slack_B).astype(np.float32)
        above_BN = scores_BN >= floor_B[:, None]
        crowded = np.flatnonzero(np.count_nonzero(above_BN, axis=1) > CROWDED * top_k)
        if len(crowded) and count > top_k:
            border = np.partition(scores_BN[crowded], count - top_k, axis=1)[:, count - top_k]
            floor = np.maximum(floor_B[crowded], (border - slack_B[crowded]).astype(np.float32))
            above_BN[crowded] = scores_BN[crowded] >= floor[:, None]
        queries_P, rows_P = np.nonzero(above_BN)
        return queries_P, rows_P

    def _add(self, queries_P: Ints, scores_P: Doubles, positions_P: Ints) -> None:
        top_k = self.scores_QK.shape[1]
        touched = np.unique(queries_P)
        queries = np.concatenate([np.repeat(touched, top_k), queries_P])
        scores = np.concatenate([self.scores_QK[touched].ravel(), scores_P])
        positions = np.concatenate([self.positions_QK[touched].ravel(), positions_P])
        order = np.lexsort((positions, -scores, queries))
        queries, scores, positions = queries[order], scores[order], positions[order]
        starts = np.searchsorted(queries, touched)
        ranks = np.arange(len(queries)) - np.repeat(starts, np.diff([*starts, len(queries)]))
        kept = ranks < top_k
        self.scores_QK[queries[kept], ranks[kept]] = scores[kept]
        self.positions_QK[queries[kept], ranks[kept]] = positions[kept]


def _products(queries_BD: Floats, vectors_ND: Floats, queries_P: Ints, rows_P: Ints) -> Doubles:
    """Inner product of each pair, in float64, summed in the same order wherever the pair stands."""
    products = np.empty(len(queries_P))
    step = max(1, PAIR_VALUES // vectors_ND.shape[1])
    for start in range(0, len(queries_P), step):
        part = slice(start, start + step)
        pairs = queries_BD[queries_P[part]].astype(np.float64) * vectors_ND[rows_P[part]]
        products[part] = pairs.sum(axis=1)
    return products
