"""Results as a person and a program get them: texts of the rows found, notes on what is missing, files of results."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from llmemb_ray.config import SearchSettings
from llmemb_ray.errors import ConfigError
from llmemb_ray.search import exact, show
from llmemb_ray.search.job import find
from tests.small_jobs import embed, opened, write

TEXTS = ["A man plays\n  a guitar.", "snow in winter " * 30, "the stock market fell", None, "rain"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    root = tmp_path_factory.mktemp("show")
    write(root / "in" / "a.parquet", TEXTS, id=list("abcde"))
    embed(root / "in", root / "out", model, prompt="none", pooling="mean", rows_per_unit=2)
    return root


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\n\tb   c ", "a b c"),
        ("x" * 100, "x" * 100),
        ("x" * 101, "x" * 99 + "…"),
        ("word " * 1000, ("word " * 20)[:99] + "…"),
        (" " * 500 + "far", "…"),
        ("", ""),
    ],
)
def test_a_text_is_shown_by_its_beginning_on_one_line(text: str, line: str) -> None:
    assert show.beginning(text) == line


def test_a_line_holds_score_id_and_the_beginning_of_the_text(library: Path, llmemb: Any) -> None:
    shown = llmemb("search", library / "out", "A man plays\n  a guitar.", "rain", "--top-k", 2)
    assert shown.code == 0, shown.err
    first, best, _, second, other, _ = shown.out.splitlines()
    assert (first, best) == ("A man plays a guitar.", "  1.0000  a  A man plays a guitar.")
    assert (second, other) == ("rain", "  1.0000  e  rain")
    assert shown.err == ""
    assert llmemb("search", library / "out", "rain", "--top-k", 1, "--no-text").out == "rain\n  1.0000  e\n"


def test_json_tells_all_of_a_hit(library: Path, llmemb: Any) -> None:
    (result,) = json.loads(llmemb("search", library / "out", "rain", "--top-k", 1, "--json").out)
    (hit,) = result["hits"]
    assert hit.pop("score") == pytest.approx(1.0, abs=1e-5)
    place = {"rank": 1, "id": "e", "source_file": 0, "source_row": 4, "source_url": str(library / "in" / "a.parquet")}
    assert hit == place | {"chunk": None, "chunk_start": None, "chunk_end": None, "text": "rain"}
    (result,) = json.loads(llmemb("search", library / "out", "rain", "--json", "--no-text").out)
    assert not any("text" in hit for hit in result["hits"])


def test_a_corpus_that_changed_leaves_the_results_and_says_why_there_is_no_text(tmp_path: Path, model: Path, llmemb: Any) -> None:
    write(tmp_path / "in" / "a.parquet", ["rain", "snow"], id=["r", "s"])
    write(tmp_path / "in" / "b.parquet", ["sun"], id=["t"])
    embed(tmp_path / "in", tmp_path / "out", model, prompt="none", pooling="mean")
    (tmp_path / "in" / "b.parquet").unlink()
    shown = llmemb("search", tmp_path / "out", "rain")
    assert shown.code == 0
    assert "  1.0000  r  rain\n" in shown.out
    assert " t\n" in shown.out
    assert "note: no text for 1 of 3 results: " in shown.err
    assert "b.parquet" in shown.err
    assert shown.err.count("\n") == 1
    write(tmp_path / "in" / "a.parquet", ["another text", "snow"], id=["r", "s"])
    shown = llmemb("search", tmp_path / "out", "rain")
    assert "another text" not in shown.out, "not the text that was embedded"
    assert "note: no text for 3 of 3 results: " in shown.err


def test_of_an_unfinished_run_what_is_committed_is_searched(tmp_path: Path, library: Path, model: Path, llmemb: Any) -> None:
    embed(library / "in", tmp_path / "out", model, prompt="none", pooling="mean", rows_per_unit=2)
    run = opened(tmp_path / "out")
    from llmemb_ray.shards import commits

    for commit in run.commits[:2]:
        commits.write(run.storage, commit)
    (tmp_path / "out" / commits.COMPACTED).unlink()
    (tmp_path / "out" / "_llmemb" / "receipt.json").unlink()
    shown = llmemb("search", tmp_path / "out", "rain", "--top-k", 50)
    assert shown.code == 0, shown.err
    assert len(shown.out.splitlines()) == 1 + 3
    assert shown.err == "note: the run is not finished: 2 of 3 units are committed, only those are searched\n"


def test_a_chunk_is_shown_with_its_number_and_its_own_text(tmp_path: Path, model: Path, llmemb: Any) -> None:
    text = "Snow fell all night. " * 10 + "A man plays a guitar on the beach. " + "The market fell again. " * 10
    write(tmp_path / "in" / "a.parquet", [text], id=["long"])
    embed(tmp_path / "in", tmp_path / "out", model, prompt="none", pooling="mean", chunk_tokens=40)
    (result,) = json.loads(llmemb("search", tmp_path / "out", "A man plays a guitar on the beach.", "--json", "--top-k", 1).out)
    (hit,) = result["hits"]
    assert "guitar" in hit["text"]
    assert hit["text"] == text[hit["chunk_start"] : hit["chunk_end"]]
    line = llmemb("search", tmp_path / "out", "A man plays a guitar on the beach.", "--top-k", 1).out.splitlines()[1]
    assert f"long chunk {hit['chunk']}  {hit['text'][:20]}" in line


@pytest.mark.parametrize("rows", [20_000, 2])
def test_results_of_a_query_file_are_written_with_texts(library: Path, tmp_path: Path, llmemb: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "TEXT_ROWS", rows)
    (tmp_path / "q.jsonl").write_text('{"query_id": 5, "query": "rain"}\n{"query_id": 6, "query": "snow in winter"}\n')
    out = tmp_path / "new" / "hits.parquet"
    arguments = ("search", library / "out", "--set", "text=[]", "--queries", tmp_path / "q.jsonl", "--out", out, "--top-k", 3)
    shown = llmemb(*arguments)
    assert shown.code == 0, shown.err
    assert "results  6" in shown.out
    table = pq.read_table(out)
    assert table.column_names == ["query", "query_id", "rank", "score", "id", "source_file", "source_row", "text"]
    assert table["query_id"].to_pylist() == [5] * 3 + [6] * 3
    assert table["rank"].to_pylist() == [1, 2, 3] * 2
    assert table["text"].to_pylist() == [TEXTS["abcde".index(id_)] for id_ in table["id"].to_pylist()]
    run = opened(library / "out")
    expected = exact.search(run, ["rain", "snow in winter"], top_k=3)
    assert table["id"].to_pylist() == [hit.id for hits in expected for hit in hits]
    np.testing.assert_allclose(table["score"], [hit.score for hits in expected for hit in hits], atol=1e-6)

    again = llmemb(*arguments)
    assert (again.code, "is there already" in again.err, "overwrite" in again.err) == (2, True, True)
    assert llmemb(*arguments, "--overwrite", "--no-text").code == 0
    assert "text" not in pq.read_schema(out).names


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "TEXT must be given, or a file of queries"),
        ({"text": ["a"], "queries": "q.txt"}, "exclude each other"),
        ({"text": ["a"], "query_column": "q"}, "nothing without queries"),
        ({"text": ["a"], "overwrite": True}, "nothing without out"),
        ({"text": ["a"], "top_k": 0}, "top_k"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SearchSettings.make({"run": "r"} | values)


def test_an_empty_query_is_exit_2(library: Path, llmemb: Any) -> None:
    shown = llmemb("search", library / "out", "rain", "")
    assert (shown.code, "query 1 is empty" in shown.err, shown.out) == (2, True, "")


def test_the_job_finds_without_showing(library: Path) -> None:
    found = find(SearchSettings.make({"run": str(library / "out"), "text": ["rain"], "top_k": 1}))
    assert exact.hits(found.table)[0].id == "e"
    assert show.notes(found.run, Counter(), 1) == []
