"""The rows of a run as they are exported: blocks of bounded size, vectors in the precision asked for.

Invariant: each committed row comes once, in the order of the corpus, numbered from 0. Knows no form of export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmemb_ray import parquet
from llmemb_ray.errors import OutputError
from llmemb_ray.shards.run import Run, read_groups
from llmemb_ray.shards.schema import CHUNK_COLUMNS, raw_values

BLOCK_BYTES = 16 * 2**20
"""Vectors of a block at most, as float32."""

SAMPLE_SHARDS = 64
"""Shards that a sample is taken from, evenly spaced."""


class Rows:
    """The rows of ``run``; ``dtype`` of their vectors: float32 or float16, or None for values as they are stored."""

    def __init__(self, run: Run, *, dtype: str | None) -> None:
        self.run = run
        self.stored = dtype is None
        self.dtype: str = dtype or run.plan.dtype
        self.count = sum(commit.vectors for commit in run.commits)
        """Of the whole run, by its commits."""
        self.on_rows: Callable[[int], None] = lambda _: None
        """Told of the rows of each block that was taken up."""
        self._taken = 0

    @property
    def id_columns(self) -> list[str]:
        """id (where the run has one), where the row comes from, and the columns of chunks (where it has them)."""
        return [*(["id"] if self.run.plan.selection.id else []), "source_file", "source_row", *(CHUNK_COLUMNS if self.run.plan.chunked else ())]

    @property
    def columns(self) -> list[str]:
        """``id_columns`` and the kept columns."""
        return [*self.id_columns, "n_tokens", "truncated", *self.run.plan.selection.keep]

    @property
    def width(self) -> int:
        """Values of a vector: dimensions, or bytes of stored bits."""
        return self.run.plan.dimension // 8 if self.stored and self.dtype == "ubinary" else self.run.plan.dimension

    @property
    def value_type(self) -> np.dtype[Any]:
        """Of one value of a vector."""
        return np.dtype("uint8" if self.dtype == "ubinary" else self.dtype)

    @property
    def schema(self) -> pa.Schema:
        """Of ``columns`` and ``embedding`` together."""
        shard = next(commit.shard for commit in self.run.commits if commit.shard is not None)
        with self.run.storage.open(shard) as reader:
            stored = parquet.plain_schema(parquet.opened(reader).schema_arrow)
        fields = [stored.field(name).remove_metadata() for name in self.columns]
        return pa.schema([*fields, pa.field("embedding", pa.list_(pa.from_numpy_dtype(self.value_type), self.width))])

    def blocks(self) -> Iterator[tuple[pa.Table, npt.NDArray[Any]]]:
        """(table of ``columns`` [N], vectors [N, width]) from the first row to the last."""
        self._taken = 0
        step = max(1, BLOCK_BYTES // (4 * self.run.plan.dimension))
        for _, table in self.run.shards([*self.columns, "embedding"]):
            light = table.select(self.columns).replace_schema_metadata(None)
            for start in range(0, table.num_rows, step):
                block = light.slice(start, step)
                self._taken += block.num_rows
                yield block, self._vectors(table["embedding"].slice(start, step))
                self.on_rows(block.num_rows)

    def require_all(self) -> None:
        """Raises OutputError unless ``blocks`` gave as many rows as the commits count."""
        if self._taken != self.count:
            raise OutputError(f"{self.run.url}: its shards hold {self._taken} rows, its commits count {self.count}; run verify")

    def sample(self, count: int) -> npt.NDArray[np.float32]:
        """float32 [≤ count, D]: vectors evenly spaced over the run, the same each time."""
        commits = [commit for commit in self.run.commits if commit.vectors]
        chosen = [commits[int(place)] for place in np.linspace(0, len(commits) - 1, min(SAMPLE_SHARDS, len(commits)))]
        share = min(1.0, count / max(1, sum(commit.vectors for commit in chosen)))
        parts = [np.zeros((0, self.run.plan.dimension), np.float32)]
        for commit in chosen:
            assert commit.shard is not None
            for table in read_groups(self.run.storage, commit.shard, ["embedding"]):
                wanted = np.unique(np.linspace(0, table.num_rows - 1, max(1, int(share * table.num_rows))).astype(np.int64))
                parts.append(self.run.precision.decode(table["embedding"].take(pa.array(wanted))))
        return np.concatenate(parts)[:count]

    def _vectors(self, column: pa.ChunkedArray) -> npt.NDArray[Any]:
        if self.stored:
            return raw_values(column)
        return self.run.precision.decode(column).astype(self.dtype, copy=False)
