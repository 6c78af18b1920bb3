"""A sample of a corpus: rows from places spread evenly over it, the same on every machine.

Invariant: which rows are sampled follows from the planned files and the number asked for alone. Each place is
the beginning of a row group, so that next to nothing is read that is not taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from llmemb_ray.corpus.columns import Selection, alike, filtered, without_views
from llmemb_ray.corpus.reading import check_unchanged, with_partitions
from llmemb_ray.corpus.units import PlannedFile
from llmemb_ray.errors import InputError
from llmemb_ray.storage import LIST_THREADS, Access, locate, redact

PLACES = 32
"""Places that a sample of a large corpus is taken from."""

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


def places(files: Sequence[PlannedFile], rows: int) -> list[Place]:
    """Where a sample of about ``rows`` rows is taken; all rows where the corpus has no more."""
    starts = np.cumsum([0, *(file.rows for file in files)])
    total = int(starts[-1])
    if total <= rows:
        return _in_files(files, starts, 0, total)
    count = min(PLACES, rows)
    chosen: list[Place] = []
    end = 0
    for number in range(count):
        begin = max(end, _group_start(files, starts, number * total // count))
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
    """The rows of the places with the selected columns, ``__source_file`` and ``__source_row``; the filter applied.

    Raises InputError where a file changed or cannot be read.
    """
    if len(chosen) < 2:
        tables = [_read(place, selection, access) for place in chosen]
    else:
        with ThreadPoolExecutor(max_workers=min(LIST_THREADS, len(chosen))) as pool:
            tables = list(pool.map(lambda place: _read(place, selection, access), chosen))
    return pa.concat_tables(alike(tables))


def _read(place: Place, selection: Selection, access: Access) -> pa.Table:
    check_unchanged(place.file, access)
    table = with_partitions(pa.concat_tables(list(_batches(place, selection, access))), place.file)
    numbers = np.arange(place.start, place.start + table.num_rows)
    table = table.append_column(SOURCE_FILE, pa.array(np.full(table.num_rows, place.file.index, np.int32)))
    table = table.append_column(SOURCE_ROW, pa.array(numbers))
    return filtered(table, selection.filter) if selection.filter else table


def _batches(place: Place, selection: Selection, access: Access) -> Iterator[pa.Table]:
    storage, name = locate(place.file.url, access)
    skip, left = place.start - place.first, place.rows
    with storage.open(name, place.file.size) as reader:
        try:
            parquet = pq.ParquetFile(reader, pre_buffer=False)
            columns = selection.columns(parquet.schema_arrow, place.file.partitions)
            for batch in parquet.iter_batches(max(1, min(8192, skip + left)), row_groups=list(place.groups), columns=columns):
                table = without_views(pa.Table.from_batches([batch]))
                passed = min(skip, table.num_rows)
                part = table.slice(passed, left)
                skip, left = skip - passed, left - part.num_rows
                yield part
                if left == 0:
                    return
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{redact(place.file.url)}: row groups {place.groups[0]} to {place.groups[-1]} cannot be read: {error}") from error
