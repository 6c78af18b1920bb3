"""Codes: those of sentence-transformers inside the ranges, clipped outside, and read back close to what they were."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmemb_ray.errors import OutputError
from llmemb_ray.shards import schema
from llmemb_ray.shards.precision import DTYPES, Calibration, Precision
from llmemb_ray.storage import Storage

D = 64


def sample(rows: int = 3000, seed: int = 0) -> npt.NDArray[np.float32]:
    """Vectors of norm 1 whose dimensions have means and spreads of their own, as those of decoders have."""
    shape = np.random.default_rng(0)
    means, spreads = shape.normal(size=D) * 2, np.exp(shape.normal(size=D))
    vectors = np.random.default_rng([1, seed]).normal(means, spreads, size=(rows, D))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def precision(dtype: Any, vectors: npt.NDArray[np.float32] | None = None, **changes: Any) -> Precision:
    calibration = Calibration.measure(sample() if vectors is None else vectors, "space")
    return Precision(**({"dtype": dtype, "dimension": D, "normalized": True, "calibration": calibration} | changes))


def column(of: Precision, vectors: npt.NDArray[np.float32]) -> pa.FixedSizeListArray:
    return schema.embedding_column(of.encode(vectors)[0], of.dtype)


# -- the contract with sentence-transformers ---------------------------------------------------------


@pytest.fixture(scope="module")
def quantize_embeddings() -> Any:
    """sentence-transformers' own function, of the version that the tests pin."""
    module = pytest.importorskip("sentence_transformers.util.quantization", reason="sentence-transformers is not installed (extra: test)")
    assert importlib.metadata.version("sentence-transformers")
    return module.quantize_embeddings


def test_int8_codes_are_those_of_sentence_transformers_for_the_same_calibration(quantize_embeddings: Any) -> None:
    calibrating, vectors = sample(2000, seed=1), sample(500, seed=2)
    of = precision("int8", calibrating)
    inside = (vectors >= calibrating.min(axis=0)) & (vectors <= calibrating.max(axis=0))
    theirs = quantize_embeddings(vectors, precision="int8", calibration_embeddings=calibrating)
    ours, clipped = of.encode(vectors)
    assert ours.dtype == theirs.dtype
    half_a_step = (calibrating.max(axis=0) - calibrating.min(axis=0)) / 510
    outside = (vectors < calibrating.min(axis=0) - half_a_step) | (vectors > calibrating.max(axis=0) + half_a_step)
    assert clipped == np.count_nonzero(outside) > 0
    np.testing.assert_array_equal(ours, theirs)
    ends = np.where(vectors < calibrating.min(axis=0), -128, 127)
    np.testing.assert_array_equal(ours[~inside], ends[~inside])


def test_ranges_given_to_sentence_transformers_make_the_same_codes(quantize_embeddings: Any) -> None:
    vectors = sample(800, seed=3)
    of = precision("int8", vectors)
    assert of.calibration is not None
    ranges = np.stack([of.calibration.low, of.calibration.high])
    np.testing.assert_array_equal(of.encode(vectors)[0], quantize_embeddings(vectors, precision="int8", ranges=ranges))


def test_bits_are_those_of_sentence_transformers(quantize_embeddings: Any) -> None:
    vectors = sample(300, seed=4)
    theirs = quantize_embeddings(vectors, precision="ubinary")
    ours, _ = precision("ubinary").encode(vectors)
    assert (ours.dtype, ours.shape) == (theirs.dtype, (300, D // 8))
    np.testing.assert_array_equal(ours, theirs)
    signed = quantize_embeddings(vectors, precision="binary")
    np.testing.assert_array_equal(ours.astype(np.int16) - 128, signed)


# -- back to vectors ---------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float32, (20, 8), elements=st.floats(-1, 1, width=32)))
def test_int8_values_come_back_within_half_a_step(vectors: npt.NDArray[np.float32]) -> None:
    """A code stands for the middle of its step; the top one for its end. A dimension that never varies comes back exactly."""
    calibration = Calibration.measure(vectors, "space")
    of = Precision(dtype="int8", dimension=8, normalized=False, calibration=calibration)
    values, clipped = of.encode(vectors)
    assert clipped == 0
    back = of.decode(schema.embedding_column(values, "int8"))
    width = calibration.high - calibration.low
    assert (np.abs(back - vectors) <= width / 255 / 2 * 1.01 + 1e-6).all()
    still = width == 0
    np.testing.assert_array_equal(back[:, still], vectors[:, still])


@pytest.mark.parametrize(("dtype", "least"), [("float32", 1.0), ("float16", 0.9999998), ("int8", 0.9998)])
def test_vectors_come_back_close_and_of_norm_one(dtype: Any, least: float) -> None:
    vectors = sample(1000, seed=5)
    back = precision(dtype).decode(column(precision(dtype), vectors))
    assert back.dtype == np.float32
    cosines = (back * vectors).sum(axis=1, dtype=np.float64) / np.linalg.norm(back.astype(np.float64), axis=1)
    assert float(np.median(cosines)) >= least - 1e-6
    np.testing.assert_allclose(np.linalg.norm(back, axis=1), 1, atol=1e-3)


def test_centred_bits_rank_neighbours_better_than_bare_ones_where_dimensions_have_means() -> None:
    """Bare bits of a dimension far from zero are all alike; against the mean they say something."""
    documents, queries = sample(2000, seed=6), sample(40, seed=7)
    exact = np.argsort(-queries @ documents.T, axis=1)[:, :10]

    def recall(of: Precision) -> float:
        found = np.argsort(-queries @ of.decode(column(of, documents)).T, axis=1)[:, :10]
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact.tolist(), found.tolist(), strict=True)]))

    bare, centred, int8 = recall(precision("ubinary")), recall(precision("ubinary", centre=True)), recall(precision("int8"))
    assert bare < centred < int8
    assert int8 >= 0.9


def test_bits_are_read_as_plus_and_minus_and_centred_ones_as_the_means_of_their_side() -> None:
    vectors = sample(500, seed=8)
    bare = precision("ubinary", normalized=False).decode(column(precision("ubinary"), vectors))
    np.testing.assert_array_equal(np.sign(bare), np.where(vectors > 0, 1, -1))
    of = precision("ubinary", vectors, centre=True, normalized=False)
    centred = of.decode(column(of, vectors))
    for dimension in (0, D - 1):
        over = vectors[:, dimension] > vectors[:, dimension].mean(dtype=np.float64).astype(np.float32)
        np.testing.assert_allclose(np.unique(centred[over, dimension]), vectors[over, dimension].mean(), rtol=1e-5)
        np.testing.assert_allclose(np.unique(centred[~over, dimension]), vectors[~over, dimension].mean(), rtol=1e-5)


# -- in storage --------------------------------------------------------------------------------------


def test_a_calibration_comes_back_bit_by_bit_with_its_digest(tmp_path: Path) -> None:
    calibration = Calibration.measure(sample(100, seed=9), "space")
    assert Calibration.load(Storage(str(tmp_path))) is None
    calibration.save(Storage(str(tmp_path)))
    loaded = Calibration.load(Storage(str(tmp_path)))
    assert loaded is not None
    assert (loaded.digest, loaded.rows, loaded.space) == (calibration.digest, 100, "space")
    for name in ("low", "high", "mean", "below", "above"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(calibration, name))


@pytest.mark.parametrize("content", [b"{half", b"[]", b"{}", b'{"low": "x"}'])
def test_a_broken_calibration_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    Storage(str(tmp_path)).put("_llmemb/calibration.json", content)
    with pytest.raises(OutputError, match=r"calibration\.json"):
        Calibration.load(Storage(str(tmp_path)))


def test_codes_without_their_calibration_cannot_be_read() -> None:
    codes = column(precision("int8"), sample(5))
    with pytest.raises(OutputError, match=r"calibration\.json is not there"):
        precision("int8", calibration=None).decode(codes)


def test_a_shard_alone_says_how_its_codes_are_read() -> None:
    """The ranges in its metadata, as docs/representations.md says to read them."""
    import base64

    vectors = sample(50, seed=10)
    of = precision("int8", vectors)
    table = pa.table({"source_row": np.arange(50), "embedding": column(of, vectors)})
    data = schema.encode_shard(table, {"unit": "x"} | of.metadata, vector_bytes=D)
    metadata = schema.metadata_of(pq.read_schema(pa.BufferReader(data)))
    low, high = np.frombuffer(base64.b64decode(metadata["ranges_float32"]), "<f4").reshape(2, D)
    np.testing.assert_array_equal(low, vectors.min(axis=0))
    np.testing.assert_array_equal(high, vectors.max(axis=0))
    assert of.calibration is not None
    assert metadata["calibration"] == of.calibration.digest


@pytest.mark.parametrize(("dtype", "bytes_a_row"), [("float32", 4 * D), ("float16", 2 * D), ("int8", D), ("ubinary", D // 8)])
def test_a_value_takes_the_bytes_of_its_precision_on_disk(dtype: Any, bytes_a_row: int) -> None:
    """Parquet stores small integers in four bytes each unless they are dictionary-coded."""
    assert set(DTYPES) == {"float32", "float16", "int8", "ubinary"}
    vectors = sample(20_000, seed=11)
    of = precision(dtype)
    assert schema.vector_bytes(D, dtype) == bytes_a_row
    data = schema.encode_shard(pa.table({"embedding": column(of, vectors)}), {}, vector_bytes=bytes_a_row)
    assert bytes_a_row <= len(data) / len(vectors) <= bytes_a_row * 1.1 + 1
