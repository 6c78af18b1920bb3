"""The demonstration's corpus and model: enough rows, unique names, and a search that finds shared words."""

from __future__ import annotations

import hashlib
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


def test_the_model_finds_shared_words_and_is_the_same_for_the_same_seed(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    """The search runs over every fifth row and all that name csv, which keeps the test short."""
    directory, texts = corpus
    demo.make_model(tmp_path / "model", texts)
    table = pq.read_table(directory)
    rows = [row for row, id_ in enumerate(table["id"].to_pylist()) if row % 5 == 0 or "csv" in str(id_)]
    ids = [table["id"][row].as_py() for row in rows]
    embedder = Embedder.load(str(tmp_path / "model"), prompt="none", token_budget=4096, max_tokens=128)
    vectors = embedder.encode([texts[row] for row in rows])
    best = np.argsort(-(vectors @ embedder.encode(["read a csv file"], role="query")[0]))[:5]
    assert all("csv" in ids[row] for row in best), [ids[row] for row in best]

    demo.make_model(tmp_path / "again", texts)
    demo.make_model(tmp_path / "other", texts, seed=1)
    digests = [hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest() for name in ("model", "again", "other")]
    assert digests[0] == digests[1] != digests[2]
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (tmp_path / "again" / "tokenizer.json").read_bytes()
