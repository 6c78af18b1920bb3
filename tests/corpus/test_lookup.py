"""Texts read back: of just these rows, from the very file that was embedded, or the reason why not."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmemb_ray.corpus.columns import Selection
from llmemb_ray.corpus.lookup import texts_at
from llmemb_ray.corpus.units import PlannedFile
from llmemb_ray.storage import Access
from tests.corpus.test_sample import planned


@pytest.fixture
def files(tmp_path: Path) -> list[PlannedFile]:
    (tmp_path / "in").mkdir()
    for number in range(2):
        texts: list[str | None] = [f"text {number} {row}" for row in range(50)]
        texts[7] = None
        titles = [f"title {row}" for row in range(50)]
        table = pa.table({"meta": pa.StructArray.from_arrays([pa.array(texts)], ["body"]), "text": texts, "title": titles})
        pq.write_table(table, tmp_path / "in" / f"{number}.parquet", row_group_size=15)
    return planned(tmp_path / "in")


def test_the_rows_asked_for_and_no_others(files: list[PlannedFile]) -> None:
    wanted = [(1, 49), (0, 0), (0, 14), (0, 15), (1, 3)]
    found = texts_at(files, Selection(text="text"), Access(), wanted)
    assert found.texts == {(file, row): f"text {file} {row}" for file, row in wanted}
    assert found.missing == {}
    assert texts_at(files, Selection(text="text"), Access(), []).texts == {}


def test_texts_are_made_as_for_embedding(files: list[PlannedFile]) -> None:
    assert texts_at(files, Selection(text="{title}: {text}"), Access(), [(0, 20)]).texts == {(0, 20): "title 20: text 0 20"}
    assert texts_at(files, Selection(text="meta.body"), Access(), [(1, 20)]).texts == {(1, 20): "text 1 20"}


def test_a_row_without_a_text_and_one_that_is_not_there_say_so(files: list[PlannedFile]) -> None:
    found = texts_at(files, Selection(text="text"), Access(), [(0, 7), (0, 50)])
    assert found.missing == {(0, 7): "the text is null", (0, 50): f"{files[0].url} has no such row"}


def test_files_that_are_gone_changed_or_broken_leave_the_others_alone(files: list[PlannedFile]) -> None:
    Path(files[0].url).unlink()
    found = texts_at(files, Selection(text="text"), Access(), [(0, 1), (1, 1)])
    assert found.texts == {(1, 1): "text 1 1"}
    assert "0.parquet is gone since the run was planned" in found.missing[0, 1]
    Path(files[1].url).write_bytes(b"PAR1 something else")
    found = texts_at(files, Selection(text="text"), Access(), [(1, 1)])
    assert "1.parquet changed after the run was planned" in found.missing[1, 1]
