"""A sample of a run's vectors: rows from places spread evenly over the committed shards.

Invariant: which rows are taken follows from the commits and the number asked for alone; however large the run,
at most PLACES row groups are read, and what stays of them is the sampled rows and a count of prompt lengths.
"""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from llmemb_ray import parquet
from llmemb_ray.shards.commits import Commit
from llmemb_ray.shards.run import Run, group_edges, opened
from llmemb_ray.shards.schema import CHUNK_COLUMNS, raw_values

PLACES = 64
"""Row groups that a sample is taken from at most; each holds up to 16 MiB of vectors."""

READERS = 8
"""Row groups in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """N sampled rows of the shards, in the order of the run."""

    of: int
    """Vectors in the committed shards."""
    rows: pa.Table
    """[N]: source_file, source_row, n_tokens and, where the shards have them, id, prompt_hash and the chunk columns."""
    vectors_ND: npt.NDArray[np.float32]
    stored_NV: npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.int8] | npt.NDArray[np.uint8]
    """The same vectors as they are stored: floats, codes, or bits unpacked to a value each."""
    lengths_T: npt.NDArray[np.int64]
    """How many prompts have so many tokens, of all rows in the row groups that were read."""
    shards_read: int

    def __len__(self) -> int:
        return int(self.rows.num_rows)


@dataclass(frozen=True)
class _Part:
    rows: pa.Table
    vectors: npt.NDArray[np.float32]
    stored: npt.NDArray[np.generic]
    lengths: npt.NDArray[np.int64]


def draw(run: Run, size: int) -> Sample:
    """About ``size`` rows; all of them where the run has no more, in no more than PLACES shards. Raises OutputError for a shard that cannot be read."""
    shards = [commit for commit in run.commits if commit.shard is not None and commit.vectors > 0]
    total = sum(commit.vectors for commit in shards)
    places = _places(shards, total, size)

    def read(commit: Commit) -> list[_Part]:
        return _read(run, commit, places[commit.unit])

    with ThreadPoolExecutor(max_workers=READERS) as pool:
        parts = [part for found in pool.map(read, [commit for commit in shards if commit.unit in places]) for part in found]
    lengths = np.zeros(max((len(part.lengths) for part in parts), default=0), np.int64)
    for part in parts:
        lengths[: len(part.lengths)] += part.lengths
    width = run.plan.dimension
    return Sample(
        of=total,
        rows=pa.concat_tables([part.rows for part in parts]) if parts else _no_rows(),
        vectors_ND=np.concatenate([part.vectors for part in parts]) if parts else np.zeros((0, width), np.float32),
        stored_NV=np.concatenate([part.stored for part in parts]) if parts else np.zeros((0, width), np.float32),
        lengths_T=lengths,
        shards_read=len(places),
    )


def _no_rows() -> pa.Table:
    return pa.table({"source_file": pa.array([], pa.int32()), "source_row": pa.array([], pa.int64()), "n_tokens": pa.array([], pa.int32())})


def _places(shards: list[Commit], total: int, size: int) -> dict[str, list[tuple[int, int]]]:
    """By unit: (row of the shard, rows to take around it)."""
    if total <= size and len(shards) <= PLACES:
        return {commit.unit: [(0, commit.vectors)] for commit in shards}
    ends = np.cumsum([commit.vectors for commit in shards])
    count = min(PLACES, size)
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number in range(count):
        position = (2 * number + 1) * total // (2 * count)
        place = int(np.searchsorted(ends, position, side="right"))
        share = size * (number + 1) // count - size * number // count
        found[shards[place].unit].append((position - int(ends[place]) + shards[place].vectors, share))
    return found


def _read(run: Run, commit: Commit, places: list[tuple[int, int]]) -> list[_Part]:
    assert commit.shard is not None
    with opened(run.storage, commit.shard) as file:
        edges = group_edges(file)
        shares: dict[int, int] = defaultdict(int)
        if places == [(0, commit.vectors)]:
            shares |= dict(enumerate(np.diff(edges).tolist()))
        else:
            for row, share in places:
                shares[min(file.num_row_groups - 1, int(np.searchsorted(edges, row, side="right")) - 1)] += share
        return [_group(run, file, group, share) for group, share in sorted(shares.items())]


def _group(run: Run, file: pq.ParquetFile, group: int, share: int) -> _Part:
    own = ["id"] if run.plan.selection.id else []
    wanted = [*own, "source_file", "source_row", "embedding", "n_tokens", "prompt_hash", *CHUNK_COLUMNS]
    table = parquet.plain(file.read_row_group(group, columns=[name for name in wanted if name in file.schema_arrow.names]))
    lengths = np.bincount(table["n_tokens"].to_numpy()).astype(np.int64)
    chosen = table.take(pa.array(np.unique(np.linspace(0, table.num_rows - 1, min(share, table.num_rows)).astype(np.int64))))
    stored = raw_values(chosen["embedding"])
    if run.plan.dtype == "ubinary":
        stored = np.unpackbits(stored, axis=1, count=run.plan.dimension)
    return _Part(chosen.drop_columns(["embedding"]), run.precision.decode(chosen["embedding"]), stored, lengths)
