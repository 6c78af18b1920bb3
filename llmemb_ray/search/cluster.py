"""Exact search with the shards spread over a Ray cluster.

Invariant: the results are those of the search in one process. A task looks at some shards for all queries and
returns its best alone; the driver merges them as they come, and holds no more of them than are under way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from llmemb_ray.connection import result_of
from llmemb_ray.search import exact
from llmemb_ray.search.best import Best, Floats
from llmemb_ray.search.scan import Shards, check_queries, most_results, scan, shards_of
from llmemb_ray.shards.precision import Precision
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Storage

TASKS_PER_CPU = 4
"""Parts that the shards are cut into for each core: a slow part then delays the end by a quarter of the whole at most."""

UNDER_WAY_PER_CPU = 2
"""Tasks submitted at once for each core; each returns 16 bytes for each query and result."""


def search_vectors(run: Run, queries_QD: npt.NDArray[np.float32], *, top_k: int) -> list[list[exact.Hit]]:
    """``exact.search_vectors`` on the Ray that is ``connected``."""
    return exact.hits_of(search_table(run, queries_QD, top_k=top_k), len(queries_QD))


def search_table(run: Run, queries_QD: npt.NDArray[np.float32], *, top_k: int) -> pa.Table:
    """``exact.search_table`` on the Ray that is ``connected``. Raises RunFailed where a task is lost for good."""
    queries_QD = check_queries(run, queries_QD)
    top_k = most_results(run, top_k)
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    best = Best(len(queries_QD), top_k)
    queries, task = ray.put(queries_QD), ray.remote(num_cpus=1)(_scan)
    under_way: list[Any] = []
    for part in _parts(shards_of(run), TASKS_PER_CPU * cpus):
        if len(under_way) >= UNDER_WAY_PER_CPU * cpus:
            under_way = _merge_one(best, under_way)
        under_way.append(task.remote(run.storage, run.precision, part, queries, top_k))
    while under_way:
        under_way = _merge_one(best, under_way)
    return exact.results(run, best)


def embed_queries(run: Run, texts: list[str], **chosen: Any) -> Floats:
    """float32 [Q, D]: the texts in the query role; embedded on a GPU node where the cluster has one, else in this process.

    chosen: ``model``, ``trust_remote_code`` and ``allow_pickle`` of ``exact.load_embedder``.
    Raises what ``exact.load_embedder`` and ``exact.embed_queries`` raise.
    """
    if not ray.cluster_resources().get("GPU"):
        return exact.embed_queries(exact.load_embedder(run, run.storage.access, **chosen), texts)
    vectors: Floats = _get(ray.remote(num_gpus=1)(_embed).remote(run.storage, texts, chosen))
    return vectors


def _embed(storage: Storage, texts: list[str], chosen: dict[str, Any]) -> Floats:
    return exact.embed_queries(exact.load_embedder(Run(storage), storage.access, **chosen), texts)


def _scan(storage: Storage, precision: Precision, shards: Shards, queries_QD: Floats, top_k: int) -> Best:
    return scan(storage, precision, shards, queries_QD, top_k)


def _parts(shards: Sequence[tuple[int, str]], count: int) -> Iterator[Shards]:
    """The shards in ``count`` parts of nearly equal size, or one each."""
    edges = np.linspace(0, len(shards), min(count, len(shards)) + 1).astype(int)
    for first, last in itertools.pairwise(edges):
        yield shards[first:last]


def _merge_one(best: Best, under_way: list[Any]) -> list[Any]:
    done, rest = ray.wait(under_way, num_returns=1)
    best.merge(_get(done[0]))
    return rest  # type: ignore[no-any-return]


def _get(reference: Any) -> Any:
    return result_of(reference, "a task of the search")
