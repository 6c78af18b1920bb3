"""Exact search against a brute-force product in numpy, and the spaces that it refuses to mix."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from llmemb_ray.errors import ModelError, RunMismatch
from llmemb_ray.representation.representation import Form, Representation
from llmemb_ray.search.exact import Hit, load_embedder, search, search_vectors
from llmemb_ray.shards import commits, schema
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Storage
from tests.shards.small_plan import commit_of, small_plan
from tests.small_jobs import embed, opened, write
from tests.small_models import make_model


def made_run(directory: Path, vectors_ND: np.ndarray, monkeypatch: pytest.MonkeyPatch, *, group_rows: int = 7) -> Run:
    """A run whose vectors are given: 55 rows of 4 dimensions, in the units and files of the small plan."""
    monkeypatch.setattr(schema, "ROW_GROUP_BYTES", group_rows * 16)
    storage = Storage(str(directory))
    plan = small_plan()
    plan.save(storage)
    done = 0
    for unit in plan.units():
        part = np.asarray(vectors_ND[done : done + unit.rows], np.float32)
        rows = np.arange(unit.start, unit.start + unit.rows)
        table = pa.table(
            {
                "id": [f"{unit.file}-{row}" for row in rows],
                "source_file": pa.array([unit.file] * unit.rows, pa.int32()),
                "source_row": pa.array(rows, pa.int64()),
                "embedding": schema.embedding_column(part, "float32"),
            }
        )
        commit = commit_of(unit)
        assert commit.shard is not None
        storage.put(commit.shard, schema.encode_shard(table, {}, vector_bytes=16))
        commits.write(storage, commit)
        done += unit.rows
    return Run(storage)


PLACES = [(0, row) for row in range(30)] + [(1, row) for row in range(25)]


def brute_force(vectors_ND: np.ndarray, query_D: np.ndarray, top_k: int) -> list[tuple[int, int]]:
    scores = vectors_ND.astype(np.float64) @ query_D
    return [PLACES[row] for row in np.argsort(-scores, kind="stable")[:top_k]]


def places(hits: list[Hit]) -> list[tuple[int, int]]:
    return [(hit.source_file, hit.source_row) for hit in hits]


@pytest.mark.parametrize("top_k", [1, 5, 12, 55])
def test_the_hits_are_those_of_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top_k: int) -> None:
    random = np.random.default_rng(3)
    vectors, queries = random.standard_normal((55, 4)).astype(np.float32), random.standard_normal((6, 4)).astype(np.float32)
    run = made_run(tmp_path, vectors, monkeypatch)
    for query, hits in zip(queries, search_vectors(run, queries, top_k=top_k), strict=True):
        assert places(hits) == brute_force(vectors, query, top_k)
        assert [hit.id for hit in hits] == [f"{file}-{row}" for file, row in places(hits)]
        np.testing.assert_allclose([hit.score for hit in hits], sorted(vectors @ query, reverse=True)[:top_k], atol=1e-5)


@pytest.mark.parametrize("group_rows", [3, 10, 100])
@pytest.mark.parametrize("top_k", [1, 2, 4, 9, 20])
def test_equal_scores_stand_in_the_order_of_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top_k: int, group_rows: int) -> None:
    """Small whole numbers, so that sums are exact and ties are ties; most rows tie, within row groups and across files."""
    vectors = np.random.default_rng(5).integers(0, 2, (55, 4)).astype(np.float32)
    run = made_run(tmp_path, vectors, monkeypatch, group_rows=group_rows)
    queries = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [-1, 1, 0, 2]], np.float32)
    for query, hits in zip(queries, search_vectors(run, queries, top_k=top_k), strict=True):
        assert places(hits) == brute_force(vectors, query, top_k)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    root = tmp_path_factory.mktemp("library")
    write(root / "in" / "a.parquet", ["a man plays a guitar", "snow in winter", "the stock market fell", None, "a man plays a guitar"])
    embed(root / "in", root / "out", model, prompt="none", pooling="mean")
    return root


def test_a_run_without_ids_is_searched_by_file_and_row(library: Path) -> None:
    (hits,) = search(opened(library / "out"), ["a man plays a guitar"], top_k=50)
    assert len(hits) == 4, "every embedded row, and no more"
    assert {places(hits)[0], places(hits)[1]} == {(0, 0), (0, 4)}
    assert [hit.id for hit in hits] == [None] * 4
    assert hits[0].score == pytest.approx(1.0, abs=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_a_hit_is_plain_data() -> None:
    assert Hit(score=0.5, id=7, source_file=0, source_row=3).to_dict() == {"score": 0.5, "id": 7, "source_file": 0, "source_row": 3}


def test_a_query_is_embedded_as_a_query(tmp_path: Path, model: Path) -> None:
    """For e5 a query carries the instruction and a document does not."""
    corpus = write(tmp_path / "in" / "a.parquet", ["Instruct: find it\nQuery: snow", "snow", "rain"], id=["instructed", "plain", "rain"])
    embed(corpus, tmp_path / "out", model, prompt="e5", instruction="find it", role="query")
    run = opened(tmp_path / "out")
    (hits,) = search(run, ["snow"], top_k=3)
    assert (hits[0].id, round(hits[0].score, 4)) == ("plain", 1.0), "both sides carry the instruction"

    Representation(query=Form(template="Instruct: find it\nQuery: {text}"), append_eos=True).save(tmp_path)
    embed(corpus, tmp_path / "documents", model, representation=str(tmp_path))
    (hits,) = search(opened(tmp_path / "documents"), ["snow"], top_k=3)
    assert (hits[0].id, round(hits[0].score, 4)) == ("instructed", 1.0), "only the query carries it"
    assert hits[1].score < 0.9999


def test_a_model_of_other_weights_is_refused_field_by_field(library: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=9)
    with pytest.raises(RunMismatch) as raised:
        load_embedder(opened(library / "out"), model=str(other))
    message = str(raised.value)
    assert "  model: the run has 'sha256:" in message
    assert str(other) in message
    assert "tokenizer" not in message
    assert "representation" not in message


def test_a_model_of_another_tokenizer_is_refused_too(library: Path, model: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    tokenizer = (moved / "tokenizer.json").read_text()
    (moved / "tokenizer.json").write_text(tokenizer.replace('"<s>"', '"<t>"'))
    with pytest.raises((RunMismatch, ModelError), match="tokenizer"):
        load_embedder(opened(library / "out"), model=str(moved))


def test_the_same_model_at_another_place_is_found_and_used(tmp_path: Path, library: Path, model: Path) -> None:
    first = tmp_path / "first"
    shutil.copytree(model, first)
    embed(library / "in", tmp_path / "out", first, prompt="none", pooling="mean")
    first.rename(tmp_path / "second")
    run = opened(tmp_path / "out")
    with pytest.raises(ModelError, match="first"):
        load_embedder(run)
    embedder: Any = load_embedder(run, model=str(tmp_path / "second"))
    (hits,) = search(run, ["snow in winter"], embedder=embedder, top_k=1)
    assert places(hits) == [(0, 1)]
