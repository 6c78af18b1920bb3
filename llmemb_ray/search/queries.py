"""Queries out of a file: Parquet, JSON lines, CSV, TSV, or text with one query a line.

Invariant: every row of the file is a query, or the file is refused with the row that is none; only blank lines of
a text file are passed over. All queries are in memory at once.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv

from llmemb_ray import parquet
from llmemb_ray.corpus.columns import column, id_values, without_views
from llmemb_ray.errors import ConfigError, InputError, NotFound
from llmemb_ray.storage import Access, absolute, locate, redact

TEXT_NAMES, ID_NAMES = ("query", "text"), ("query_id", "id", "_id")
"""Columns taken, the first that is there, where none is named."""

KINDS = {".parquet": "Parquet", ".jsonl": "JSON lines", ".ndjson": "JSON lines", ".csv": "CSV", ".tsv": "TSV", ".txt": "text"}


@dataclass(frozen=True)
class Queries:
    """texts: of Q queries; ids: of as many, or None where the file has no ids."""

    texts: list[str]
    ids: list[Any] | None = None


def read_queries(url: str, access: Access | None = None, *, query_column: str | None = None, id_column: str | None = None) -> Queries:
    """The queries of a file. Raises ConfigError for a kind of file or a column that is not there, InputError for what is no query."""
    shown = redact(url)
    kind = KINDS.get(posixpath.splitext(url)[1].lower())
    if kind is None:
        raise ConfigError(f"queries: {shown} is of no kind that is read here; its name must end in {', '.join(KINDS)}")
    storage, name = locate(absolute(url), access or Access())
    try:
        data = storage.read(name)
    except NotFound as error:
        raise InputError(f"queries: {error}; check the path") from error
    if kind == "text":
        if query_column or id_column:
            raise ConfigError(f"query_column and query_id_column: {shown} is plain text and has no columns")
        return _checked(Queries([line for line in _decoded(data, shown).splitlines() if line.strip()]), shown)
    table = _table(data, kind, shown)
    if not table.num_rows:
        return _checked(Queries([]), shown)
    text = _name(table, query_column, TEXT_NAMES, "query_column", shown)
    if text is None:
        raise ConfigError(f"query_column: {shown} has no column {' or '.join(TEXT_NAMES)}; name one of {', '.join(table.column_names)}")
    id_ = _name(table, id_column, ID_NAMES, "query_id_column", shown)
    texts = id_values(column(table, text))
    return _checked(Queries(texts, id_values(column(table, id_)) if id_ else None), shown)


def _decoded(data: bytes, shown: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"queries: {shown} is not UTF-8 at byte {error.start}") from error


def _table(data: bytes, kind: str, shown: str) -> pa.Table:
    try:
        if kind == "Parquet":
            return without_views(parquet.read(data))
        if kind == "JSON lines":
            return _from_json_lines(_decoded(data, shown), shown)
        # All columns as text: 007 is an id, and a query of digits is a text.
        header = pyarrow.csv.open_csv(pa.BufferReader(data), parse_options=_dialect(kind)).schema.names
        convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()))
        return pyarrow.csv.read_csv(pa.BufferReader(data), parse_options=_dialect(kind), convert_options=convert)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"queries: {shown} cannot be read as {kind}: {error}") from error


def _dialect(kind: str) -> pyarrow.csv.ParseOptions:
    return pyarrow.csv.ParseOptions(delimiter="\t" if kind == "TSV" else ",", newlines_in_values=True)


def _from_json_lines(text: str, shown: str) -> pa.Table:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"queries: {shown} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f'queries: {shown} line {number} is no object; write {{"query": …}}')
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    """Values of one kind as they are; mixed ones as text."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])


def _name(table: pa.Table, named: str | None, usual: Sequence[str], setting: str, shown: str) -> str | None:
    if named is not None and named not in table.column_names:
        raise ConfigError(f"{setting}: {shown} has no column {named!r}; its columns are {', '.join(table.column_names)}")
    return named or next((name for name in usual if name in table.column_names), None)


def _checked(queries: Queries, shown: str) -> Queries:
    if not queries.texts:
        raise InputError(f"queries: {shown} holds no query")
    for row, text in enumerate(queries.texts):
        if not isinstance(text, str):
            raise InputError(f"queries: {shown} row {row}: {text!r} is no text; name another query_column")
        if not text.strip():
            raise InputError(f"queries: {shown} row {row}: the query is empty")
    return queries
