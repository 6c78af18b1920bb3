"""Small Parquet files, written and read whole.

Invariant: reading is over when it returns. ``pyarrow.parquet.read_table`` leaves threads behind that still hold the Python object
they read from; where the interpreter ends before them the process aborts (apache/arrow issue 34314; here half of 60 processes did).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq


def to_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="ZSTD")
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def read(source: bytes | BinaryIO, columns: Sequence[str] | None = None) -> pa.Table:
    """The ``columns`` of a file, or all. Raises Arrow's own errors and OSError."""
    file = pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source, pre_buffer=False)
    return file.read(columns=None if columns is None else list(columns), use_threads=False)
