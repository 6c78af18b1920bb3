"""Reading the rows of a piece, unit by unit, from a file that must still be the one that was planned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmemb_ray import parquet
from llmemb_ray.corpus.columns import TOO_LARGE, Selection, without_views
from llmemb_ray.corpus.units import Piece, PlannedFile, Unit
from llmemb_ray.errors import InputError, NotFound
from llmemb_ray.storage import Access, locate, redact

BATCH_ROWS = 8192
"""Rows decoded at a time; a unit is gathered from such batches, so a huge row group is never whole in memory."""

BATCH_BYTES = 2**29
"""What a batch of a column can take when a dictionary, or values told by their differences, makes much of few bytes. A dictionary
has up to 1 MiB as most programs write it: then 512 rows are read at a time."""

TOGETHER_BYTES = 2**20
"""Row groups of so many bytes in all are read in one go. Their headers are looked at first: what is fetched for these, a block as large at
a remote storage, then holds the values as well."""

UNIT_BYTES = 4 * 2**30
"""What the rows of a unit take at most in memory. Units are planned for a sixteenth of it, but by what stands in the file."""

UNIT_BUFFER_BYTES, GLANCE_BUFFER_BYTES = 8 * 2**20, 2**20
"""Bytes of a column fetched at a time: many where all of it is read, few where a few rows are. Without a buffer a column's whole row group is fetched."""


def check_unchanged(file: PlannedFile, access: Access) -> None:
    """Raises InputError if the file is not what was planned."""
    storage, name = locate(file.url, access)
    try:
        now = storage.info(name)
    except NotFound as error:
        raise InputError(f"{redact(file.url)} is gone since the run was planned; bring it back, or embed the corpus without it into another output") from error
    if (now.size, now.version) != (file.size, file.version):
        raise InputError(
            f"{redact(file.url)} changed after the run was planned (size {file.size} → {now.size}, version {file.version} → {now.version}); "
            "bring the old file back, or embed the new corpus into another output"
        )


def read_units(file: PlannedFile, piece: Piece, selection: Selection, access: Access, wanted: frozenset[str]) -> Iterator[tuple[Unit, pa.Table | InputError]]:
    """The ``wanted`` units of a piece with the selected columns; partition columns filled in from the path. An error stands for a unit that does not fit.

    Raises InputError if the file changed, StorageError if it cannot be read.
    """
    check_unchanged(file, access)
    units = iter(piece.units)
    unit = next(units)
    position = piece.start
    held: list[pa.Table] = []
    size = 0
    storage, name = locate(file.url, access)
    with storage.open(name, file.size) as reader:
        try:
            for rest in batches(reader, file, piece.groups, selection, buffer_bytes=UNIT_BUFFER_BYTES):
                while rest.num_rows:
                    take = min(rest.num_rows, unit.start + unit.rows - position)
                    if unit.name in wanted and size <= UNIT_BYTES:
                        held.append(rest.slice(0, take))
                        size += held[-1].nbytes
                        if size > UNIT_BYTES:
                            held = []
                    rest, position = rest.slice(take), position + take
                    if position < unit.start + unit.rows:
                        break
                    if unit.name in wanted:
                        check_unchanged(file, access)
                        yield unit, _gathered(held) if size <= UNIT_BYTES else _too_large(file, unit)
                        held, size = [], 0
                    following = next(units, None)
                    if following is None:
                        return
                    unit = following
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(f"{redact(file.url)}: row groups {piece.groups[0]} to {piece.groups[-1]} cannot be decoded: {error}") from error
        except OSError as error:
            raise InputError(f"{redact(file.url)}: row groups {piece.groups[0]} to {piece.groups[-1]} cannot be read: {error}") from error
    raise InputError(f"{redact(file.url)} ends at row {position}, before the planned unit {unit.name} does")


def _too_large(file: PlannedFile, unit: Unit) -> InputError:
    return InputError(
        f"{redact(file.url)}: rows {unit.start} to {unit.start + unit.rows} take more than {UNIT_BYTES / 2**30:.3g} GiB "
        "when they are decoded; set fewer rows_per_unit, in another output or with overwrite"
    )


def _gathered(parts: list[pa.Table]) -> pa.Table:
    table = pa.concat_tables(parts)
    return table.drop_columns(TOO_LARGE) if table[TOO_LARGE].null_count == table.num_rows else table


def batches(reader: Any, file: PlannedFile, groups: Sequence[int], selection: Selection, *, buffer_bytes: int, rows: int = BATCH_ROWS) -> Iterator[pa.Table]:
    """The selected columns of some row groups, at most ``rows`` rows at a time, partition columns filled in, too large values out (``Selection.within``).

    Raises Arrow's own errors and OSError; the caller knows what the rows are for.
    """
    opened = parquet.opened(reader, pre_buffer=False, buffer_size=buffer_bytes)
    columns = selection.columns(opened.schema_arrow, file.partitions)
    for together, at_once in _runs(opened.metadata, groups, columns, reader, rows):
        for batch in opened.iter_batches(at_once, row_groups=together, columns=columns):
            yield selection.within(with_partitions(without_views(parquet.plain(pa.Table.from_batches([batch]))), file))


def _runs(metadata: pq.FileMetaData, groups: Sequence[int], columns: Sequence[str], reader: Any, rows: int) -> Iterator[tuple[list[int], int]]:
    """(row groups, rows to decode at a time): small row groups together, as long as what is safe for each is about the same."""
    together: list[int] = []
    size, at_once = 0, rows
    for number in groups:
        group = metadata.row_group(number)
        size += group.total_byte_size
        safe = _safe_rows(group, columns, reader, rows)
        if together and not (size <= TOGETHER_BYTES and at_once <= 4 * safe <= 16 * at_once):
            yield together, at_once
            together, size, at_once = [], group.total_byte_size, rows
        together.append(number)
        at_once = min(at_once, safe)
    if together:
        yield together, at_once


def _safe_rows(group: pq.RowGroupMetaData, columns: Sequence[str], reader: Any, rows: int) -> int:
    """At most ``rows`` rows of a row group that decoded together take BATCH_BYTES at most, even where each repeats the longest value that there can be.

    Where values are lists, as many of them are taken for a row as there are in the mean.
    """
    most = 0.0
    for number in range(group.num_columns):
        chunk = group.column(number)
        if chunk.physical_type != "BYTE_ARRAY" or not any(chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.") for name in columns):
            continue
        if chunk.num_values > 0:
            most = max(most, _longest(chunk, reader) * max(1, chunk.num_values / max(1, group.num_rows)))
    return max(1, min(rows, int(BATCH_BYTES / max(1, most))))


def _longest(chunk: pq.ColumnChunkMetaData, reader: Any) -> int:
    """Bytes of the longest value that few bytes of the file may repeat; BATCH_BYTES where that cannot be told.

    Values that a page holds one by one take what the page takes: 0. Those of a dictionary are as long as it at most, and those told by how they differ
    from the one before as long as the column's pages. The footer may say what it likes: what counts is the header of the first page, which is
    the dictionary where there is one. (For differences the footer's word counts where it is the larger one.)
    """
    dictionary = chunk.dictionary_page_offset if chunk.has_dictionary_page else None
    page = _page_header(reader, min(dictionary or chunk.data_page_offset, chunk.data_page_offset))
    kind, size = page.get((1, 0), -1), page.get((2, 0), -1)
    if size < 0 or kind not in (_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2):
        return BATCH_BYTES
    if "DELTA_BYTE_ARRAY" in chunk.encodings or _DELTA_BYTE_ARRAY in (page.get((5, 2)), page.get((8, 4))):
        return max(size, int(chunk.total_uncompressed_size))
    return size if kind == _DICTIONARY_PAGE else 0


_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2, _DELTA_BYTE_ARRAY = 0, 2, 3, 7
"""Kinds of pages and an encoding by their numbers in parquet.thrift."""


def _page_header(reader: Any, offset: int) -> dict[tuple[int, int], int]:
    """The integers at the beginning of the header of the page at ``offset``, by the number of their field and of the field inside that, 0 for its own.

    In Thrift's compact protocol a field begins with its number, as the step from the one before, and its kind: 5 is an integer (a varint in
    zigzag), 12 fields of its own. Fields 1 and 2 are the page's kind and its bytes uncompressed, 5 and 8 that of data pages, which hold their encoding.
    """
    reader.seek(max(0, offset))
    header = reader.read(64)
    values: dict[tuple[int, int], int] = {}
    outer = inner = place = 0
    within = False
    while place < len(header) and header[place] & 0x0F in (5, 12) and header[place] >> 4:
        step, kind = divmod(header[place], 16)
        place += 1
        outer, inner = (outer, inner + step) if within else (outer + step, 0)
        if kind == 12:
            within = True
            continue
        value = shift = 0
        more = True
        while more and place < len(header):
            value |= (header[place] & 0x7F) << shift
            more = bool(header[place] & 0x80)
            shift, place = shift + 7, place + 1
        values[outer, inner] = (value >> 1) ^ -(value & 1)
    return values


def with_partitions(table: pa.Table, file: PlannedFile) -> pa.Table:
    """The table with the columns that the path of its file gives."""
    for key, value in file.partitions.items():
        if key not in table.column_names:
            type_ = pa.int64() if isinstance(value, int) else pa.string()
            table = table.append_column(key, pa.repeat(pa.scalar(value, type_), table.num_rows))
    return table
