"""Batches as they lie prepared: which rows a step takes, readable by any worker, any step, in any order.

Invariant: a step's rows depend on the data, the settings and the seed alone, not on who reads them or how many do; a worker's part is a
contiguous piece of the step's row group. Memory holds one step.
"""

from __future__ import annotations

import bisect
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from llmemb_ray import parquet
from llmemb_ray.errors import NotFound, OutputError
from llmemb_ray.storage import Storage

DIRECTORY = "data"
RECORD = f"{DIRECTORY}/data.json"
HELDOUT = f"{DIRECTORY}/heldout.parquet"
SHARD = DIRECTORY + "/batches/shard-{:06d}.parquet"

SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("instruction", pa.string()),
        ("symmetric", pa.bool_()),
        ("anchor", pa.string()),
        ("positive", pa.string()),
        ("negatives", pa.list_(pa.string())),
        ("teacher", pa.list_(pa.float32())),
        ("scores", pa.list_(pa.float32())),
        ("source", pa.string()),
    ]
)
"""Of a shard, one row group a step. task and symmetric are the same in a row group; what a row group has none of is null in all its rows."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of one step that one worker takes. N rows, K hard negatives each, the same for all.

    anchors: N texts; positives: N texts, or none where a batch has only a teacher's vectors; negatives: N lists of K texts
    sources: where each row came from, 'file row number' for messages
    instructions: of each row's anchor for prompt e5, None for the representation's own; symmetric: also of its other texts
    teacher: float32 [N, T], a teacher's vectors of the anchors; scores: float32 [N, 1 + K], its scores of positive and negatives
    """

    task: str
    instructions: list[str | None]
    symmetric: bool
    anchors: list[str]
    positives: list[str]
    negatives: list[list[str]]
    sources: list[str]
    teacher: npt.NDArray[np.float32] | None = None
    scores: npt.NDArray[np.float32] | None = None


class Batches:
    """The prepared steps of a training. Open it in each worker; it keeps the last file open and is for one thread."""

    def __init__(self, storage: Storage, record: dict[str, Any]) -> None:
        self.record = record
        """What stands in data.json: fingerprint, steps, rows and rejects by source, groups."""
        self._storage = storage
        self._shards: list[int] = record["shards"]
        self._path: str | None = None
        self._handle: io.BufferedReader | None = None
        self._file: pq.ParquetFile | None = None

    @classmethod
    def open(cls, storage: Storage) -> Batches:
        """storage: the training's OUT. Raises OutputError where its data were not prepared, or not to the end."""
        try:
            return cls(storage, json.loads(storage.read(RECORD)))
        except NotFound:
            raise OutputError(f"{storage.display(RECORD)} is not there: the data are not prepared; run the finetune command again") from None

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return int(self.record["steps"])

    @property
    def batch_size(self) -> int:
        """Rows of a step, of all workers together."""
        return int(self.record["batch_size"])

    @property
    def steps_per_epoch(self) -> float:
        """On average: epochs differ by a few where rows are drawn."""
        return self.steps / int(self.record["epochs"])

    def read(self, step: int, rank: int, workers: int) -> Batch:
        """Piece ``rank`` of ``workers`` of a step, both from 0; pieces are contiguous and, where the rows do not divide, differ by one row.

        Raises OutputError for a shard that is gone or broken.
        """
        if not 0 <= step < self.steps or not 0 <= rank < workers:
            raise ValueError(f"step {step} of {self.steps} and rank {rank} of {workers}: count from 0")
        shard = bisect.bisect_right(self._shards, step) - 1
        table = self._row_group(SHARD.format(shard), step - self._shards[shard])
        first, last = table.num_rows * rank // workers, table.num_rows * (rank + 1) // workers
        return _batch(table.slice(first, last - first))

    def heldout(self) -> list[Batch]:
        """The rows held out, by task, in pieces of at most ``batch_size``; [] where none are. Raises OutputError."""
        return [_batch(self._row_group(HELDOUT, number)) for number in range(self.record["heldout_pieces"])]

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
        self._path = self._handle = self._file = None

    def _row_group(self, path: str, number: int) -> pa.Table:
        try:
            if self._file is None or self._path != path:
                self.close()
                self._handle = self._storage.open(path)
                self._file, self._path = parquet.opened(self._handle), path
            return parquet.plain(self._file.read_row_group(number))
        except (NotFound, pa.ArrowException, OSError) as error:
            shown = self._storage.display(path)
            raise OutputError(f"{shown} cannot be read: {error}; delete {self._storage.display(DIRECTORY)} and run the command again") from error


def _batch(table: pa.Table) -> Batch:
    values = table.to_pydict() if table.num_rows else {name: [] for name in SCHEMA.names}
    return Batch(
        task=values["task"][0] if table.num_rows else "",
        instructions=values["instruction"],
        symmetric=bool(table.num_rows and values["symmetric"][0]),
        anchors=values["anchor"],
        positives=[text for text in values["positive"] if text is not None],
        negatives=values["negatives"],
        sources=values["source"],
        teacher=_floats(values["teacher"]),
        scores=_floats(values["scores"]),
    )


def _floats(rows: list[list[float] | None]) -> npt.NDArray[np.float32] | None:
    return None if not rows or rows[0] is None else np.array(rows, np.float32)
