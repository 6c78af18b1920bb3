"""Search on a real Ray of two cores (and a GPU that exists only in its books) against the search in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmemb_ray.config import SearchSettings
from llmemb_ray.connection import connected
from llmemb_ray.errors import ConfigError, InputError, OutputError
from llmemb_ray.search import cluster, exact
from llmemb_ray.search.job import find
from llmemb_ray.search.queries import Queries
from tests.search.test_exact import made_run
from tests.small_jobs import embed, opened, write
from tests.small_models import SENTENCES


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """12 units; every sentence stands there several times, so that equal scores lie in different shards."""
    root = tmp_path_factory.mktemp("cluster")
    texts = [SENTENCES[row % len(SENTENCES)] for row in range(60)]
    write(root / "in" / "a.parquet", texts, id=[f"id-{row}" for row in range(60)], row_group_size=5)
    embed(root / "in", root / "out", model, rows_per_unit=5)
    return root


@pytest.mark.parametrize("top_k", [1, 7, 100])
def test_the_cluster_finds_what_one_process_finds(library: Path, ray_here: None, top_k: int) -> None:
    run = opened(library / "out")
    queries = exact.embed_queries(exact.load_embedder(run), SENTENCES)
    assert cluster.search_vectors(run, queries, top_k=top_k) == exact.search_vectors(run, queries, top_k=top_k)


def test_parts_are_merged_whatever_order_they_come_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_here: None) -> None:
    """Whole numbers of which most tie; one part at a time under way, then all."""
    vectors = np.random.default_rng(5).integers(0, 2, (55, 4)).astype(np.float32)
    run = made_run(tmp_path, vectors, monkeypatch)
    queries = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [-1, 1, 0, 2]], np.float32)
    expected = exact.search_vectors(run, queries, top_k=9)
    for parts, under_way in ((1, 1), (2, 1), (8, 8)):
        monkeypatch.setattr(cluster, "TASKS_PER_CPU", parts)
        monkeypatch.setattr(cluster, "UNDER_WAY_PER_CPU", under_way)
        assert cluster.search_vectors(run, queries, top_k=9) == expected


def test_a_query_file_is_searched_on_the_cluster(library: Path, ray_here: None, tmp_path: Path) -> None:
    (tmp_path / "q.tsv").write_text("query_id\tquery\n7\tWhat is this?\n9\tx\n")
    values = {"run": str(library / "out"), "queries": str(tmp_path / "q.tsv"), "top_k": 3}
    found = find(SearchSettings.make(values | {"on_cluster": True}))
    here = find(SearchSettings.make(values))
    assert found.queries == here.queries == Queries(["What is this?", "x"], ["7", "9"])
    columns = ["query", "rank", "id", "source_file", "source_row"]
    assert found.table.select(columns) == here.table.select(columns)
    np.testing.assert_allclose(found.table["score"], here.table["score"], atol=1e-6)


def test_an_error_of_a_task_is_told_as_it_is_here(tmp_path: Path, library: Path, model: Path, ray_here: None) -> None:
    embed(library / "in", tmp_path / "out", model, rows_per_unit=5)
    run = opened(tmp_path / "out")
    _ = run.commits
    with pytest.raises(InputError, match="query 1 is empty"):
        cluster.embed_queries(run, ["a", " "])
    next((tmp_path / "out" / "data").iterdir()).unlink()
    with pytest.raises(OutputError, match="named by a commit but is not there"):
        cluster.search_vectors(run, np.zeros((1, run.plan.dimension), np.float32), top_k=1)


def test_a_cluster_that_does_not_answer_is_named(ray_here: None) -> None:
    import ray

    ray.shutdown()
    with pytest.raises(ConfigError, match=r"ray_address: no Ray cluster answers at 127\.0\.0\.1:1"), connected("127.0.0.1:1"):
        pass
