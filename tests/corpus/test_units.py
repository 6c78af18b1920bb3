"""Units cover a file's rows once, stay within their size, and follow from the row groups alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmemb_ray.corpus.units import MAX_ROWS, SHARD_BYTES, UNIT_SECONDS, UNIT_TEXT_BYTES, PlannedFile, Unit, rows_per_unit

GROUPS = st.lists(st.integers(0, 60), max_size=12).map(tuple)


def planned(groups: tuple[int, ...], size: int, rows: int | None = None) -> PlannedFile:
    return PlannedFile(index=3, url="x", size=1, version="v", group_rows=groups, rows=sum(groups) if rows is None else rows, rows_per_unit=size)


@given(groups=GROUPS, size=st.integers(1, 80), data=st.data())
def test_each_row_is_in_one_unit(groups: tuple[int, ...], size: int, data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, sum(groups)))
    file = planned(groups, size, rows)
    position = 0
    for unit in file.units():
        assert (unit.file, unit.start) == (3, position)
        assert unit.rows >= 1
        position += unit.rows
    assert position == rows
    assert list(file.units()) == list(planned(groups, size, rows).units())


@given(groups=GROUPS, size=st.integers(1, 80))
def test_units_are_no_larger_than_asked_and_hardly_smaller_than_they_could_be(groups: tuple[int, ...], size: int) -> None:
    for piece in planned(groups, size).pieces():
        sizes = [unit.rows for unit in piece.units]
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == -(-sum(sizes) // size)


@given(groups=GROUPS, size=st.integers(1, 80), data=st.data())
def test_a_piece_is_whole_row_groups_and_each_group_is_read_once(groups: tuple[int, ...], size: int, data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, sum(groups)))
    read: list[int] = []
    for piece in planned(groups, size, rows).pieces():
        first = piece.groups[0]
        assert piece.start == sum(groups[:first])
        assert piece.groups == tuple(range(first, first + len(piece.groups)))
        in_groups = sum(groups[group] for group in piece.groups)
        assert sum(unit.rows for unit in piece.units) == min(in_groups, rows - piece.start)
        assert sum(groups[group] for group in piece.groups[:-1]) < size, "it was large enough before its last row group"
        read += piece.groups
    assert len(set(read)) == len(read)
    assert {group for group, count in enumerate(groups) if count and sum(groups[:group]) < rows} <= set(read)


def test_small_row_groups_are_gathered_and_large_ones_cut() -> None:
    pieces = list(planned((10, 10, 10, 100, 5), 25).pieces())
    assert [(piece.groups, [unit.rows for unit in piece.units]) for piece in pieces] == [
        ((0, 1, 2), [15, 15]),
        ((3,), [25, 25, 25, 25]),
        ((4,), [5]),
    ]


def test_a_row_limit_leaves_later_row_groups_unread() -> None:
    pieces = list(planned((10, 10, 10), 10, rows=12).pieces())
    assert [(piece.groups, piece.units) for piece in pieces] == [((0,), (Unit(3, 0, 10),)), ((1,), (Unit(3, 10, 2),))]


@given(st.lists(st.builds(Unit, st.integers(0, 10**6 - 1), st.integers(0, 10**12 - 1), st.just(1)), unique=True))
def test_names_are_unique_and_sort_as_the_units_do(units: list[Unit]) -> None:
    names = [unit.name for unit in sorted(units)]
    assert names == sorted(names)
    assert len(set(names)) == len({(unit.file, unit.start) for unit in units})


@pytest.mark.parametrize(
    ("costs", "rows"),
    [
        ({"vector_bytes": 1024.0}, SHARD_BYTES // 1024),
        ({"text_bytes": 2.0**20}, UNIT_TEXT_BYTES // 2**20),
        ({"flops_per_row": 1e9}, int(UNIT_SECONDS * 1e3)),
        ({}, MAX_ROWS),
        ({"text_bytes": 1e12}, 1),
    ],
)
def test_the_tightest_limit_sizes_a_unit(costs: dict[str, float], rows: int) -> None:
    assert rows_per_unit(**({"text_bytes": 0.0, "vector_bytes": 0.0, "flops_per_row": 0.0, "flops_per_second": 1e12} | costs)) == rows
