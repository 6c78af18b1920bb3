"""The demonstration's corpus: enough rows and unique names; and the package's model finds what a question asks for among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from llmemb_ray import demo
from llmemb_ray.embedders.embedder import Embedder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    directory = tmp_path_factory.mktemp("demo") / "corpus"
    return directory, demo.make_corpus(directory)


def test_the_corpus_is_large_and_its_ids_are_unique(corpus: tuple[Path, list[str]]) -> None:
    directory, texts = corpus
    table = pq.read_table(directory)
    assert table.num_rows == len(texts) > 9000
    assert len(set(table["id"].to_pylist())) == table.num_rows
    assert table["text"].to_pylist() == texts
    assert all(text.strip() for text in texts)
    assert len(list(directory.iterdir())) == demo.FILES
    assert {"_csv.reader", "gzip.compress", "smtplib.SMTP"} <= set(table["id"].to_pylist())


def test_the_packages_model_answers_questions(corpus: tuple[Path, list[str]]) -> None:
    """The search runs over every fifth row and all that name a right answer, which keeps the test short."""
    directory, texts = corpus
    table = pq.read_table(directory)
    answers = ("csv", "random.Random.choice", "gethostby")
    rows = [row for row, id_ in enumerate(table["id"].to_pylist()) if row % 5 == 0 or any(answer in str(id_) for answer in answers)]
    ids = [table["id"][row].as_py() for row in rows]
    embedder = Embedder.load("pocket", token_budget=4096, max_tokens=128)
    vectors = embedder.encode([texts[row] for row in rows])
    for query, answer in zip(demo.QUERIES, answers, strict=True):
        best = [ids[row] for row in np.argsort(-(vectors @ embedder.encode([query], role="query")[0]))[:3]]
        assert any(answer in id_ for id_ in best), (query, best)
