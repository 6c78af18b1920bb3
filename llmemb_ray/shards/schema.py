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

from llmemb_ray import parquet

METADATA_KEY = b"llmemb"

ROW_GROUP_BYTES = 16 * 2**20
"""Vectors in a row group of a shard: what search and verify hold at a time."""

CHUNK_COLUMNS = ("chunk", "chunk_start", "chunk_end")
"""Number of a chunk in its text, and its first and last+1 character; only in shards that hold a row for each chunk."""

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

_VALUE_TYPES: dict[str, pa.DataType] = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "ubinary": pa.uint8()}


def embedding_type(dimension: int, dtype: str) -> pa.DataType:
    """Type of the ``embedding`` column: a fixed-size list of values, or of bytes that hold 8 bits each."""
    return pa.list_(_VALUE_TYPES[dtype], dimension // 8 if dtype == "ubinary" else dimension)


def vector_bytes(dimension: int, dtype: str) -> int:
    """Bytes of one vector as written."""
    type_ = embedding_type(dimension, dtype)
    return int(type_.list_size * type_.value_type.bit_width // 8)


def embedding_column(values: npt.NDArray[Any], dtype: str) -> pa.FixedSizeListArray:
    """The column of floats [N, D], int8 codes [N, D] or bytes of bits [N, D/8], without a detour through Python lists."""
    values = np.ascontiguousarray(values, dtype=np.uint8 if dtype == "ubinary" else np.dtype(dtype))
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), type=_VALUE_TYPES[dtype]), values.shape[1])


def raw_values(column: pa.ChunkedArray | pa.Array) -> npt.NDArray[Any]:
    """[N, list size] of an ``embedding`` column as it is stored: floats, codes or bytes of bits."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    values: npt.NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(array), array.type.list_size)


def encode_shard(table: pa.Table, metadata: Mapping[str, Any], *, vector_bytes: int) -> bytes:
    """Parquet bytes of a shard. vector_bytes: of one row.

    Vectors stay uncompressed (random floats hardly shrink); float32 is byte-stream-split, float16 plain,
    because DuckDB cannot read split float16; codes and bits are dictionary-coded, without which Parquet stores each
    in four bytes. Other columns are dictionary-coded and compressed.
    """
    embedding = "embedding.list.element"
    others = [name for name in table.column_names if name != "embedding"]
    values = table.schema.field("embedding").type.value_type
    split = values == pa.float32()
    coded = [name for name in others if name != "prompt_hash" and not pa.types.is_nested(table.schema.field(name).type)]
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=max(1, ROW_GROUP_BYTES // vector_bytes),
        use_dictionary=[*coded, *([embedding] if pa.types.is_integer(values) else [])],
        compression={embedding: "NONE", **dict.fromkeys(others, "ZSTD")},
        column_encoding={embedding: "BYTE_STREAM_SPLIT"} if split else None,
        write_statistics=others,
        store_schema=True,
    )
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def encode_rejects(table: pa.Table, metadata: Mapping[str, Any]) -> bytes:
    return parquet.to_bytes(table.cast(REJECTS).replace_schema_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()}))


def metadata_of(schema: pa.Schema) -> dict[str, Any]:
    """What a shard's metadata says of its run; {} where it says nothing."""
    raw = (schema.metadata or {}).get(METADATA_KEY)
    return json.loads(raw) if raw else {}
