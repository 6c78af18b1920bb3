"""Parquet files: how each is opened, and small ones written and read whole.

Invariant: reading a file runs no code that the file names. A file can say that a column has an extension type of Arrow; those that are
defined in Python and registered in this process would then read the column, and one of Ray's unpickles its values. Such a column
is taken as what it is stored as; where Arrow cannot (inside views of lists), the file is refused.

Invariant: reading is over when ``read`` returns. ``pyarrow.parquet.read_table`` leaves threads behind that still hold the Python object
they read from; where the interpreter ends before them the process aborts (apache/arrow issue 34314; here half of 60 processes did).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from llmemb_ray.errors import LlmembError

MAX_FOOTER_ITEMS = 200_000
"""Of a list in a footer: columns, groups of them, row groups. Without rows a column costs about 2 kB where the file is opened, so 400 MB at most."""

MAX_FOOTER_TEXT = 64 * 2**20
"""Bytes of one text in a footer, such as a column's name or the description of all columns that Arrow leaves there."""


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
    """The file, its schema read. Raises ArrowInvalid, ArrowNotImplementedError, OSError, and what the source itself raises for a place out of reach.

    An extension type that Python defines reads its description where the schema is read, and may raise anything.
    """
    try:
        file = pq.ParquetFile(source, **{"thrift_container_size_limit": MAX_FOOTER_ITEMS, "thrift_string_size_limit": MAX_FOOTER_TEXT} | options)
        _ = plain_schema(file.schema_arrow)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, LlmembError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise pa.ArrowInvalid(f"its schema holds a type that cannot be read: {type(error).__name__}: {reason}") from error
    return file


def plain(table: pa.Table) -> pa.Table:
    """Columns of extension types that Python defines as what they are stored as. Call it before a value of an opened file is looked at."""
    schema = plain_schema(table.schema)
    return table if schema is table.schema else table.cast(schema)


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema of ``plain`` tables; the same object where nothing changes. Raises ArrowNotImplementedError where Python would still read a column."""
    types = [(field, _stored(field.type)) for field in schema]
    for field, type_ in types:
        if _is_read_by_python(type_):
            raise pa.ArrowNotImplementedError(f"column {field.name!r} is {type_}, which code of this process would read; write it as what it is stored as")
    if all(type_ is field.type or type_ == field.type for field, type_ in types):
        return schema
    return pa.schema([field.with_type(type_) for field, type_ in types], schema.metadata)


def _stored(type_: pa.DataType) -> pa.DataType:
    if isinstance(type_, pa.BaseExtensionType):
        stored = _stored(type_.storage_type)
        return stored if isinstance(type_, pa.ExtensionType) or stored != type_.storage_type else type_
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


def _is_read_by_python(type_: pa.DataType) -> bool:
    """Whether an extension type that Python defines is in it, at any depth and in whatever container."""
    if isinstance(type_, pa.BaseExtensionType):
        return isinstance(type_, pa.ExtensionType) or _is_read_by_python(type_.storage_type)
    if pa.types.is_dictionary(type_) or pa.types.is_run_end_encoded(type_):
        return _is_read_by_python(type_.value_type)
    return any(_is_read_by_python(type_.field(number).type) for number in range(type_.num_fields))
