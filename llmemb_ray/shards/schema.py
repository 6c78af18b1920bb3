"""The tables that stand in OUT: shards of vectors, rejects, and their encoding as Parquet.

Invariant: a shard is encoded in memory, whole, and carries run key and space in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

METADATA_KEY = b"llmemb"

ROW_GROUP_BYTES = 16 * 2**20
"""Vectors in a row group of a shard: what search and verify hold at a time."""

REJECTS = pa.schema(
    [
        ("source_file", pa.int32()),
        ("source_row", pa.int64()),
        ("id", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
"""``id`` is written as text here, whatever its type, so that rejects of all runs read alike."""

_VALUE_TYPES: dict[str, pa.DataType] = {"float32": pa.float32(), "float16": pa.float16()}


def embedding_type(dimension: int, dtype: str) -> pa.DataType:
    return pa.list_(_VALUE_TYPES[dtype], dimension)


def embedding_column(vectors_ND: npt.NDArray[np.float32], dtype: str) -> pa.FixedSizeListArray:
    """``float32[D]`` or ``float16[D]`` without a detour through Python lists."""
    values = np.ascontiguousarray(vectors_ND, dtype=np.dtype(dtype))
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), type=_VALUE_TYPES[dtype]), values.shape[1])


def vectors_of(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """float32 [N, D] of an ``embedding`` column."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    values: npt.NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(array), array.type.list_size).astype(np.float32, copy=False)


def encode_shard(table: pa.Table, metadata: Mapping[str, Any], *, vector_bytes: int) -> bytes:
    """Parquet bytes of a shard. vector_bytes: of one row.

    Vectors stay uncompressed (random floats hardly shrink); float32 is byte-stream-split, float16 plain,
    because DuckDB cannot read split float16. Other columns are dictionary-coded and compressed.
    """
    embedding = "embedding.list.element"
    others = [name for name in table.column_names if name != "embedding"]
    split = table.schema.field("embedding").type.value_type == pa.float32()
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=max(1, ROW_GROUP_BYTES // vector_bytes),
        use_dictionary=[name for name in others if not pa.types.is_nested(table.schema.field(name).type)],
        compression={embedding: "NONE", **dict.fromkeys(others, "ZSTD")},
        column_encoding={embedding: "BYTE_STREAM_SPLIT"} if split else None,
        write_statistics=others,
        store_schema=True,
    )
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def encode_rejects(table: pa.Table, metadata: Mapping[str, Any]) -> bytes:
    table = table.cast(REJECTS).replace_schema_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="ZSTD")
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def metadata_of(schema: pa.Schema) -> dict[str, Any]:
    """What a shard's metadata says of its run; {} where it says nothing."""
    raw = (schema.metadata or {}).get(METADATA_KEY)
    return json.loads(raw) if raw else {}
