"""Samples: spread over the corpus, of the size asked for, the same every time, each row at most once."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmemb_ray.corpus import files as corpus_files
from llmemb_ray.corpus import sample
from llmemb_ray.corpus.columns import Selection
from llmemb_ray.corpus.files import Footer
from llmemb_ray.corpus.units import PlannedFile
from llmemb_ray.errors import InputError
from llmemb_ray.storage import Access


def planned(directory: Path) -> list[PlannedFile]:
    found = corpus_files.discover([str(directory)], Access())
    footers = corpus_files.footers(found, Access())
    files = []
    for index, (file, footer) in enumerate(zip(found, footers, strict=True)):
        assert isinstance(footer, Footer)
        files.append(PlannedFile(index=index, url=file.url, size=file.size, version=file.version, group_rows=footer.group_rows, rows=footer.rows))
    return files


def rows_of(places: list[sample.Place]) -> list[tuple[int, int]]:
    return [(place.file.index, row) for place in places for row in range(place.start, place.start + place.rows)]


FILES = st.lists(st.lists(st.integers(1, 40), max_size=6), min_size=1, max_size=6)


@given(groups=FILES, rows=st.integers(1, 200))
def test_each_row_at_most_once_as_many_as_asked_for_and_inside_the_row_groups_named(groups: list[list[int]], rows: int) -> None:
    files = [PlannedFile(index=index, url="x", size=1, version="v", group_rows=tuple(sizes), rows=sum(sizes)) for index, sizes in enumerate(groups)]
    total = sum(file.rows for file in files)
    places = sample.places(files, rows)
    taken = rows_of(places)
    assert len(set(taken)) == len(taken)
    assert taken == sorted(taken)
    if total <= rows:
        assert len(taken) == total
    else:
        assert min(rows, total) * 0.5 <= len(taken) <= rows + sample.PLACES
    for place in places:
        sizes = groups[place.file.index]
        assert place.first == sum(sizes[: place.groups[0]])
        assert place.first <= place.start
        assert place.start + place.rows <= place.first + sum(sizes[group] for group in place.groups)


def test_a_sample_comes_from_all_over_the_corpus() -> None:
    files = [PlannedFile(index=index, url="x", size=1, version="v", group_rows=(1000,) * 10, rows=10_000) for index in range(8)]
    taken = rows_of(sample.places(files, 320))
    assert len(taken) == 320
    assert {file for file, _ in taken} == set(range(8))
    assert len({(file, row // 1000) for file, row in taken}) == 32
    assert all(row % 1000 < 10 for _, row in taken), "the beginning of a row group is read, not more"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """The same text as text, as bytes, as dictionary and as nothing but nulls; one file with a partition in its path."""
    columns = {
        "a": pa.array(["text a0", "text a1"]),
        "b": pa.array([b"text b0", b"\xff"], pa.binary()),
        "c": pa.array(["text c0", "text c0"]).dictionary_encode(),
        "d": pa.nulls(2),
    }
    for name, column in columns.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": column, "n": [1, 2]}), tmp_path / "in" / f"{name}.parquet")
    return tmp_path / "in"


def test_files_that_hold_text_in_different_types_are_read_together(mixed: Path) -> None:
    files = planned(mixed)
    selection = Selection(text="text")
    table = sample.read(sample.places(files, 100), selection, Access())
    texts, problems = selection.texts(table)
    assert texts == ["text a0", "text a1", "text b0", None, "text c0", "text c0", None, None]
    assert {row: reason for row, (reason, _) in problems.items()} == {3: "undecodable", 6: "null", 7: "null"}
    assert table[sample.SOURCE_FILE].to_pylist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert table[sample.SOURCE_ROW].to_pylist() == [0, 1] * 4


def test_a_filter_holds_for_the_sample_too(mixed: Path) -> None:
    table = sample.read(sample.places(planned(mixed), 100), Selection(text="text", filter="n = 2"), Access())
    assert table[sample.SOURCE_ROW].to_pylist() == [1] * 4


def test_a_file_that_changed_is_refused_by_name(mixed: Path) -> None:
    places = sample.places(planned(mixed), 100)
    pq.write_table(pa.table({"text": ["longer than before"] * 9, "n": [1] * 9}), mixed / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet changed after the run was planned"):
        sample.read(places, Selection(text="text"), Access())
