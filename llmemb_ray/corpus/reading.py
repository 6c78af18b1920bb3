"""Reading the rows of a piece, unit by unit, from a file that must still be the one that was planned."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from llmemb_ray.corpus.columns import Selection, without_views
from llmemb_ray.corpus.units import Piece, PlannedFile, Unit
from llmemb_ray.errors import InputError, NotFound
from llmemb_ray.storage import Access, locate, redact

BATCH_ROWS = 8192
"""Rows decoded at a time; a unit is gathered from such batches, so a huge row group is never whole in memory."""


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
            parquet = pq.ParquetFile(reader, pre_buffer=False)
            columns = selection.columns(parquet.schema_arrow, file.partitions)
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=list(piece.groups), columns=columns):
                rest = without_views(pa.Table.from_batches([batch]))
                while rest.num_rows:
                    take = min(rest.num_rows, unit.start + unit.rows - position)
                    if unit.name in wanted:
                        held.append(rest.slice(0, take))
                    rest, position = rest.slice(take), position + take
                    if position < unit.start + unit.rows:
                        break
                    if unit.name in wanted:
                        check_unchanged(file, access)
                        yield unit, with_partitions(pa.concat_tables(held), file)
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


def with_partitions(table: pa.Table, file: PlannedFile) -> pa.Table:
    """The table with the columns that the path of its file gives."""
    for key, value in file.partitions.items():
        if key not in table.column_names:
            type_ = pa.int64() if isinstance(value, int) else pa.string()
            table = table.append_column(key, pa.repeat(pa.scalar(value, type_), table.num_rows))
    return table
