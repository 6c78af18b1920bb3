"""The plan in OUT: comes back as it was, refuses to be altered, and tells run keys apart field by field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmemb_ray.errors import OutputError, RunMismatch, StorageError
from llmemb_ray.shards.plan import FILES as FILES_OF
from llmemb_ray.shards.plan import RECORD, Plan
from llmemb_ray.storage import Access, Storage
from tests.faulty_fs import FAULTS
from tests.shards.small_plan import small_plan

FILES = FILES_OF.format(generation=0)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def test_a_plan_comes_back_as_it_was(storage: Storage) -> None:
    plan = small_plan()
    plan.save(storage)
    loaded = Plan.load(storage)
    assert loaded == plan
    assert loaded is not None
    assert list(loaded.units()) == list(plan.units())
    assert (loaded.run_key, loaded.space_digest, loaded.rows) == (plan.run_key, plan.space_digest, 55)
    assert loaded.representation == plan.representation
    assert [file.url for file in loaded.bad_files] == ["/in/c.parquet"]


def test_there_is_no_plan_where_none_was_saved_or_only_its_first_half(storage: Storage, tmp_path: Path) -> None:
    assert Plan.load(storage) is None
    FAULTS.set(at=1, operations=("write",), path="plan.json", times=100)
    try:
        with pytest.raises(StorageError):
            small_plan().save(Storage(f"faulty://{tmp_path}", Access(retry_seconds=0.01)))
    finally:
        FAULTS.clear()
    assert storage.exists(FILES)
    assert Plan.load(storage) is None


@pytest.mark.parametrize(
    "change",
    [
        {"engine": {"backend": "hf"}},
        {"run_key": "0" * 64},
        {"dimension": 5},
        {"selection": {"text": "text", "id": None, "keep": [], "filter": None}},
        {"role": "query"},
    ],
)
def test_an_altered_record_is_refused(storage: Storage, change: dict[str, Any]) -> None:
    small_plan().save(storage)
    storage.put(RECORD, json.dumps(json.loads(storage.read(RECORD)) | change).encode())
    with pytest.raises(OutputError, match=r"_llmemb/plan/plan\.json was altered since the run began; put back the file as it was, or use another output"):
        Plan.load(storage)


def test_altered_files_are_refused(storage: Storage) -> None:
    small_plan().save(storage)
    table = pq.read_table(pa.BufferReader(storage.read(FILES)))
    sink = pa.BufferOutputStream()
    pq.write_table(table.set_column(table.column_names.index("rows_per_unit"), "rows_per_unit", pa.array([15, 10, 1])), sink)
    storage.put(FILES, sink.getvalue().to_pybytes())
    with pytest.raises(OutputError, match=r"_llmemb/plan/files-0\.parquet was altered"):
        Plan.load(storage)


def test_a_record_that_is_no_json_or_of_another_layout_is_refused(storage: Storage) -> None:
    small_plan().save(storage)
    record = json.loads(storage.read(RECORD))
    storage.put(RECORD, b"{half")
    with pytest.raises(OutputError, match=r"plan\.json is not JSON: .*put back the file"):
        Plan.load(storage)
    for other in (record | {"format": 1}, [], {}):
        storage.put(RECORD, json.dumps(other).encode())
        with pytest.raises(OutputError, match=r"was written with layout (1|None); this version of llmemb_ray reads layout 2"):
            Plan.load(storage)


def test_settings_that_decide_nothing_leave_the_run_key_alone() -> None:
    plan = small_plan()
    for change in ({"settings": {"quiet": True}}, {"versions": {"torch": "3"}}, {"created": 1.0}, {"model_name": "the same under another name"}):
        assert replace(plan, **change).run_key == plan.run_key


def test_another_run_key_is_told_field_by_field() -> None:
    stored = small_plan()
    representation = stored.space["representation"] | {"pooling": "mean"}
    asked = replace(stored, space=stored.space | {"representation": representation}, engine=stored.engine | {"dtype": "float16"})
    stored.require_same(small_plan(), "OUT")
    with pytest.raises(RunMismatch) as caught:
        stored.require_same(asked, "OUT")
    assert str(caught.value).splitlines() == [
        "OUT holds a run with another run key:",
        '  engine.dtype: the run there has "float32", asked for now "float16"',
        '  space.representation.pooling: the run there has "last", asked for now "mean"',
        "Use another output, repeat the settings of that run, or delete it with overwrite.",
    ]


def test_long_values_are_cut_in_the_message() -> None:
    stored = small_plan()
    with pytest.raises(RunMismatch) as caught:
        stored.require_same(replace(stored, corpus=stored.corpus | {"filter": "x" * 5000}), "OUT")
    assert len(str(caught.value)) < 600
