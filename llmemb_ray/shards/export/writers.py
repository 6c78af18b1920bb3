"""One writer for each form of export. A writer takes the rows, fills a directory and tells how to load it.

Invariant: a writer holds one block of rows at a time; but a faiss index is made in memory, as faiss does it.
Knows nothing of where the directory goes in the end but its name.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmemb_ray.errors import ConfigError, LlmembError
from llmemb_ray.shards.export.rows import Rows

TRAINING_ROWS_PER_LIST = 64
"""faiss wants at least 39 training vectors for each list of an IVF index."""

TRAINING_ROWS, TRAINING_BYTES = 65_536, 2**30
"""Sample that a faiss index is trained on: so many vectors, or more for many lists, but at most so many bytes."""

HF_FILE_BYTES = 512 * 2**20
"""Vectors in a file of a Hugging Face dataset, about; the size that the Hub recommends."""

IDS = "ids.parquet"


@dataclass(frozen=True)
class Target:
    """directory: to be filled; final: what it will be called; faiss_factory: index to make, None for exact."""

    directory: Path
    final: str
    faiss_factory: str | None = None


def library(name: str, form: str) -> Any:
    """The module ``name``. Raises ConfigError naming the extra that brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"to: {form} needs a library that is not installed ({error}); pip install 'llmemb-ray[export]'") from error


def npy(rows: Rows, target: Target) -> str:
    """vectors.npy [N, width] and ids.parquet, whose column ``row`` numbers the rows of both."""
    header = {"descr": np.lib.format.dtype_to_descr(rows.value_type), "fortran_order": False, "shape": (rows.count, rows.width)}
    with open(target.directory / "vectors.npy", "wb") as file, Ids(rows, target) as ids:
        np.lib.format.write_array_header_1_0(file, header)
        for table, vectors in rows.blocks():
            file.write(np.ascontiguousarray(vectors, rows.value_type).data)
            ids.add(table)
    return f"numpy.load('{target.final}/vectors.npy', mmap_mode='r')"


def faiss_index(rows: Rows, target: Target) -> str:
    """index.faiss, whose ids are the column ``row`` of ids.parquet. Inner products, which are cosines where vectors have norm 1."""
    bits = rows.stored and rows.dtype == "ubinary"
    if rows.stored and not bits:
        raise ConfigError(f"raw: faiss has no index of raw {rows.dtype} values; leave raw out, and name a factory such as SQ8 for a small index")
    if rows.dtype == "float16":
        raise ConfigError("dtype: faiss takes float32; for half the size give the factory SQfp16")
    if bits and target.faiss_factory is not None:
        raise ConfigError("faiss_factory: is for vectors; raw bits go into an exact index of Hamming distances")
    faiss = library("faiss", "faiss")
    dimension = rows.run.plan.dimension
    index = faiss.IndexBinaryIDMap2(faiss.IndexBinaryFlat(dimension)) if bits else _trained(faiss, rows, target.faiss_factory or "Flat")
    with Ids(rows, target) as ids:
        for table, vectors in rows.blocks():
            index.add_with_ids(np.ascontiguousarray(vectors), np.arange(ids.count, ids.count + len(vectors)))
            ids.add(table)
    path = str(target.directory / "index.faiss")
    if bits:
        faiss.write_index_binary(index, path)
        return f"faiss.read_index_binary('{target.final}/index.faiss')"
    faiss.write_index(index, path)
    return f"faiss.read_index('{target.final}/index.faiss')"


def _trained(faiss: Any, rows: Rows, factory: str) -> Any:
    """An empty index that takes ids, trained if its kind needs it."""
    dimension = rows.run.plan.dimension
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            wanted = max(TRAINING_ROWS, TRAINING_ROWS_PER_LIST * _lists(faiss, index))
            index.train(rows.sample(min(wanted, TRAINING_BYTES // (4 * dimension))))
    except RuntimeError as error:  # What faiss raises for whatever it cannot do.
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"faiss_factory: faiss cannot make {factory!r} of {rows.count} vectors of {dimension} dimensions: {reason}") from error
    return faiss.IndexIDMap2(index)


def _lists(faiss: Any, index: Any) -> int:
    inverted = faiss.try_extract_index_ivf(index)
    return int(inverted.nlist) if inverted is not None else 0


def lance(rows: Rows, target: Target) -> str:
    """A Lance dataset of all columns and ``embedding``, a fixed-size list."""
    module = library("lance", "lance")
    failed: list[LlmembError] = []

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            for table in _tables(rows):
                yield from table.to_batches()
        except LlmembError as error:  # Lance would raise it as one of its own.
            failed.append(error)
            raise

    try:
        module.write_dataset(pa.RecordBatchReader.from_batches(rows.schema, batches()), str(target.directory), mode="create")
    except (OSError, ValueError, RuntimeError):
        if failed:
            raise failed[0] from None
        raise
    return f"lance.dataset('{target.final}')"


def hf(rows: Rows, target: Target) -> str:
    """Parquet files laid out and named as on the Hugging Face Hub; the library itself is only needed to load them.

    Parquet and not the library's own ``save_to_disk``: that can write a stream only by way of a second copy in its cache.
    """
    (target.directory / "data").mkdir()
    schema, vectors = rows.schema, "embedding.list.element"
    plain = [name for name in rows.columns if not pa.types.is_nested(schema.field(name).type)]
    coded = [*plain, *([vectors] if pa.types.is_integer(schema.field("embedding").type.value_type) else [])]
    per_file = max(1, HF_FILE_BYTES // (rows.width * rows.value_type.itemsize))
    files = -(-rows.count // per_file)
    tables, left = _tables(rows), schema.empty_table()
    for number in range(files):
        path = target.directory / "data" / f"train-{number:05d}-of-{files:05d}.parquet"
        room = per_file
        with pq.ParquetWriter(path, schema, compression={vectors: "NONE"} | dict.fromkeys(rows.columns, "ZSTD"), use_dictionary=coded) as writer:
            while room and (table := left if left.num_rows else next(tables, None)) is not None:
                writer.write_table(table.slice(0, room))
                left, room = table.slice(room), room - min(room, table.num_rows)
    for _ in tables:  # More rows than the commits count: taken up, so that ``require_all`` tells.
        continue
    return f"datasets.load_dataset('{target.final}', split='train')"


class Ids:
    """ids.parquet beside vectors that have no columns of their own: row (from 0), id, source_file, source_row, kept columns."""

    def __init__(self, rows: Rows, target: Target) -> None:
        self._rows, self._path = rows, target.directory / IDS
        self._writer: pq.ParquetWriter | None = None
        self.count = 0
        """Rows so far."""

    def __enter__(self) -> Ids:
        return self

    def add(self, table: pa.Table) -> None:
        numbers = pa.array(np.arange(self.count, self.count + table.num_rows))
        numbered = table.add_column(0, "row", numbers)
        self._writer = self._writer or pq.ParquetWriter(self._path, numbered.schema, compression="ZSTD")
        self._writer.write_table(numbered)
        self.count += table.num_rows

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()


def _tables(rows: Rows) -> Iterator[pa.Table]:
    """All columns, vectors included, block by block."""
    schema = rows.schema
    for table, vectors in rows.blocks():
        values = pa.array(np.ascontiguousarray(vectors, rows.value_type).reshape(-1))
        yield table.append_column("embedding", pa.FixedSizeListArray.from_arrays(values, rows.width)).cast(schema)
