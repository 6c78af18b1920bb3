"""A sample of a corpus: rows from places spread evenly over it, the same on every machine.

Invariant: which rows are sampled follows from the planned files and the number asked for alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmemb_ray.corpus.columns import TOO_LARGE, Selection, alike, column, filtered
from llmemb_ray.corpus.reading import GLANCE_BUFFER_BYTES, batches, check_unchanged
from llmemb_ray.corpus.units import PlannedFile
from llmemb_ray.errors import InputError
from llmemb_ray.storage import LIST_THREADS, Access, locate, redact

PLACES = 32
"""Places that a sample of a large corpus is taken from."""

GLANCE_ROWS = 1024
"""Rows decoded at a time."""

PASSED_OVER = 10_000
"""Rows of a row group read in vain to get to a place inside it, where reading little matters more; beyond, its beginning is taken."""

SOURCE_FILE, SOURCE_ROW = "__source_file", "__source_row"
"""Columns of a sample, besides those of the corpus, that tell where a row comes from."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """``rows`` rows of a file from row ``start`` on, all in the row groups ``groups``, whose first row is ``first``."""

    file: PlannedFile
    groups: tuple[int, ...]
    first: int
    start: int
    rows: int


def places(files: Sequence[PlannedFile], rows: int, *, passed_over: int = PASSED_OVER) -> list[Place]:
    """Where a sample of about ``rows`` rows is taken; all rows where the corpus has no more."""
    starts = np.cumsum([0, *(file.rows for file in files)])
    total = int(starts[-1])
    if total <= rows:
        return _in_files(files, starts, 0, total)
    count = min(PLACES, rows)
    chosen: list[Place] = []
    end = 0
    for number in range(count):
        position = number * total // count
        group = _group_start(files, starts, position)
        begin = max(end, position if position - group <= passed_over else group)
        end = min(begin + -(-rows // count), total)
        chosen += _in_files(files, starts, begin, end)
    return chosen


def _file_at(starts: npt.NDArray[np.int64], position: int) -> int:
    """The file that holds row ``position`` of the corpus. starts: int64 [files + 1]."""
    return int(np.searchsorted(starts, position, side="right")) - 1


def _group_start(files: Sequence[PlannedFile], starts: npt.NDArray[np.int64], position: int) -> int:
    """The first row, in the corpus, of the row group that holds row ``position``."""
    index = _file_at(starts, position)
    groups = np.cumsum([0, *files[index].group_rows])
    inside = position - int(starts[index])
    return int(starts[index]) + int(groups[np.searchsorted(groups, inside, side="right") - 1])


def _in_files(files: Sequence[PlannedFile], starts: npt.NDArray[np.int64], begin: int, end: int) -> list[Place]:
    """Rows ``begin`` to ``end`` of the corpus, a place for each file that they lie in."""
    chosen: list[Place] = []
    while begin < end:
        index = _file_at(starts, begin)
        file, inside = files[index], begin - int(starts[index])
        take = min(end - begin, file.rows - inside)
        groups = np.cumsum([0, *file.group_rows])
        first = int(np.searchsorted(groups, inside, side="right")) - 1
        last = int(np.searchsorted(groups, inside + take, side="left"))
        bare = replace(file, group_rows=())
        chosen.append(Place(file=bare, groups=tuple(range(first, last)), first=int(groups[first]), start=inside, rows=take))
        begin += take
    return chosen


def read(chosen: Sequence[Place], selection: Selection, access: Access) -> pa.Table:
    """The rows of the places, in order: text, id and kept columns under their names, ``__source_file`` and ``__source_row``; the filter applied.

    Raises InputError where a file changed or cannot be read.
    """
    by_file = [list(group) for _, group in itertools.groupby(chosen, key=lambda place: place.file.index)]
    with ThreadPoolExecutor(max_workers=max(1, min(LIST_THREADS, len(by_file)))) as pool:
        tables = [table for part in pool.map(lambda places: _read(places, selection, access), by_file) for table in part]
    return pa.concat_tables(alike(tables)) if tables else pa.table({SOURCE_FILE: pa.array([], pa.int32()), SOURCE_ROW: pa.array([], pa.int64())})


def _read(chosen: list[Place], selection: Selection, access: Access) -> list[pa.Table]:
    """The rows of some places of one file; a row group that holds several of them is gone through once."""
    file = chosen[0].file
    check_unchanged(file, access)
    storage, name = locate(file.url, access)
    found: list[pa.Table] = []
    with storage.open(name, file.size) as reader:
        for _, group in itertools.groupby(chosen, key=lambda place: place.groups[0]):
            of_group = list(group)
            groups = range(of_group[0].groups[0], of_group[-1].groups[-1] + 1)
            try:
                tables = batches(reader, file, groups, selection, buffer_bytes=GLANCE_BUFFER_BYTES, rows=GLANCE_ROWS)
                found += [_selected(table, row, file.index, selection) for row, table in _ranges(tables, of_group)]
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{redact(file.url)}: row groups {groups[0]} to {groups[-1]} cannot be read: {error}") from error
    return found


def _ranges(tables: Iterator[pa.Table], chosen: list[Place]) -> Iterator[tuple[int, pa.Table]]:
    """(first row, rows) of the places, cut out of the tables of their row groups; reads no further than the last of them."""
    position = chosen[0].first
    left = [(place.start, place.start + place.rows) for place in chosen]
    for table in tables:
        end = position + table.num_rows
        for start, stop in left:
            first, last = max(start, position), min(stop, end)
            if first < last:
                yield first, table.slice(first - position, last - first)
        left = [(start, stop) for start, stop in left if stop > end]
        if not left:
            return
        position = end


def _selected(table: pa.Table, first: int, file: int, selection: Selection) -> pa.Table:
    table = table.append_column(SOURCE_FILE, pa.array(np.full(table.num_rows, file, np.int32)))
    table = table.append_column(SOURCE_ROW, pa.array(np.arange(first, first + table.num_rows)))
    if selection.filter:
        table = filtered(table, selection.filter)
    names = [*selection.text_columns, *((selection.id,) if selection.id else ()), *selection.keep, SOURCE_FILE, SOURCE_ROW, TOO_LARGE]
    return pa.table({name: column(table, name) for name in dict.fromkeys(names)})
