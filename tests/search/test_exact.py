"""Exact search against a brute-force product in numpy, and the spaces that it refuses to mix."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from llmemb_ray.errors import ConfigError, InputError, ModelError, RunMismatch
from llmemb_ray.representation.representation import Form, Representation
from llmemb_ray.search import best
from llmemb_ray.search.exact import Hit, load_embedder, search, search_vectors
from llmemb_ray.shards import commits, schema
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Storage
from tests.shards.small_plan import commit_of, small_plan
from tests.small_jobs import embed, opened, write
from tests.small_models import SENTENCES, make_model


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


@pytest.mark.parametrize("top_k", [3, 40])
def test_many_queries_and_blocks_give_what_one_query_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top_k: int) -> None:
    """Blocks of 5 vectors and 3 queries: their borders cross those of row groups and shards."""
    random = np.random.default_rng(11)
    vectors, queries = random.standard_normal((55, 4)).astype(np.float32), random.standard_normal((10, 4)).astype(np.float32)
    run = made_run(tmp_path, vectors, monkeypatch, group_rows=8)
    alone = [search_vectors(run, queries[number : number + 1], top_k=top_k)[0] for number in range(10)]
    monkeypatch.setattr(best, "BLOCK_ROWS", 5)
    monkeypatch.setattr(best, "QUERY_BLOCK", 3)
    monkeypatch.setattr(best, "PAIR_VALUES", 8)
    assert search_vectors(run, queries, top_k=top_k) == alone, "to the last bit of the scores"


def test_scores_that_float32_cannot_tell_apart_stand_in_their_true_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row's product differs by 2^-40, far below what a float32 sum of terms near 1 can show."""
    vectors = np.zeros((55, 4), np.float32)
    vectors[:, :2] = 1, -1
    vectors[:, 2] = np.random.default_rng(2).permutation(55) * 2.0**-40
    vectors[:, 3] = 1
    run = made_run(tmp_path, vectors, monkeypatch)
    (hits,) = search_vectors(run, np.ones((1, 4), np.float32), top_k=20)
    assert places(hits) == brute_force(vectors, np.ones(4), 20)
    assert len({hit.score for hit in hits}) == 20


@pytest.mark.parametrize("shape", [(4,), (2, 5), (1, 2, 4)])
def test_queries_of_another_dimension_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    run = made_run(tmp_path, np.zeros((55, 4)), monkeypatch)
    with pytest.raises(ConfigError, match="4 dimensions"):
        search_vectors(run, np.zeros(shape, np.float32), top_k=1)


def test_queries_that_are_not_finite_and_no_results_at_all_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made_run(tmp_path, np.zeros((55, 4)), monkeypatch)
    with pytest.raises(ConfigError, match="number 1 has values that are not finite"):
        search_vectors(run, np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]], np.float32), top_k=1)
    with pytest.raises(ConfigError, match="top_k"):
        search_vectors(run, np.zeros((1, 4), np.float32), top_k=0)
    assert search_vectors(run, np.zeros((0, 4), np.float32), top_k=3) == []


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


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_query_is_refused_by_its_number(library: Path, text: str) -> None:
    with pytest.raises(InputError, match="query 1 is empty"):
        search(opened(library / "out"), ["snow", text])


def test_no_query_has_no_result(library: Path) -> None:
    assert search(opened(library / "out"), []) == []


@pytest.mark.parametrize("dtype", ["float16", "int8", "ubinary"])
def test_codes_are_compared_as_the_vectors_they_stand_for(tmp_path: Path, model: Path, dtype: str) -> None:
    texts = [f"{sentence} {number}" for number in range(4) for sentence in SENTENCES]
    corpus = write(tmp_path / "in" / "a.parquet", texts, id=list(range(len(texts))))
    embed(corpus, tmp_path / "out", model, dtype=dtype)
    run = opened(tmp_path / "out")
    embedder = load_embedder(run)
    stored = np.concatenate([run.precision.decode(table["embedding"]) for _, table in run.shards(["embedding"])])
    query = embedder.encode(["What is this?"], role="query")[0]
    (hits,) = search(run, ["What is this?"], embedder=embedder, top_k=7)
    assert [hit.id for hit in hits] == np.argsort(-(stored.astype(np.float64) @ query), kind="stable")[:7].tolist()


def test_a_chunk_is_found_with_its_place_in_the_text(tmp_path: Path, model: Path) -> None:
    text = "Snow fell all night. " * 10 + "A man plays a guitar on the beach. " + "The market fell again. " * 10
    corpus = write(tmp_path / "in" / "a.parquet", ["short", text], id=["s", "long"])
    embed(corpus, tmp_path / "out", model, prompt="none", pooling="mean", chunk_tokens=40)
    run = opened(tmp_path / "out")
    (hits,) = search(run, ["A man plays a guitar on the beach."], top_k=500)
    assert len(hits) == sum(commit.vectors for commit in run.commits) > 3
    assert [hit.chunk for hit in sorted((hit for hit in hits if hit.id == "long"), key=lambda hit: hit.chunk_start or 0)] == list(range(len(hits) - 1))
    assert (hits[0].id, hits[0].source_row) == ("long", 1)
    assert "guitar" in text[hits[0].chunk_start : hits[0].chunk_end]


def test_a_run_without_vectors_has_no_hits(tmp_path: Path, model: Path) -> None:
    embed(write(tmp_path / "in" / "a.parquet", [None, ""], id=["a", "b"]), tmp_path / "out", model, max_reject_rate=1.0)
    assert search(opened(tmp_path / "out"), ["x"], top_k=3) == [[]]


def test_a_hit_is_plain_data() -> None:
    place = {"score": 0.5, "id": 7, "source_file": 0, "source_row": 3}
    assert Hit(**place).to_dict() == place | {"chunk": None, "chunk_start": None, "chunk_end": None}


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
