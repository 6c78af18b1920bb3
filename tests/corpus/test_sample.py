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
    taken = rows_of(sample.places(files, 320, passed_over=0))
    assert len(taken) == 320
    assert {file for file, _ in taken} == set(range(8))
    assert len({(file, row // 1000) for file, row in taken}) == 32
    assert all(row % 1000 < 10 for _, row in taken), "the beginning of a row group is read, not more"


def test_one_large_row_group_gives_rows_from_all_over_it_where_that_is_worth_the_reading() -> None:
    files = [PlannedFile(index=0, url="x", size=1, version="v", group_rows=(640_000,), rows=640_000)]
    near, far = (rows_of(sample.places(files, 320, passed_over=rows)) for rows in (sample.PASSED_OVER, 10**9))
    assert {row for _, row in near} == set(range(320)), "20,000 rows would have to be passed over"
    assert {row // 20_000 for _, row in far} == set(range(32))


def test_what_a_sample_of_one_row_group_fetches_is_little_and_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of random letters, which hardly shrink: 12 MB in one row group."""
    import random

    from llmemb_ray.storage import Storage

    random.seed(0)
    texts = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=600)) for _ in range(30_000)]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": texts}), tmp_path / "in" / "a.parquet", row_group_size=30_000, use_dictionary=False)
    files = planned(tmp_path / "in")
    fetched: list[int] = []
    plain = Storage.read_range

    def counted(storage: Storage, path: str, start: int, end: int) -> bytes:
        fetched.append(end - start)
        return plain(storage, path, start, end)

    monkeypatch.setattr(Storage, "read_range", counted)
    table = sample.read(sample.places(files, 640, passed_over=0), Selection(text="text"), Access())
    assert table["text"].to_pylist() == texts[:640]
    assert sum(fetched) < files[0].size / 3, "the beginning"
    fetched.clear()
    table = sample.read(sample.places(files, 640), Selection(text="text"), Access())
    assert table["text"].to_pylist() == [texts[row] for _, row in rows_of(sample.places(files, 640))]
    assert sum(fetched) < files[0].size * 1.3, "all of it, once, though 32 places lie in it"


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
