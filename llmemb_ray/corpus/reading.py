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


def read_units(file: PlannedFile, piece: Piece, selection: Selection, access: Access, wanted: frozenset[str]) -> Iterator[tuple[Unit, pa.Table]]:
    """The ``wanted`` units of a piece with the selected columns; partition columns filled in from the path.

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
                    if unit.name in wanted:
                        held.append(rest.slice(0, take))
                        size += held[-1].nbytes
                        if size > UNIT_BYTES:
                            raise InputError(
                                f"{redact(file.url)}: rows {unit.start} to {unit.start + unit.rows} take more than {UNIT_BYTES / 2**30:.0f} GiB "
                                "when they are decoded; set fewer rows_per_unit, in another output or with overwrite"
                            )
                    rest, position = rest.slice(take), position + take
                    if position < unit.start + unit.rows:
                        break
                    if unit.name in wanted:
                        check_unchanged(file, access)
                        yield unit, _gathered(held)
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
    """(row groups, rows to decode at a time): together as long as ``rows`` at a time are safe."""
    together: list[int] = []
    for group in groups:
        at_once = _safe_rows(metadata.row_group(group), columns, reader, rows)
        if at_once == rows:
            together.append(group)
            continue
        if together:
            yield together, rows
            together = []
        yield [group], at_once
    if together:
        yield together, rows


def _safe_rows(group: pq.RowGroupMetaData, columns: Sequence[str], reader: Any, rows: int) -> int:
    """At most ``rows`` rows of a row group that decoded together take BATCH_BYTES at most, even where each repeats the longest value that there can be.

    Values that a page holds one by one take what the page takes. Those of a dictionary are as long as it at most, and those told by
    how they differ from the one before as long as the column's pages.
    """
    longest = 0
    for number in range(group.num_columns):
        chunk = group.column(number)
        if chunk.physical_type != "BYTE_ARRAY" or not any(chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.") for name in columns):
            continue
        if "DELTA_BYTE_ARRAY" in chunk.encodings:
            longest = max(longest, chunk.total_uncompressed_size)
        elif chunk.has_dictionary_page:
            page = _page_bytes(reader, chunk.dictionary_page_offset) if chunk.total_uncompressed_size * min(rows, group.num_rows) > BATCH_BYTES else None
            longest = max(longest, chunk.total_uncompressed_size if page is None else page)
    return max(1, min(rows, BATCH_BYTES // max(1, longest)))


def _page_bytes(reader: Any, offset: int) -> int | None:
    """Uncompressed bytes of the page that begins at ``offset``, from its header; None where it cannot be told.

    The header is Thrift's compact protocol: field 1 (type) and field 2 (uncompressed_page_size), both varints in zigzag.
    """
    reader.seek(offset)
    header = reader.read(16)
    place, values = 0, list[int]()
    while len(values) < 2 and place < len(header) and header[place] == 0x15:
        value = shift = 0
        place += 1
        while place < len(header):
            value |= (header[place] & 0x7F) << shift
            shift, place = shift + 7, place + 1
            if not header[place - 1] & 0x80:
                break
        values.append((value >> 1) ^ -(value & 1))
    return values[1] if len(values) == 2 and values[1] >= 0 else None


def with_partitions(table: pa.Table, file: PlannedFile) -> pa.Table:
    """The table with the columns that the path of its file gives."""
    for key, value in file.partitions.items():
        if key not in table.column_names:
            type_ = pa.int64() if isinstance(value, int) else pa.string()
            table = table.append_column(key, pa.repeat(pa.scalar(value, type_), table.num_rows))
    return table
