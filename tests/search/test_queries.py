"""Queries out of files of every kind, and files that are refused with the row at fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.search.queries import Queries, read_queries
from llmemb_ray.storage import Storage
from tests.s3_server import S3Server

TEXTS = ["snow in winter", 'she said "yes", twice', "数据科学"]
IDS = ["007", "b", "c"]


def written(path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"query_id": IDS, "query": TEXTS}), path)
    elif path.suffix in (".jsonl", ".ndjson"):
        path.write_text("\n".join(json.dumps({"_id": id_, "text": text}) for id_, text in zip(IDS, TEXTS, strict=True)) + "\n\n", encoding="utf-8")
    elif path.suffix == ".csv":
        rows = (f'{id_},"{text.replace(chr(34), chr(34) * 2)}"' for id_, text in zip(IDS, TEXTS, strict=True))
        path.write_text("id,query\n" + "\n".join(rows) + "\n", encoding="utf-8")
    elif path.suffix == ".tsv":
        path.write_text("query_id\ttext\n" + "\n".join(f"{i}\t{t.replace(chr(34), chr(39))}" for i, t in zip(IDS, TEXTS, strict=True)), encoding="utf-8")
    else:
        path.write_text("\ufeff" + "\n\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "ndjson", "csv", "tsv", "txt", "JSONL"])
def test_queries_of_every_kind_of_file_are_read_in_order(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path / f"q.{kind.lower()}").rename(tmp_path / f"q.{kind}")
    queries = read_queries(str(path))
    assert queries.texts == ([text.replace('"', "'") for text in TEXTS] if kind == "tsv" else TEXTS)
    assert queries.ids == (None if kind == "txt" else IDS), "007 stays a text"


def test_columns_are_taken_by_name(tmp_path: Path) -> None:
    path = tmp_path / "q.parquet"
    pq.write_table(pa.table({"text": ["no"], "question": pa.array(["yes"]).dictionary_encode(), "number": [7]}), path)
    assert read_queries(str(path), query_column="question", id_column="number") == Queries(["yes"], [7])
    with pytest.raises(ConfigError, match="no column 'q'; its columns are text, question, number"):
        read_queries(str(path), query_column="q")
    with pytest.raises(ConfigError, match="query_id_column"):
        read_queries(str(path), id_column="q")


def test_digits_are_queries_too(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("query\n1984\n42\n")
    assert read_queries(str(tmp_path / "q.csv")).texts == ["1984", "42"]


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("q.docx", b"x", ConfigError, r"\.parquet, \.jsonl"),
        ("q.txt", b"\n \n", InputError, "holds no query"),
        ("q.txt", b"\xff\xfe", InputError, "not UTF-8 at byte 0"),
        ("q.jsonl", b'{"query": "a"}\n{"query": \n', InputError, "line 2 is not JSON"),
        ("q.jsonl", b'"a"\n', InputError, "line 1 is no object"),
        ("q.jsonl", b'{"query": "a"}\n{"query": null}\n', InputError, "row 1: None is no text"),
        ("q.jsonl", b'{"query": 5}\n', InputError, "row 0: 5 is no text"),
        ("q.jsonl", b"", InputError, "holds no query"),
        ("q.csv", b"query,id\na,1\n,2\n", InputError, "row 1: the query is empty"),
        ("q.csv", b"title\na\n", ConfigError, "no column query or text; name one of title"),
        ("q.parquet", b"not parquet", InputError, "cannot be read as Parquet"),
    ],
)
def test_a_file_that_holds_no_queries_is_refused_where_it_fails(tmp_path: Path, name: str, content: bytes, error: Any, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=words):
        read_queries(str(tmp_path / name))


def test_a_file_that_is_not_there_and_columns_of_a_text_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"queries: .*q\.txt; check the path"):
        read_queries(str(tmp_path / "q.txt"))
    (tmp_path / "q.txt").write_text("a\n")
    with pytest.raises(ConfigError, match="has no columns"):
        read_queries(str(tmp_path / "q.txt"), query_column="query")


def test_queries_may_lie_in_object_storage(s3: S3Server) -> None:
    Storage(s3.url("in"), s3.access()).put("q.jsonl", b'{"query": "a"}\n')
    assert read_queries(s3.url("in/q.jsonl"), s3.access()) == Queries(["a"])
