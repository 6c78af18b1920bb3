"""Queries with their positives from files of each kind: what is taken, what is rejected, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmemb_ray.config import MineSettings
from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.mining import pairs
from llmemb_ray.storage import Storage

ROWS: list[dict[str, Any]] = [
    {"id": 7, "query": "one", "positive": ["first", "second", "first"]},
    {"id": 8, "query": " ", "positive": ["x"]},
    {"id": 9, "query": "two", "positive": ["y", None]},
    {"id": 10, "query": None, "positive": ["z"]},
    {"id": 11, "query": "three", "positive": []},
    {"id": 12, "query": "four", "positive": ["last"]},
]
KEPT = [("7", "one", ["first", "second"]), ("12", "four", ["last"])]


def written(tmp_path: Path, path: Path, **values: Any) -> tuple[pairs.Written, list[dict[str, Any]], list[dict[str, Any]]]:
    """What was read, the rows of all parts, and the rejects."""
    settings = MineSettings.make({"model": "m", "queries": [str(path)], "corpus": ["c"], "out": "o"} | values)
    output = Storage(str(tmp_path / "out"))
    made = pairs.write(settings, pairs.files_of(settings), output)
    rows = [row for name in made.parts for row in pq.read_table(tmp_path / "out" / "pairs" / name).to_pylist()]
    return made, rows, [row for file in sorted((tmp_path / "out").glob("rejects/*")) for row in pq.read_table(file).to_pylist()]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_pairs_or_rejects(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"q.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    made, rows, rejects = written(tmp_path, path, block_queries=1)
    assert [(row["query_id"], row["anchor"], row["positives"]) for row in rows] == KEPT
    assert [row["query_row"] for row in rows] == [0, 5]
    assert (made.rows, made.pairs, len(made.parts), made.by_id) == (6, 2, 2, False)
    assert {(row["query_row"], row["reason"]) for row in rejects} == {(1, "empty"), (2, "null"), (3, "null"), (4, "no positive")}
    assert next(row for row in rejects if row["query_row"] == 2)["detail"].startswith("column 'positive': None")


def test_a_csv_with_ids_of_positives(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text('anchor,positive_id\n"a, b",007\nc,\n')
    made, rows, rejects = written(tmp_path, tmp_path / "q.csv")
    assert [(row["anchor"], row["positive_ids"]) for row in rows] == [("a, b", ["007"])]
    assert made.by_id
    assert [row["query_row"] for row in rejects] == [1]


def test_beirs_judgements_say_what_is_positive(tmp_path: Path) -> None:
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps({"_id": f"q{n}", "text": f"text {n}"}) + "\n" for n in range(3)))
    (tmp_path / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td1\t1\nq0\td2\t0\nq0\td3\t2\nq2\td1\t0\n")
    made, rows, rejects = written(tmp_path, tmp_path / "queries.jsonl", qrels=str(tmp_path / "test.tsv"))
    assert [(row["anchor"], row["positive_ids"]) for row in rows] == [("text 0", ["d1", "d3"])]
    assert [row["query_id"] for row in rejects] == ["q1", "q2"]
    assert made.by_id


def test_lone_surrogates_are_rejects(tmp_path: Path) -> None:
    rows = [{"query": "\ud800", "positive": "p"}, {"query": "q", "positive": ["p", "\udfff"]}, {"query": "q", "positive": "p", "id": "\ud800"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"query": "q", "positive": "p", "id": 3}]))
    _, kept, rejects = written(tmp_path, tmp_path / "q.jsonl")
    assert [(row["query_row"], row["query_id"]) for row in kept] == [(3, "3")]
    assert [(row["query_row"], row["reason"], row["detail"].split(":")[0]) for row in rejects] == [
        (0, "not valid Unicode", "column 'query'"),
        (1, "not valid Unicode", "column 'positive'"),
        (2, "not valid Unicode", "column 'id'"),
    ]
    (tmp_path / "q.jsonl").write_text(json.dumps({"query": "q", "positive_id": ["\ud800"]}) + '\n{"query": "q", "positive_id": 7}')
    _, kept, rejects = written(tmp_path, tmp_path / "q.jsonl")
    assert [row["positive_ids"] for row in kept] == [["7"]]


@pytest.mark.parametrize(
    ("name", "text", "values", "words"),
    [
        ("q.jsonl", '{"query": "a", "answer": "b"}', {}, r"q\.jsonl has no column positive or pos or sent1 or positive_id.*name one of query, answer"),
        ("q.jsonl", '{"query": "a", "positive": "b"}', {"query_column": "qq"}, r"query_column: .*q\.jsonl has no column 'qq'; its columns are query, positive"),
        ("q.csv", "question,positive\na,b\n", {}, r"query_column: .*no column query or anchor or text or sent0 of the queries; name one of question, positive"),
        ("q.csv", "query,positive\na\n", {}, r"q\.csv line 2 has 1 fields, its heading 2"),
        ("q.jsonl", '{"query": "a", "positive": "b"}\n{', {}, r"q\.jsonl line 2 is not JSON"),
        ("q.jsonl", '{"query": "", "positive": "b"}', {}, r"none of 1 rows is a query with a positive: file .*q\.jsonl row 0: column 'query'"),
        ("q.parquet", "no Parquet", {}, r"q\.parquet cannot be read as Parquet"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, name: str, text: str, values: dict[str, Any], words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises((ConfigError, InputError), match=words):
        written(tmp_path, tmp_path / name, **values)
