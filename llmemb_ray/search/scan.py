"""Streaming the shards of a run past some queries, and looking up the rows that were found.

Invariant: a position is the number of the commit and the row of its shard, so that positions sort like the corpus
and tell where a row stands. Memory holds two row groups of vectors at a time; ids and the other light columns are
read only of rows that were found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmemb_ray.errors import ConfigError
from llmemb_ray.search.best import Best, Floats, Ints, block_rows
from llmemb_ray.shards.precision import Precision
from llmemb_ray.shards.run import Run, read_groups, read_rows
from llmemb_ray.shards.schema import CHUNK_COLUMNS
from llmemb_ray.storage import LIST_THREADS, Storage

ROW_BITS = 32
"""Of a position, for the row in its shard."""

Shards = Sequence[tuple[int, str]]
"""(number of the commit, path of its shard)"""


def shards_of(run: Run) -> list[tuple[int, str]]:
    """The shards to be searched, in the order of the corpus."""
    return [(number, commit.shard) for number, commit in enumerate(run.commits) if commit.shard is not None]


def most_results(run: Run, top_k: int) -> int:
    """``top_k``, or what the run can have at most. Raises ConfigError."""
    if top_k < 1:
        raise ConfigError(f"top_k: {top_k} is less than 1")
    return min(top_k, max(1, sum(max(commit.vectors, commit.rows) for commit in run.commits)))


def check_queries(run: Run, queries_QD: npt.NDArray[Any]) -> Floats:
    """The queries as float32. Raises ConfigError unless they are finite and of the run's dimension."""
    queries = np.ascontiguousarray(queries_QD, np.float32)
    if queries.ndim != 2 or queries.shape[1] != run.plan.dimension:
        raise ConfigError(
            f"queries: their shape is {queries.shape}, the vectors of {run.url} have {run.plan.dimension} dimensions: give [Q, {run.plan.dimension}]"
        )
    if not np.isfinite(queries).all():
        raise ConfigError(f"queries: number {int(np.argmin(np.isfinite(queries).all(axis=1)))} has values that are not finite")
    return queries


def scan(storage: Storage, precision: Precision, shards: Shards, queries_QD: Floats, top_k: int) -> Best:
    """The best rows of some shards for each query. Raises OutputError for a shard that is gone or broken."""
    best = Best(len(queries_QD), top_k)
    step = block_rows(precision.dimension)
    for position, column in _ahead(_columns(storage, shards)):
        for start in range(0, len(column), step):
            vectors_ND = precision.decode(column.slice(start, step))
            best.look_at(queries_QD, vectors_ND, position + start + np.arange(len(vectors_ND)))
    return best


def _columns(storage: Storage, shards: Shards) -> Iterator[tuple[int, pa.ChunkedArray]]:
    """(position of the first row, vectors) of each row group."""
    for number, path in shards:
        row = 0
        for table in read_groups(storage, path, ["embedding"]):
            yield (number << ROW_BITS) + row, table["embedding"]
            row += table.num_rows


def _ahead(items: Iterator[tuple[int, pa.ChunkedArray]]) -> Iterator[tuple[int, pa.ChunkedArray]]:
    """The same items, the next one being read while the last is at work."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def rows_at(run: Run, positions_P: Ints) -> pa.Table:
    """id (where the run has one), source_file, source_row and the columns of chunks (where it has them) of the rows at ``positions_P``."""
    columns = [*(["id"] if run.plan.selection.id else []), "source_file", "source_row", *(CHUNK_COLUMNS if run.plan.chunked else ())]
    wanted = np.unique(positions_P)
    if not len(wanted):
        return pa.table({name: pa.array([], pa.null() if name == "id" else pa.int64()) for name in columns})
    numbers, starts = np.unique(wanted >> ROW_BITS, return_index=True)
    rows = np.split(wanted & ((1 << ROW_BITS) - 1), starts[1:])

    def one(part: tuple[int, Ints]) -> pa.Table:
        path = run.commits[part[0]].shard
        assert path is not None
        return read_rows(run.storage, path, part[1], columns)

    with ThreadPoolExecutor(max_workers=LIST_THREADS) as pool:
        table = pa.concat_tables(pool.map(one, zip(numbers.tolist(), rows, strict=True)))
    return table.take(pa.array(np.searchsorted(wanted, positions_P)))
