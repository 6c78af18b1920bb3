"""Verify finds each kind of damage at the level that promises to, names the file or the unit, and finds nothing in a sound run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import llmemb_ray
from llmemb_ray.errors import CheckFailed
from llmemb_ray.shards import commits as commit_records
from llmemb_ray.shards import schema
from llmemb_ray.shards.commits import Commit
from llmemb_ray.shards.receipt import PATH as RECEIPT
from llmemb_ray.shards.receipt import make_receipt
from llmemb_ray.shards.verify import Level, verify
from tests.shards.conftest import Finished
from tests.small_jobs import vectors_of

LEVELS: tuple[Level, ...] = ("quick", "sample", "full")


def problems(finished: Finished, level: Level = "full", **options: Any) -> list[str]:
    return verify(finished.run, level=level, **options).problems


def edit_commits(finished: Finished, change: Callable[[Commit], Commit]) -> None:
    """Rewrites the compacted commits and nothing else."""
    run = finished.run
    commit_records.compact(run.storage, [change(commit) for commit in run.commits])


def edit_commit(finished: Finished, place: int, **changes: Any) -> str:
    unit = finished.run.commits[place].unit
    edit_commits(finished, lambda commit: replace(commit, **changes) if commit.unit == unit else commit)
    return unit


def rewrite(finished: Finished, place: int, change: Callable[[pa.Table], pa.Table], kind: str = "shard", **changes: Any) -> str:
    """A file of the run written anew, with commit and receipt made to agree with it: what a bug in the writer would leave."""
    run = finished.run
    commit = run.commits[place]
    path = getattr(commit, kind)
    table = change(pq.read_table(finished.output / path))
    metadata = schema.metadata_of(table.schema)
    data = schema.encode_shard(table, metadata, vector_bytes=run.plan.dimension * 4) if kind == "shard" else schema.encode_rejects(table, metadata)
    (finished.output / path).write_bytes(data)
    edit_commit(finished, place, **({f"{kind}_sha256": hashlib.sha256(data).hexdigest(), f"{kind}_bytes": len(data)} | changes))
    again = finished.run
    make_receipt(again.plan, again.commits, seconds_wall=0, versions={}, finished=0).save(again.storage)
    return str(path)


def with_vectors(table: pa.Table, vectors: np.ndarray) -> pa.Table:
    place = table.column_names.index("embedding")
    return table.set_column(place, "embedding", schema.embedding_column(vectors, "float32"))


def with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values, table.schema.field(name).type))


def assert_one(found: list[str], *parts: str) -> None:
    assert any(all(part in problem for part in parts) for problem in found), found


# -- a sound run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_a_sound_run_is_sound(finished: Finished, level: Level) -> None:
    findings = verify(finished.run, level=level, against=[str(finished.corpus)])
    assert findings.problems == []
    assert findings.sound
    findings.require()
    assert (findings.units, findings.rows_embedded, findings.rows_rejected, findings.against_rows) == (4, 46, 2, 48)
    assert findings.units_read == (0 if level == "quick" else 4)
    assert findings.duplicate_ids == (0 if level == "full" else None)


def test_an_unfinished_run_is_told_what_it_lacks(finished: Finished) -> None:
    finished.run.storage.delete([RECEIPT])
    found = problems(finished)
    assert_one(found, "not finished", "run the embed command again")
    edit_commits(finished, lambda commit: commit)
    left = finished.run.commits[:-1]
    commit_records.compact(finished.run.storage, left)
    assert_one(problems(finished, "quick"), "000001-000000000012 has no commit")


def test_findings_raise_with_what_was_found(finished: Finished) -> None:
    (finished.output / "data" / "stray.parquet").write_bytes(b"x")
    with pytest.raises(CheckFailed, match=r"(?s)is not sound, 1 problems:\n  data/stray\.parquet is named by no commit"):
        verify(finished.run).require()


# -- files that changed ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shard", "rejects"])
def test_a_flipped_byte_is_found_where_contents_are_read(finished: Finished, kind: str) -> None:
    path = getattr(finished.run.commits[0], kind)
    data = bytearray((finished.output / path).read_bytes())
    data[len(data) // 2] ^= 1
    (finished.output / path).write_bytes(data)
    assert problems(finished, "quick") == []
    for level in LEVELS[1:]:
        assert problems(finished, level) == [f"{path} does not have the checksum of its commit: its content changed"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["shard", "rejects"])
def test_a_missing_file_is_found(finished: Finished, level: Level, kind: str) -> None:
    path = getattr(finished.run.commits[2], kind)
    (finished.output / path).unlink()
    assert problems(finished, level) == [f"{path} is named by a commit but is not there"]


@pytest.mark.parametrize("level", LEVELS)
def test_a_file_of_another_size_is_found(finished: Finished, level: Level) -> None:
    path = finished.run.commits[3].shard
    with open(finished.output / str(path), "ab") as file:
        file.write(b"more")
    assert_one(problems(finished, level), f"{path} has ", "bytes, its commit says")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("directory", ["data", "rejects"])
def test_a_stray_file_is_found(finished: Finished, level: Level, directory: str) -> None:
    (finished.output / directory / "000000-000000000000-ffffffffffff.parquet").write_bytes(b"left behind")
    assert problems(finished, level) == [f"{directory}/000000-000000000000-ffffffffffff.parquet is named by no commit"]


def test_a_shard_of_another_run_in_the_place_of_ours_is_found(finished: Finished, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    llmemb_ray.embed(str(finished.corpus), str(other), model=str(model), actors="0", quiet=True, rows_per_unit=12, pooling="mean")
    ours, theirs = finished.run.commits[1], llmemb_ray.open_run(str(other)).commits[1]
    shutil.copy(other / str(theirs.shard), finished.output / str(ours.shard))
    assert_one(problems(finished, "sample"), str(ours.shard), "does not have the checksum of its commit")
    edit_commit(finished, 1, shard_sha256=theirs.shard_sha256, shard_bytes=theirs.shard_bytes)
    found = problems(finished, "full")
    for field in ("run_key", "space", "attempt"):
        assert_one(found, str(ours.shard), f"its metadata has {field} ")


# -- records that changed ----------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("change", [{"embedded": 12}, {"rejected": 5}, {"rows": 13}, {"rows": 10**15}, {"filtered": 1}])
def test_edited_counts_of_a_commit_are_found(finished: Finished, level: Level, change: dict[str, int]) -> None:
    unit = edit_commit(finished, 0, **change)
    assert_one(problems(finished, level), unit)


@pytest.mark.parametrize("change", [{"embedded": 10, "rejected": 2}, {"embedded": 11, "rejected": 0, "filtered": 1}])
def test_counts_that_balance_but_are_not_those_of_the_files_are_found(finished: Finished, change: dict[str, int]) -> None:
    unit = edit_commit(finished, 0, **change)
    assert_one(problems(finished, "quick"), "the receipt says rows_rejected 2")
    again = finished.run
    make_receipt(again.plan, again.commits, seconds_wall=0, versions={}, finished=0).save(again.storage)
    assert_one(problems(finished, "sample"), unit)


@pytest.mark.parametrize("level", LEVELS)
def test_a_commit_that_belongs_to_no_unit_is_found(finished: Finished, level: Level) -> None:
    edit_commit(finished, 0, unit="000000-000000000003", start=3)
    assert_one(problems(finished, level), "000000-000000000003", "unit 000000-000000000000 has no commit")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "change",
    [
        {"rows_embedded": 47},
        {"rows_read": 40},
        {"units": 5},
        {"tokens": 1},
        {"run_key": "0" * 64},
        {"rejects_by_reason": {"null": 1}},
        {"truncated": 9},
        {"dimension": 3},
        {"bad_files": {"/x": "gone"}},
    ],
)
def test_an_edited_receipt_is_found(finished: Finished, level: Level, change: dict[str, Any]) -> None:
    path = finished.output / RECEIPT
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (name,) = change
    assert_one(problems(finished, level), f"the receipt says {name} ")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("path", [RECEIPT, commit_records.COMPACTED])
def test_a_broken_record_is_found_and_does_not_stop_the_check(finished: Finished, level: Level, path: str) -> None:
    data = (finished.output / path).read_bytes()
    (finished.output / path).write_bytes(data[: len(data) // 2])
    assert_one(problems(finished, level), path)


# -- wrong contents under right checksums ------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 2.0])
def test_a_vector_that_is_not_one_is_found(finished: Finished, value: float) -> None:
    def spoil(table: pa.Table) -> pa.Table:
        vectors = vectors_of(table["embedding"]).copy()
        vectors[3] = vectors[3] * value if value == 2.0 else value
        return with_vectors(table, vectors)

    path = rewrite(finished, 1, spoil)
    assert problems(finished, "quick") == []
    said = {2.0: "1 vectors are not normalised, that of source row 15", 0.0: "1 vectors are zero"}.get(
        value, "1 vectors hold NaN or infinity, that of source row 15"
    )
    assert_one(problems(finished, "sample"), path, said)


def test_vectors_of_another_shape_or_precision_or_null_are_found(finished: Finished) -> None:
    whole = pq.read_table(finished.output / str(finished.run.commits[1].shard))
    vectors = vectors_of(whole["embedding"])
    path = rewrite(finished, 1, lambda table: with_vectors(table, vectors[:, :8]))
    assert_one(problems(finished), path, "the run writes 32 dimensions of float32")
    half = schema.embedding_column(vectors, "float16")
    rewrite(finished, 1, lambda table: table.set_column(table.column_names.index("embedding"), "embedding", half))
    assert_one(problems(finished), path, "the run writes 32 dimensions of float32")
    full = schema.embedding_column(vectors, "float32")
    holes = pa.FixedSizeListArray.from_arrays(full.values, 32, mask=pa.array([True] + [False] * (len(vectors) - 1)))
    rewrite(finished, 1, lambda table: table.set_column(table.column_names.index("embedding"), "embedding", holes))
    assert_one(problems(finished), path, "1 vectors are null")


def test_a_missing_row_is_found(finished: Finished) -> None:
    path = rewrite(finished, 1, lambda table: table.filter(pc.not_equal(table["source_row"], 14)))
    found = problems(finished, "sample")
    assert_one(found, path, "has 11 rows, its commit says 12")
    assert_one(found, "unit 000000-000000000012: 1 source rows are neither in data nor in rejects")


def test_a_doubled_row_is_found(finished: Finished) -> None:
    rewrite(finished, 1, lambda table: with_column(table, "source_row", [12, 12, *range(14, 24)]))
    found = problems(finished)
    assert_one(found, "unit 000000-000000000012: source row 12 stands twice in data and rejects")
    assert_one(found, "unit 000000-000000000012: 1 source rows are neither")


def test_a_row_in_data_and_in_rejects_is_found(finished: Finished) -> None:
    rewrite(finished, 0, lambda table: with_column(table, "source_row", [3]), kind="rejects")
    assert_one(problems(finished), "unit 000000-000000000000: source row 3 stands twice in data and rejects")


def test_rows_of_another_unit_or_file_are_found(finished: Finished) -> None:
    path = rewrite(finished, 1, lambda table: with_column(table, "source_row", list(range(24, 36))))
    assert_one(problems(finished), path, "has rows outside its unit 000000-000000000012")
    path = rewrite(finished, 2, lambda table: with_column(table, "source_file", [0] * table.num_rows))
    assert_one(problems(finished), path, "has rows of another source file")


def test_a_shard_without_a_column_is_found(finished: Finished) -> None:
    path = rewrite(finished, 1, lambda table: table.drop_columns(["id", "n_tokens"]))
    assert_one(problems(finished, "sample"), path, "lacks the columns id, n_tokens")


def test_a_shard_that_is_no_parquet_under_its_own_checksum_is_found(finished: Finished) -> None:
    path = finished.output / str(finished.run.commits[0].shard)
    path.write_bytes(b"PAR1 nothing PAR1")
    edit_commit(finished, 0, shard_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    assert_one(problems(finished), path.name, "cannot be read")


def test_a_commit_that_names_no_shard_for_its_rows_is_found(finished: Finished) -> None:
    unit = edit_commit(finished, 1, shard=None)
    assert_one(problems(finished), f"commit {unit} counts 12 rows but names no file for them")


# -- ids ---------------------------------------------------------------------------------------------


def test_ids_in_several_rows_are_found_across_units_and_can_be_allowed(finished: Finished) -> None:
    rewrite(finished, 1, lambda table: with_column(table, "id", ["1-20", "1-20", "1-21", *table["id"].to_pylist()[3:]]))
    findings = verify(finished.run, level="full")
    assert findings.duplicate_ids == 2
    assert_one(findings.problems, "2 ids stand in more than one row", "GROUP BY id HAVING count(*) > 1", "allow_duplicate_ids")
    assert problems(finished, "sample") == []
    allowed = verify(finished.run, level="full", allow_duplicate_ids=True)
    assert allowed.sound
    assert allowed.notes
    assert "2 ids stand" in allowed.notes[0]


@pytest.mark.parametrize(
    "ids",
    [list(range(40)), [b"\xff%d" % n for n in range(40)], [None] * 40, [n if n % 2 else None for n in range(40)]],
    ids=["int", "bytes", "null", "some null"],
)
def test_ids_of_any_type_are_told_apart(ids: list[Any], model: Path, tmp_path: Path) -> None:
    type_ = pa.int64() if any(isinstance(id_, int) for id_ in ids) else pa.binary()
    pq.write_table(pa.table({"id": pa.array(ids, type_), "text": [f"text {n}" for n in range(40)]}), tmp_path / "x.parquet")
    receipt = llmemb_ray.embed(str(tmp_path / "x.parquet"), str(tmp_path / "out"), model=str(model), actors="0", quiet=True)
    findings = verify(llmemb_ray.open_run(str(tmp_path / "out")), against=[str(tmp_path / "x.parquet")])
    assert findings.problems == []
    assert findings.duplicate_ids == 0
    assert receipt.null_ids == ids.count(None)
    assert any("null id" in note for note in findings.notes) == (None in ids)


# -- against the corpus ------------------------------------------------------------------------------


def copied(finished: Finished, tmp_path: Path) -> Path:
    shutil.copytree(finished.corpus, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    return tmp_path / "elsewhere"


def test_a_moved_copy_of_the_corpus_is_the_corpus(finished: Finished, tmp_path: Path) -> None:
    findings = verify(finished.run, level="quick", against=[str(copied(finished, tmp_path))])
    assert findings.problems == []
    assert findings.against_rows == 48


def rewritten(path: Path, **changes: list[Any]) -> None:
    table = pq.read_table(path)
    for name, values in changes.items():
        table = with_column(table, name, values)
    pq.write_table(table, path, row_group_size=12)


def test_a_row_with_another_id_is_found(finished: Finished, tmp_path: Path) -> None:
    corpus = copied(finished, tmp_path)
    ids = [f"1-{row}" for row in range(24)]
    rewritten(corpus / "1.parquet", id=[*ids[:5], "5-1", "6-1", *ids[7:]])
    found = problems(finished, "quick", against=[str(corpus)])
    assert_one(found, finished.run.commits[2].shard or "", "source row 6 has id '1-6', the corpus has '6-1' there")
    assert_one(found, finished.run.commits[2].rejects or "", "source row 5 has id '1-5', the corpus has '5-1' there")


def test_a_changed_text_is_found_by_the_file(finished: Finished, tmp_path: Path) -> None:
    """Of the rows only ids are compared; the file itself has another size, and in its old place another time."""
    corpus = copied(finished, tmp_path)
    rewritten(corpus / "1.parquet", text=["changed to something much longer than it was"] + ["x"] * 23)
    assert_one(problems(finished, "quick", against=[str(corpus)]), f"{corpus}/1.parquet is not the file that was embedded")


def test_a_corpus_changed_in_its_place_is_found(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"id": ["a", "b"], "text": ["one", "two"]}), path)
    llmemb_ray.embed(str(path), str(tmp_path / "out"), model=str(model), actors="0", quiet=True)
    run = llmemb_ray.open_run(str(tmp_path / "out"))
    assert verify(run, against=[str(path)]).problems == []
    os.utime(path, (5, 5))
    assert_one(verify(run, against=[str(path)]).problems, f"{path} is not the file that was embedded", "now it has", "mtime:5.0")


def test_files_and_rows_too_many_or_too_few_are_found(finished: Finished, tmp_path: Path) -> None:
    corpus = copied(finished, tmp_path)
    shutil.copyfile(corpus / "1.parquet", tmp_path / "extra.parquet")
    found = problems(finished, "quick", against=[str(finished.corpus), str(tmp_path / "extra.parquet")])
    assert found == [f"{tmp_path}/extra.parquet is in the corpus but not in the run"]
    found = problems(finished, "quick", against=[str(finished.corpus / "0.parquet")])
    assert found == [f"{finished.corpus}/1.parquet is in the run but not in the corpus"]
    pq.write_table(pq.read_table(corpus / "1.parquet").slice(0, 20), corpus / "1.parquet", row_group_size=12)
    assert_one(problems(finished, "quick", against=[str(corpus)]), "1.parquet has 20 rows in 2 row groups, the run was planned for 24 in 2")


def test_a_broken_file_of_the_corpus_is_found(finished: Finished, tmp_path: Path) -> None:
    corpus = copied(finished, tmp_path)
    (corpus / "0.parquet").write_bytes(b"no parquet")
    assert_one(problems(finished, "quick", against=[str(corpus)]), f"{corpus}/0.parquet is not a whole Parquet file")


def test_a_corpus_with_files_left_out_limits_and_filters_is_sound_moved_or_not(model: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "0.parquet").write_bytes(b"")
    for file in (1, 2):
        pq.write_table(pa.table({"id": list(range(30)), "text": [f"text {row}" for row in range(30)]}), corpus / f"{file}.parquet", row_group_size=10)
    options = {"skip_bad_files": True, "limit_rows": 45, "filter": "id % 3 > 0", "rows_per_unit": 7}
    receipt = llmemb_ray.embed(str(corpus), str(tmp_path / "out"), model=str(model), actors="0", quiet=True, **options)
    assert (receipt.rows_embedded, receipt.rows_filtered) == (30, 15)
    shutil.copytree(corpus, tmp_path / "moved")
    for place in (corpus, tmp_path / "moved"):
        findings = verify(llmemb_ray.open_run(str(tmp_path / "out")), against=[str(place)], allow_duplicate_ids=True)
        assert findings.problems == []
        assert findings.against_rows == 45
        assert any("left out" in note and "0.parquet is empty (0 bytes)" in note for note in findings.notes)
