"""Collections as they are published, and their documents as Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from llmemb_ray.errors import InputError
from llmemb_ray.evaluation import beir
from llmemb_ray.evaluation.beir import Collection, Documents, prepare
from llmemb_ray.storage import Access

DOCUMENTS = [
    {"_id": "d1", "title": "Gold", "text": "a metal"},
    {"_id": "d2", "title": "", "text": "no title"},
    {"_id": 3, "text": "a number for an id", "metadata": {}},
    {"_id": "d4", "title": None, "text": "line\u2028separator"},
]
QUERIES = [{"_id": "q1", "text": "what is gold"}, {"_id": "q2", "text": "unjudged"}, {"_id": "q0", "text": "separators"}]
QRELS = "query-id\tcorpus-id\tscore\nq0\td4\t2\nq0\td1\t0\nq1\td1\t1\nq1\tgone\t1\n"


def lay_out(directory: Path, documents: list[Any] = DOCUMENTS, queries: list[Any] = QUERIES, qrels: str = QRELS, split: str = "test") -> Path:
    """A collection in BEIR's layout. Documents and queries that are strings are written as they are."""
    (directory / "qrels").mkdir(parents=True, exist_ok=True)
    for name, records in (("corpus.jsonl", documents), ("queries.jsonl", queries)):
        lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
        (directory / name).write_text("\n".join(lines) + "\n", "utf-8")
    (directory / "qrels" / f"{split}.tsv").write_text(qrels)
    return directory


def collection(directory: Path, split: str = "test") -> Collection:
    return beir.read(directory, directory.name, split)


def rows(documents: Documents) -> list[tuple[str, str, str]]:
    return [(row["id"], row["title"], row["text"]) for file in documents.files for row in pq.read_table(file).to_pylist()]


def test_only_judged_queries_are_read_in_the_order_of_their_file(tmp_path: Path) -> None:
    read = collection(lay_out(tmp_path / "metals"))
    assert list(read.queries.items()) == [("q1", "what is gold"), ("q0", "separators")]
    assert read.judgements == {"q0": {"d4": 2, "d1": 0}, "q1": {"d1": 1, "gone": 1}}
    assert read.ignore_identical_ids


def test_judgements_without_a_header_lose_no_line(tmp_path: Path) -> None:
    assert collection(lay_out(tmp_path, qrels="q1\td1\t1\nq0\td2\t1\n")).judgements == {"q1": {"d1": 1}, "q0": {"d2": 1}}


def test_documents_become_parquet_files_of_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beir, "PART_DOCUMENTS", 3)
    documents = prepare(collection(lay_out(tmp_path / "metals")), f"{tmp_path}/scratch", Access())
    assert [Path(file).name for file in documents.files] == ["part-00000.parquet", "part-00001.parquet"]
    assert rows(documents) == [("d1", "Gold", "a metal"), ("d2", "", "no title"), ("3", "", "a number for an id"), ("d4", "", "line\u2028separator")]
    assert documents.count == 4
    assert documents.known({"d1", "3", "gone"}) == {"d1", "3"}
    monkeypatch.setattr(beir, "PART_BYTES", 10)
    monkeypatch.setattr(beir, "FORMAT", 0)
    assert len(prepare(collection(tmp_path / "metals"), f"{tmp_path}/scratch", Access()).files) == 3, "11, 8 + 18 and 14 characters"


def test_documents_that_are_there_are_not_written_again_but_others_are(tmp_path: Path) -> None:
    directory, scratch = lay_out(tmp_path / "metals"), f"{tmp_path}/scratch"
    first = prepare(collection(directory), scratch, Access())
    written = {file: Path(file).stat().st_mtime_ns for file in first.files}
    again = prepare(collection(lay_out(directory)), scratch, Access())
    assert again.files == first.files, "the same content under a new time"
    assert {file: Path(file).stat().st_mtime_ns for file in again.files} == written
    other = prepare(collection(lay_out(directory, [*DOCUMENTS, {"_id": "d5", "text": "more"}])), scratch, Access())
    assert other.directory != first.directory
    assert (other.count, first.count) == (5, 4)


def test_a_preparation_that_was_stopped_is_made_again(tmp_path: Path) -> None:
    directory, scratch = lay_out(tmp_path / "metals"), f"{tmp_path}/scratch"
    first = prepare(collection(directory), scratch, Access())
    place = Path(first.files[0]).parent
    for kept in (beir.RECORD, "part-00000.parquet"):
        (place / kept).rename(tmp_path / "kept")
        assert rows(prepare(collection(directory), scratch, Access()))[0] == ("d1", "Gold", "a metal")
        assert {path.name for path in place.iterdir()} == {beir.RECORD, "part-00000.parquet"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"documents": [DOCUMENTS[0], "", '{"_id": "d2", "te']}, r"corpus\.jsonl line 3 is not JSON"),
        ({"documents": ["[1]"]}, r"corpus\.jsonl line 1 is no JSON object"),
        ({"documents": [{"text": "x"}]}, r"corpus\.jsonl line 1: _id is None"),
        ({"documents": [{"_id": "d1", "text": ["x"]}]}, r"line 1: text is no text but list"),
        ({"documents": ['{"_id": "d1", "text": "x\\ud800"}']}, r"line 1: text has half a surrogate pair at character 1"),
        ({"documents": [*DOCUMENTS, DOCUMENTS[1]]}, r"corpus\.jsonl: lines 2 and 5 have the same document id"),
        ({"documents": [""]}, r"corpus\.jsonl has no documents"),
        ({"queries": [*QUERIES, QUERIES[1]]}, r"queries\.jsonl line 4: the query 'q2' stands at line 2 already"),
        ({"queries": [QUERIES[0], {"_id": "q0", "text": " "}]}, r"queries\.jsonl line 2: a judged query without text"),
        ({"queries": QUERIES[:1]}, r"test\.tsv line 2 judges the query 'q0', which .*queries\.jsonl has not"),
        ({"qrels": "q1\td1\t1\nq1 d2 1\n"}, r"test\.tsv line 2 has 1 fields and not 3"),
        ({"qrels": "q1\td1\t1\nq1\td2\tyes\n"}, r"test\.tsv line 2: the gain 'yes' is no whole number"),
        ({"qrels": "q1\td1\t1\nq1\td1\t2\n"}, r"test\.tsv line 2: query 'q1' and document 'd1' are judged twice, 1 and 2"),
        ({"qrels": "query-id\tcorpus-id\tscore\n"}, r"test\.tsv has no judgements"),
    ],
)
def test_what_is_malformed_is_named_with_its_line(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(collection(lay_out(tmp_path / "metals", **changed)), f"{tmp_path}/scratch", Access())
    assert not list(tmp_path.glob(f"scratch/*/{beir.RECORD}"))


def test_collections_are_found_by_name_and_of_equal_names_by_path(tmp_path: Path) -> None:
    for place in ("metals", "nested/english", "nested/metals"):
        lay_out(tmp_path / place)
    (tmp_path / "something").mkdir()
    assert beir.find(tmp_path) == {"metals": tmp_path / "metals", "english": tmp_path / "nested/english", "nested/metals": tmp_path / "nested/metals"}
    assert beir.find(tmp_path / "metals") == {"metals": tmp_path / "metals"}


def test_collections_of_a_group_have_its_name(tmp_path: Path) -> None:
    expected = {f"cqadupstack/{name}": lay_out(tmp_path / "cqadupstack" / name) for name in ("android", "english")}
    assert beir.find(tmp_path) == beir.find(tmp_path / "cqadupstack") == expected


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    lay_out(tmp_path, split="dev")
    with pytest.raises(InputError, match=r"no judgements of the split 'test'; set --split to one of those it has: dev"):
        collection(tmp_path)
    with pytest.raises(InputError, match=r"is no collection for retrieval: looked for corpus\.jsonl"):
        collection(tmp_path / "qrels")


def write_cranfield(directory: Path, documents: str, qrels: str) -> Path:
    (directory / "cran.all.1400").write_text(documents)
    (directory / "cran.qry").write_text(".I 001\n.W\nhow do\nwings lift .\n.I 004\n.W\nwhat is drag .\n")
    (directory / "cranqrel").write_text(qrels)
    return directory


def test_cranfield_numbers_queries_by_their_order_and_turns_codes_into_gains(tmp_path: Path) -> None:
    documents = ".I 1\n.T\nlift .\n.A\nlee,x.\n.B\nj. 1\n.W\nlift .\n  of a\nwing .\n.I 2\n.T\n.A\n.B\n.W\n.I 3\n.T\n.A\n.B\n.W\nfirst\n.W\nsecond\n"
    read = collection(write_cranfield(tmp_path, documents, "1 1 1 \n1 2 2\n1 3 3\n2 1 4\n2 3 -1"))
    assert read.queries == {"1": "how do wings lift .", "2": "what is drag ."}
    assert read.judgements == {"1": {"1": 4, "2": 3, "3": 2}, "2": {"1": 1, "3": 4}}
    assert not read.ignore_identical_ids, "document 1 has nothing to do with query 1"
    assert rows(prepare(read, f"{tmp_path}/scratch", Access())) == [("1", "", "lift . of a wing ."), ("2", "", ""), ("3", "", "first second")]


@pytest.mark.parametrize(
    ("documents", "qrels", "message"),
    [
        (".I 1\n.W\nx\n", "3 1 1\n", r"cranqrel line 1 judges query '3'; .*cran\.qry has 2"),
        (".I 1\n.W\nx\n", "1 1 1\n1 1 5\n", r"cranqrel line 2: the code '5' is none of 1, 2, 3, 4, -1"),
        (".I 1\n.W\nx\n", "1 1\n", r"cranqrel line 1 has 2 fields and not 3"),
        ("x\n.I 1\n.W\nx\n", "1 1 1\n", r"cran\.all\.1400 line 1 is text before the first \.I"),
        (".I one\n.W\nx\n", "1 1 1\n", r"cran\.all\.1400 line 1: \.I is followed by 'one'"),
    ],
)
def test_malformed_smart_files_are_named_with_their_line(tmp_path: Path, documents: str, qrels: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(collection(write_cranfield(tmp_path, documents, qrels)), f"{tmp_path}/scratch", Access())


@pytest.mark.parametrize(
    ("name", "split", "documents", "queries", "judgements"),
    [
        ("scifact", "test", 5183, 300, 339),
        ("cranfield", "test", 1400, 225, 1837),  # wc counts 1836 lines: the last has no end.
        ("nfcorpus", "test", 3162, 323, 12334),
        ("nfcorpus", "dev", 3193, 324, 11385),
    ],
)
def test_published_collections_have_their_published_sizes(
    data: Path, tmp_path: Path, name: str, split: str, documents: int, queries: int, judgements: int
) -> None:
    read = collection(data / name, split)
    prepared = prepare(read, f"{tmp_path}/scratch", Access())
    assert (prepared.count, len(read.queries)) == (documents, queries)
    assert sum(len(gains) for gains in read.judgements.values()) == judgements
    judged = {document for gains in read.judgements.values() for document in gains}
    assert prepared.known(judged) == judged
