"""Parquet files: how each is opened, and small ones written and read whole.

Invariant: reading a file runs no code that the file names. A file can say that a column has an extension type of Arrow; those that are
defined in Python and registered in this process would then read the column, and one of Ray's unpickles its values. Such a column
is taken as what it is stored as.

Invariant: reading is over when ``read`` returns. ``pyarrow.parquet.read_table`` leaves threads behind that still hold the Python object
they read from; where the interpreter ends before them the process aborts (apache/arrow issue 34314; here half of 60 processes did).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq


def to_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="ZSTD")
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def read(source: bytes | BinaryIO, columns: Sequence[str] | None = None) -> pa.Table:
    """The ``columns`` of a file, or all. Raises Arrow's own errors and OSError."""
    file = opened(pa.BufferReader(source) if isinstance(source, bytes) else source, pre_buffer=False)
    return plain(file.read(columns=None if columns is None else list(columns), use_threads=False))


def opened(source: Any, **options: Any) -> pq.ParquetFile:
    """The file, its schema read. Raises Arrow's own errors and OSError, also where an extension type that Python defines refuses its description."""
    try:
        file = pq.ParquetFile(source, **options)
        _ = file.schema_arrow
    except (pa.ArrowException, OSError):
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise pa.ArrowInvalid(f"its schema holds an extension type that cannot be read: {str(error).splitlines()[0]}") from error
    return file


def plain(table: pa.Table) -> pa.Table:
    """Columns of extension types that Python defines as what they are stored as. Call it before a value of an opened file is looked at."""
    schema = plain_schema(table.schema)
    return table if schema is table.schema else table.cast(schema)


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema of ``plain`` tables; the same object where nothing changes."""
    types = [(field, _stored(field.type)) for field in schema]
    if all(type_ is field.type or type_ == field.type for field, type_ in types):
        return schema
    return pa.schema([field.with_type(type_) for field, type_ in types], schema.metadata)


def _stored(type_: pa.DataType) -> pa.DataType:
    if isinstance(type_, pa.ExtensionType):
        return _stored(type_.storage_type)
    if pa.types.is_dictionary(type_):
        return pa.dictionary(type_.index_type, _stored(type_.value_type), type_.ordered)
    if pa.types.is_struct(type_):
        return pa.struct([field.with_type(_stored(field.type)) for field in type_])
    if pa.types.is_map(type_):
        return pa.map_(type_.key_field.with_type(_stored(type_.key_type)), type_.item_field.with_type(_stored(type_.item_type)), type_.keys_sorted)
    for is_kind, make in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if is_kind(type_):
            return make(type_.value_field.with_type(_stored(type_.value_type)))
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(type_.value_field.with_type(_stored(type_.value_type)), type_.list_size)
    return type_
