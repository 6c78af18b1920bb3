"""Long texts: one vector a chunk or one a document, counted as one row, rejected as one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from llmemb_ray.corpus.units import SHARD_BYTES
from llmemb_ray.embedders.embedder import Embedder
from llmemb_ray.errors import ConfigError, RunMismatch
from llmemb_ray.pipeline import planning
from tests.small_jobs import embed, opened, problems_of, rejects_of, rows_of, settled, vectors_by_text_id, write
from tests.small_models import make_damaged_model

SENTENCES = [
    "A man plays a guitar on the stage. ",
    "The quick brown fox jumps over the dog. ",
    "Nobody knows what the mill is for! ",
    "In spring the meadows are under water. ",
]
TEXTS = ["".join(SENTENCES[:2]), "".join(SENTENCES) * 3, None, "x", "".join(reversed(SENTENCES)) * 2, "   "]
CHUNKED: dict[str, Any] = {"chunk_tokens": 40, "rows_per_unit": 4, "max_reject_rate": 1.0}


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    return write(tmp_path / "in" / "a.parquet", TEXTS, id=list("abcdef"), lang=["en"] * 6)


def test_each_chunk_has_the_vector_of_its_text_and_a_document_counts_once(documents: Path, tmp_path: Path, model: Path) -> None:
    receipt = embed(documents, tmp_path / "out", model, chunk_overlap=10, keep_columns=["lang"], **CHUNKED)
    assert (receipt.rows_read, receipt.rows_embedded, receipt.rows_rejected) == (6, 4, 2)
    table = rows_of(tmp_path / "out")
    assert receipt.vectors == table.num_rows > 8
    assert table.column_names[-4:] == ["chunk", "chunk_start", "chunk_end", "lang"]
    embedder = Embedder.load(str(model))
    chunks = [str(TEXTS["abcdef".index(row["id"])])[row["chunk_start"] : row["chunk_end"]] for row in table.to_pylist()]
    expected = embedder.encode(chunks)
    found = np.stack(table["embedding"].to_pylist()).astype(np.float32)
    assert float(np.abs(found - expected).max()) <= 1e-5
    assert set(zip(table["id"].to_pylist(), table["chunk"].to_pylist(), strict=True)) >= {("a", 0), ("b", 0), ("b", 1), ("d", 0), ("e", 1)}
    assert all(chunk.endswith((".", "!")) for chunk in chunks if chunk != "x" and not chunk.endswith(" "))
    assert problems_of(tmp_path / "out", documents) == []


def test_the_mean_of_a_documents_chunks_is_its_one_vector(documents: Path, tmp_path: Path, model: Path) -> None:
    embed(documents, tmp_path / "chunks", model, **CHUNKED)
    receipt = embed(documents, tmp_path / "pooled", model, chunk_pool="mean", **CHUNKED)
    assert (receipt.vectors, receipt.rows_embedded) == (4, 4)
    pooled = vectors_by_text_id(tmp_path / "pooled")
    chunks = rows_of(tmp_path / "chunks")
    assert "chunk" not in rows_of(tmp_path / "pooled").column_names
    for id_, vector in pooled.items():
        mine = np.stack([row["embedding"] for row in chunks.to_pylist() if row["id"] == id_])
        mean = mine.mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
    assert rows_of(tmp_path / "pooled")["n_tokens"].to_pylist() == [
        sum(row["n_tokens"] for row in chunks.to_pylist() if row["id"] == id_) for id_ in ("a", "b", "d", "e")
    ]
    assert problems_of(tmp_path / "pooled", documents) == []


def test_a_document_that_is_one_chunk_has_the_vector_of_the_whole_text(documents: Path, tmp_path: Path, model: Path) -> None:
    embed(documents, tmp_path / "whole", model, max_reject_rate=1.0)
    embed(documents, tmp_path / "chunks", model, **(CHUNKED | {"chunk_tokens": 200}))
    whole, chunks = vectors_by_text_id(tmp_path / "whole"), vectors_by_text_id(tmp_path / "chunks")
    for id_ in ("a", "d"):
        np.testing.assert_allclose(chunks[id_], whole[id_], atol=1e-5)


@pytest.mark.parametrize("pool", ["none", "mean"])
def test_a_document_with_one_bad_chunk_is_rejected_whole_and_names_the_chunk(tmp_path: Path, pool: str) -> None:
    directory = make_damaged_model(tmp_path / "model")
    texts = ["".join(SENTENCES), "".join(SENTENCES) + "Here is a #. " + "".join(SENTENCES), SENTENCES[0]]
    corpus = write(tmp_path / "in" / "a.parquet", texts, id=[1, 2, 3])
    receipt = embed(corpus, tmp_path / "out", directory, prompt="none", chunk_pool=pool, chunk_tokens=24, max_nan=1)
    assert (receipt.rows_embedded, receipt.rows_rejected) == (2, 1)
    (reject,) = rejects_of(tmp_path / "out")
    assert (reject["source_row"], reject["id"], reject["reason"]) == (1, "2", "not_finite")
    if pool == "none":
        assert reject["detail"].startswith("chunk ")
    assert set(rows_of(tmp_path / "out")["id"].to_pylist()) == {1, 3}
    assert problems_of(tmp_path / "out", corpus) == []


def test_verify_finds_a_chunk_that_is_missing(documents: Path, tmp_path: Path, model: Path) -> None:
    embed(documents, tmp_path / "out", model, **CHUNKED)
    commit = next(commit for commit in opened(tmp_path / "out").commits if commit.vectors > commit.embedded)
    path = tmp_path / "out" / str(commit.shard)
    table = pq.read_table(path)
    middle = table["chunk"].to_pylist().index(1)
    pq.write_table(table.take([row for row in range(table.num_rows) if row != middle]), path)
    import hashlib

    from llmemb_ray.shards import commits

    data = path.read_bytes()
    changed = replace(commit, vectors=commit.vectors - 1, shard_bytes=len(data), shard_sha256=hashlib.sha256(data).hexdigest())
    run = opened(tmp_path / "out")
    commits.compact(run.storage, [changed if other.unit == commit.unit else other for other in run.commits])
    assert any("do not follow one another" in problem for problem in problems_of(tmp_path / "out"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"chunk_overlap": 3}, "chunk_tokens"),
        ({"chunk_pool": "mean"}, "chunk_tokens"),
        ({"chunk_tokens": 10, "chunk_overlap": 6}, "half of chunk_tokens=10"),
        ({"chunk_tokens": 250}, r"chunk_tokens: 250 .* max_tokens=256; chunks of up to \d+ fit"),
    ],
)
def test_chunks_that_cannot_be_are_refused_before_anything_starts(documents: Path, tmp_path: Path, model: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        embed(documents, tmp_path / "out", model, **settings)
    assert not (tmp_path / "out").exists()


def test_other_chunks_are_another_run(documents: Path, tmp_path: Path, model: Path) -> None:
    embed(documents, tmp_path / "out", model, **CHUNKED)
    with pytest.raises(RunMismatch, match="chunk_tokens: the run there has 40, asked for now 41"):
        embed(documents, tmp_path / "out", model, **(CHUNKED | {"chunk_tokens": 41}))


def test_long_texts_in_many_chunks_are_not_copied_for_each(tmp_path: Path, model: Path) -> None:
    """600 kB in some thousand chunks: a copy of the text for each would be gigabytes, more than Arrow holds in one column."""
    long = " ".join(f"word{number} is here." for number in range(34_000))
    assert len(long) > 600_000
    receipt = embed(write(tmp_path / "a.parquet", [long], id=[1]), tmp_path / "out", model, chunk_tokens=128, layer=0)
    assert (receipt.rows_embedded, receipt.truncated) == (1, 0)
    assert receipt.vectors > 1000


def test_units_of_chunked_texts_are_sized_by_their_chunks(tmp_path: Path, model: Path) -> None:
    """10,000 characters are 2,500 tokens as the plan reckons, so 157 chunks of 16; their vectors must fit into a shard."""
    corpus = write(tmp_path / "a.parquet", [f"{row} " + "word " * 2000 for row in range(3000)], row_group_size=3000)
    ready = settled(corpus, tmp_path / "out", model, chunk_tokens=16)
    found, selection = planning.find(ready.settings)
    plan = planning.make_plan(ready.settings, replace(ready.spec, dimension=4096, model_flops=1.0), found, selection, actors=1, gpu=False)
    largest = max(unit.rows for unit in plan.units())
    assert 0.5 * SHARD_BYTES < largest * (2500 / 16) * 4096 * 4 <= SHARD_BYTES
