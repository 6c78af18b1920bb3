"""Reading the rows of a piece, unit by unit, from a file that must still be the one that was planned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmemb_ray.corpus.columns import Selection, without_views
from llmemb_ray.corpus.units import Piece, PlannedFile, Unit
from llmemb_ray.errors import InputError, NotFound
from llmemb_ray.storage import Access, locate, redact

BATCH_ROWS = 8192
"""Rows decoded at a time; a unit is gathered from such batches, so a huge row group is never whole in memory."""

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
    storage, name = locate(file.url, access)
    with storage.open(name, file.size) as reader:
        try:
            for rest in batches(reader, file, piece.groups, selection, buffer_bytes=UNIT_BUFFER_BYTES):
                while rest.num_rows:
                    take = min(rest.num_rows, unit.start + unit.rows - position)
                    if unit.name in wanted:
                        held.append(rest.slice(0, take))
                    rest, position = rest.slice(take), position + take
                    if position < unit.start + unit.rows:
                        break
                    if unit.name in wanted:
                        check_unchanged(file, access)
                        yield unit, pa.concat_tables(held)
                        held = []
                    following = next(units, None)
                    if following is None:
                        return
                    unit = following
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(f"{redact(file.url)}: row groups {piece.groups[0]} to {piece.groups[-1]} cannot be decoded: {error}") from error
        except OSError as error:
            raise InputError(f"{redact(file.url)}: row groups {piece.groups[0]} to {piece.groups[-1]} cannot be read: {error}") from error
    raise InputError(f"{redact(file.url)} ends at row {position}, before the planned unit {unit.name} does")


def batches(reader: Any, file: PlannedFile, groups: Sequence[int], selection: Selection, *, buffer_bytes: int, rows: int = BATCH_ROWS) -> Iterator[pa.Table]:
    """The selected columns of some row groups, ``rows`` rows at a time, partition columns filled in.

    Raises Arrow's own errors and OSError; the caller knows what the rows are for.
    """
    parquet = pq.ParquetFile(reader, pre_buffer=False, buffer_size=buffer_bytes)
    columns = selection.columns(parquet.schema_arrow, file.partitions)
    for batch in parquet.iter_batches(rows, row_groups=list(groups), columns=columns):
        yield with_partitions(without_views(pa.Table.from_batches([batch])), file)


def with_partitions(table: pa.Table, file: PlannedFile) -> pa.Table:
    """The table with the columns that the path of its file gives."""
    for key, value in file.partitions.items():
        if key not in table.column_names:
            type_ = pa.int64() if isinstance(value, int) else pa.string()
            table = table.append_column(key, pa.repeat(pa.scalar(value, type_), table.num_rows))
    return table
