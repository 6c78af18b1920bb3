"""From rows to prepared units: every row accounted for, and nothing lost on the way through Ray's object store."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmemb_ray.corpus.units import Unit
from llmemb_ray.pipeline.prepare import Prepared, ReadTask, prepare, prepare_unit
from llmemb_ray.shards.schema import REJECTS
from tests.small_jobs import Settled, settled, write


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Settled:
    """A job whose filter leaves out rows with ``kept`` false; its units are made by hand below."""
    root = tmp_path_factory.mktemp("prepare")
    write(root / "in" / "a.parquet", ["x", "y"], id=["1", "2"], kept=[True, True])
    return settled(root / "in", root / "out", model, filter="kept", keep_columns=["kept"], max_tokens=40)


texts = st.one_of(st.none(), st.sampled_from(["", " \n\t", "a plain text", "word " * 100, "naïve 数据 😀"]), st.text(max_size=30))
tables = st.lists(st.tuples(texts, st.booleans()), max_size=12)


@settings(max_examples=60, deadline=None)
@given(rows=tables, start=st.integers(0, 10**9))
def test_each_row_is_accepted_rejected_or_filtered_and_survives_the_envelope(ready: Settled, rows: list[tuple[str | None, bool]], start: int) -> None:
    table = pa.table(
        {
            "text": pa.array([text for text, _ in rows], pa.string()),
            "id": pa.array([f"id-{number}" for number in range(len(rows))], pa.string()),
            "kept": pa.array([kept for _, kept in rows], pa.bool_()),
        }
    )
    prepared = prepare_unit(ready.job, Unit(0, start, len(rows)), table)
    accepted = dict(zip(prepared.accepted["source_row"].to_pylist(), prepared.accepted["id"].to_pylist(), strict=True))
    rejected = dict(zip(prepared.rejected["source_row"].to_pylist(), prepared.rejected["id"].to_pylist(), strict=True))
    assert len(accepted) == prepared.accepted.num_rows
    assert accepted.keys() & rejected.keys() == set()
    assert accepted | rejected == {start + row: f"id-{row}" for row, (_, kept) in enumerate(rows) if kept}
    assert prepared.filtered == sum(not kept for _, kept in rows)
    assert {start + row for row, (text, kept) in enumerate(rows) if kept and (text is None or not text.strip())} <= rejected.keys()
    assert list(accepted) == sorted(accepted)
    assert prepared.accepted["n_tokens"].to_pylist() == prepared.tokens.lengths.tolist()
    assert max(prepared.tokens.lengths, default=0) <= 40

    again = Prepared.from_envelope(prepared.to_envelope())
    assert (again.unit, again.filtered, again.error, again.storage_retries) == (prepared.unit, prepared.filtered, None, prepared.storage_retries)
    assert again.accepted.equals(prepared.accepted)
    assert again.rejected.equals(prepared.rejected)
    for name in ("ids", "offsets", "truncated"):
        np.testing.assert_array_equal(getattr(again.tokens, name), getattr(prepared.tokens, name))


def test_the_tokens_are_those_of_the_whole_prompt(ready: Settled) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(ready.spec.tokenizer.json)
    prepared = prepare_unit(ready.job, Unit(0, 0, 3), pa.table({"text": ["a man", None, 'with "quotes"'], "id": ["a", "b", "c"], "kept": [True] * 3}))
    expected = [tokenizer.encode(f'This sentence : "{text}" means in one word:"').ids for text in ("a man", 'with "quotes"')]
    assert [prepared.tokens[row].tolist() for row in range(2)] == expected
    assert prepared.accepted["source_row"].to_pylist() == [0, 2]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_an_envelope_is_one_row_however_many_a_unit_has(ready: Settled, rows: int) -> None:
    unit = prepare_unit(
        ready.job,
        Unit(0, 0, rows),
        pa.table({"text": pa.array([""] * rows), "id": pa.array(["a"] * rows), "kept": pa.array([True] * rows)}).cast(
            pa.schema([("text", pa.string()), ("id", pa.string()), ("kept", pa.bool_())])
        ),
    )
    envelope = unit.to_envelope()
    assert envelope.num_rows == 1
    again = Prepared.from_envelope(pa.concat_tables([envelope, envelope]).slice(1))
    assert again.rejected["reason"].to_pylist() == ["empty"] * rows
    assert len(again.tokens) == 0


def test_a_failed_unit_carries_its_error_through_the_envelope() -> None:
    failed = Prepared(Unit(3, 40, 5), pa.table({}), REJECTS.empty_table(), storage_retries=2, error="file:///x.parquet is gone: “naïve”")
    again = Prepared.from_envelope(failed.to_envelope())
    assert (again.unit, again.error, again.storage_retries) == (Unit(3, 40, 5), failed.error, 2)


def test_a_reading_task_survives_json_with_its_partitions(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "year=2024" / "lang=d%C3%A9" / "a.parquet", ["a"] * 25)
    ready = settled(tmp_path / "in", tmp_path / "out", model, rows_per_unit=10, text_column="{year} {lang} {text}")
    for task in ready.tasks:
        assert ReadTask.from_json(task.to_json()).to_json() == task.to_json()
        back = ReadTask.from_json(task.to_json())
        assert (back.piece, back.wanted, back.file.url, back.file.partitions) == (task.piece, task.wanted, task.file.url, {"year": 2024, "lang": "dé"})
        for there, here in zip(prepare(ready.job, back), prepare(ready.job, task), strict=True):
            assert there.accepted.equals(here.accepted)


def test_only_the_wanted_units_are_prepared(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [f"text {row}" for row in range(40)], row_group_size=40)
    ready = settled(tmp_path / "in", tmp_path / "out", model, rows_per_unit=10)
    (task,) = ready.tasks
    wanted = frozenset(unit.name for unit in task.piece.units[1:4:2])
    found = list(prepare(ready.job, ReadTask(task.file, task.piece, wanted)))
    assert [unit.unit.start for unit in found] == [10, 30]
    assert [unit.accepted["source_row"].to_pylist() for unit in found] == [list(range(10, 20)), list(range(30, 40))]


def test_a_file_that_changed_after_planning_fails_each_of_its_units_by_name(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "in" / "a.parquet", ["a"] * 30)
    ready = settled(tmp_path / "in", tmp_path / "out", model, rows_per_unit=10)
    write(path, ["b"] * 31)
    found = ready.prepared()
    assert [unit.unit.start for unit in found] == [0, 10, 20]
    assert all("a.parquet changed after the run was planned" in str(unit.error) for unit in found)


def test_a_filter_that_breaks_on_a_row_fails_the_unit_and_not_the_process(tmp_path: Path, model: Path) -> None:
    """As a condition that casts does, where the plan's check against the empty table cannot know."""
    write(tmp_path / "in" / "a.parquet", ["a", "b", "c", "d"], number=["1", "2", "x", "4"], row_group_size=2)
    ready = settled(tmp_path / "in", tmp_path / "out", model, filter="CAST(number AS INTEGER) > 1", rows_per_unit=2)
    good, bad = ready.prepared()
    assert (good.error, good.accepted["source_row"].to_pylist(), good.filtered) == (None, [1], 1)
    assert "filter" in str(bad.error)
    assert "'x'" in str(bad.error)


def test_preparing_needs_neither_torch_nor_transformers_nor_ray(ready: Settled, tmp_path: Path) -> None:
    """CPU workers import it; torch alone would cost each of them seconds and hundreds of megabytes."""
    import pickle

    (tmp_path / "job.pickle").write_bytes(pickle.dumps((ready.job, ready.tasks)))
    script = """
import pickle, sys
from llmemb_ray.pipeline.prepare import prepare
job, tasks = pickle.load(open(sys.argv[1], "rb"))
units = [unit for task in tasks for unit in prepare(job, task)]
assert sum(unit.accepted.num_rows for unit in units) == 2, units
print([name for name in ("torch", "transformers", "ray", "peft", "bitsandbytes") if name in sys.modules])
"""
    done: Any = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "job.pickle")], capture_output=True, text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_filter_that_breaks_on_a_row_spares_the_other_units_of_its_row_group(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "a.parquet", ["a", "b", "c", "d"], number=["x", "2", "3", "4"], row_group_size=4)
    ready = settled(tmp_path / "in", tmp_path / "out", model, filter="CAST(number AS INTEGER) > 1", rows_per_unit=2)
    bad, good = ready.prepared()
    assert "'x'" in str(bad.error)
    assert (good.error, good.accepted["source_row"].to_pylist()) == (None, [2, 3])
