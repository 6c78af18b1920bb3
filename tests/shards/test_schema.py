"""Shards as Parquet: exact values, the promised encodings, readable by others."""

from __future__ import annotations

import io

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmemb_ray.shards import schema
from tests.small_jobs import vectors_of

METADATA = {"run_key": "r" * 64, "space": "s" * 64, "unit": "000000-000000000000", "attempt": "a" * 12}


def shard(vectors: np.ndarray, dtype: str, **columns: object) -> bytes:
    rows = len(vectors)
    table = pa.table(
        {
            "id": [f"row-{row}" for row in range(rows)],
            "source_file": pa.array([0] * rows, pa.int32()),
            "source_row": pa.array(range(rows), pa.int64()),
            "embedding": schema.embedding_column(vectors, dtype),
        }
        | columns
    )
    return schema.encode_shard(table, METADATA, vector_bytes=vectors.shape[1] * np.dtype(dtype).itemsize)


@given(vectors=hnp.arrays(np.float32, st.tuples(st.integers(1, 20), st.integers(1, 9)), elements=st.floats(width=32)))
def test_float32_vectors_come_back_bit_for_bit(vectors: np.ndarray) -> None:
    table = pq.read_table(pa.BufferReader(shard(vectors, "float32")))
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), vectors.shape[1])
    assert vectors_of(table["embedding"]).tobytes() == vectors.tobytes()


def test_float16_vectors_are_the_nearest_float16() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    table = pq.read_table(pa.BufferReader(shard(vectors, "float16")))
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), 8)
    np.testing.assert_array_equal(vectors_of(table["embedding"]), vectors.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(("dtype", "encoding"), [("float32", "BYTE_STREAM_SPLIT"), ("float16", "PLAIN")])
def test_vectors_are_stored_in_the_promised_encoding_uncompressed(dtype: str, encoding: str) -> None:
    data = shard(np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32), dtype)
    group = pq.read_metadata(pa.BufferReader(data)).row_group(0)
    chunks = {group.column(place).path_in_schema: group.column(place) for place in range(group.num_columns)}
    embedding = chunks.pop("embedding.list.element")
    assert encoding in embedding.encodings
    assert not {"PLAIN_DICTIONARY", "RLE_DICTIONARY"} & set(embedding.encodings)
    assert embedding.compression == "UNCOMPRESSED"
    assert {chunk.compression for chunk in chunks.values()} == {"ZSTD"}
    assert len(data) < 500 * (8 * np.dtype(dtype).itemsize + 24)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_duckdb_reads_a_shard(dtype: str, tmp_path: object) -> None:
    vectors = np.asarray([[0.5, -1.0, 2.0], [0.25, 0.0, -4.0]], np.float32)
    path = f"{tmp_path}/x.parquet"
    with open(path, "wb") as file:
        file.write(shard(vectors, dtype))
    rows = duckdb.sql(f"SELECT id, embedding::FLOAT[3] FROM '{path}' ORDER BY id").fetchall()
    assert [(id_, list(vector)) for id_, vector in rows] == [("row-0", [0.5, -1.0, 2.0]), ("row-1", [0.25, 0.0, -4.0])]


def test_row_groups_are_bounded_so_that_a_reader_holds_little() -> None:
    dimension = 4096
    rows = schema.ROW_GROUP_BYTES // (dimension * 4) + 5
    metadata = pq.read_metadata(pa.BufferReader(shard(np.zeros((rows, dimension), np.float32), "float32")))
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [rows - 5, 5]


def test_a_shard_says_which_run_it_belongs_to() -> None:
    data = shard(np.ones((1, 2), np.float32), "float32")
    assert schema.metadata_of(pq.read_schema(pa.BufferReader(data))) == METADATA
    assert schema.metadata_of(pa.schema([])) == {}


def test_kept_columns_of_any_type_come_back() -> None:
    kept = {
        "list": pa.array([[1, 2], None], pa.list_(pa.int64())),
        "struct": pa.array([{"a": "x", "b": 1.5}, None]),
        "time": pa.array([0, 1], pa.timestamp("us", tz="UTC")),
        "decimal": pa.array([1, None], pa.decimal128(10, 2)),
        "bytes": pa.array([b"\xff", None]),
        "flag": pa.array([True, None]),
        "a.b": pa.array(["dotted", None]),
    }
    table = pq.read_table(pa.BufferReader(shard(np.ones((2, 3), np.float32), "float32", **kept)))
    for name, values in kept.items():
        assert table[name].combine_chunks().to_pylist() == values.to_pylist()
        assert table.schema.field(name).type == values.type


def test_vectors_of_a_slice_and_of_several_chunks() -> None:
    vectors = np.arange(24, dtype=np.float32).reshape(8, 3)
    column = pa.chunked_array([schema.embedding_column(vectors[:5], "float32"), schema.embedding_column(vectors[5:], "float32")])
    np.testing.assert_array_equal(vectors_of(column), vectors)
    np.testing.assert_array_equal(vectors_of(column.slice(3, 4)), vectors[3:7])
    assert vectors_of(column.slice(0, 0)).shape == (0, 3)


def test_rejects_have_one_schema_and_their_run() -> None:
    table = pa.table({"source_file": [0], "source_row": [7], "id": [None], "reason": ["null"], "detail": ["the text is null"]}, schema=schema.REJECTS)
    read = pq.read_table(io.BytesIO(schema.encode_rejects(table, METADATA)))
    assert read.schema.remove_metadata() == schema.REJECTS
    assert read.to_pylist() == table.to_pylist()
    assert schema.metadata_of(read.schema) == METADATA
