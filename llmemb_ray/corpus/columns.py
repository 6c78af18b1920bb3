"""Which columns a job takes from a corpus, and texts out of columns of any kind.

Invariant: every row yields a text or the reason why it has none; a bad value never raises. A value larger than the selection allows is
taken out of its batch as soon as that is decoded (``within``), and its row stays whatever a filter says.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmemb_ray.config.embedding import MAX_TEXT_BYTES
from llmemb_ray.corpus.bounds import fixed_width, row_bytes, without
from llmemb_ray.corpus.files import BadFile
from llmemb_ray.errors import ConfigError

RESERVED = (
    "source_file",
    "source_row",
    "embedding",
    "n_tokens",
    "truncated",
    "prompt_hash",
    "chunk",
    "chunk_start",
    "chunk_end",
    "reason",
    "detail",
    "token_ids",
)


TOO_LARGE = "__too_large"
"""Column of a batch: the bytes of the value that was taken out of a row, null where none was."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The columns of a job.

    text: a column (``a.b`` for a field of a struct) or a template such as ``'{title} {text}'``; max_bytes: of a value, all that is in a list or a struct.
    """

    text: str
    id: str | None = None
    keep: tuple[str, ...] = ()
    filter: str | None = None
    max_bytes: int = MAX_TEXT_BYTES

    def __post_init__(self) -> None:
        for name in self.keep:
            if name in RESERVED or name == "id":
                raise ConfigError(f"keep_columns: {name!r} is a name that the shards use themselves; leave it out")
        if not self.text_columns:
            raise ConfigError(f"text_column: {self.text!r} names no column")

    @property
    def text_columns(self) -> tuple[str, ...]:
        if "{" not in self.text:
            return (self.text,) if self.text else ()
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise ConfigError(f"text_column: {self.text!r}: {error}; write {{{{ and }}}} for literal braces") from error
        for _, field, spec, conversion in parts:
            if field == "" or spec or conversion:
                raise ConfigError(f"text_column: {self.text!r}: a field is a column's name in braces and nothing else; write {{{{ and }}}} for literal braces")
        return tuple(field for _, field, _, _ in parts if field)

    def columns(self, schema: pa.Schema, partitions: dict[str, Any]) -> list[str]:
        """The columns to read from a file with this schema; partition columns come from its path."""
        wanted = [*self.text_columns, *((self.id,) if self.id else ()), *self.keep]
        if self.filter:
            wanted += [name for name in schema.names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", self.filter)]
        return [name for name in dict.fromkeys(wanted) if name not in partitions]

    def with_default_id(self, schema: pa.Schema) -> Selection:
        """Takes a column ``id`` as the id where none is named and the corpus has one."""
        if self.id is None and "id" in schema.names:
            return replace(self, id="id")
        return self

    def check(self, schema: pa.Schema, partitions: dict[str, Any]) -> dict[str, pa.DataType]:
        """Types of id and kept columns in a file. Raises BadFile if a column is missing, doubled or no text."""
        types: dict[str, pa.DataType] = {}
        for name in self.columns(schema, partitions):
            type_ = _column_type(schema, name)
            if name in self.text_columns and _is_list(type_):
                raise BadFile(f"column {name!r} is {type_}, a list and not one text; join its items into a text column first")
            if name in self.text_columns and pa.types.is_nested(type_):
                raise BadFile(f"column {name!r} is {type_}; name a field of it, such as {name}.FIELD")
            if name in self.text_columns and "{" not in self.text and not _is_text(type_):
                raise BadFile(f"column {name!r} is {type_}, not text; name a text column, or write it into a template such as '{{{name}}}'")
            if name in self.text_columns:
                try:
                    pa.array([], _plain(type_)).cast(pa.string())
                except pa.ArrowNotImplementedError as error:
                    raise BadFile(f"column {name!r} is {type_}, which cannot be written as text; leave it out of the template") from error
            if name == self.id or name in self.keep:
                types[name] = _plain(type_)
        for name in partitions.keys() & {self.id, *self.keep}:
            types[name] = pa.int64() if isinstance(partitions[name], int) else pa.string()
        return types

    def within(self, table: pa.Table) -> pa.Table:
        """The table with values of more than ``max_bytes`` null, and how many bytes they had in a column ``TOO_LARGE``."""
        largest = pa.nulls(table.num_rows, pa.int64())
        for name in dict.fromkeys((*self.text_columns, *((self.id,) if self.id else ()), *self.keep)):
            top, *path = [name] if name in table.column_names else name.split(".")
            values = column(table, name)
            if fixed_width(values.type) is not None or values.nbytes <= self.max_bytes:
                continue
            sizes = row_bytes(values.combine_chunks())
            over = pa.array(sizes > self.max_bytes)
            if over.true_count:
                largest = pc.if_else(over, pa.array(sizes), largest)
                table = table.set_column(table.column_names.index(top), table.schema.field(top), without(table[top].combine_chunks(), over, path))
        return table.append_column(TOO_LARGE, largest)

    def texts(self, table: pa.Table) -> tuple[list[str | None], dict[int, tuple[str, str]]]:
        """The text of each row, None where it has none, and for those (reason, detail)."""
        columns = {name: _strings(column(table, name)) for name in self.text_columns}
        problems: dict[int, tuple[str, str]] = {}
        for name, (_, undecodable) in columns.items():
            for row, detail in undecodable.items():
                problems[row] = ("undecodable", f"column {name!r}: {detail}")
        if "{" not in self.text:
            texts = columns[self.text][0]
        else:
            rows = zip(*(values for values, _ in columns.values()), strict=True)
            parts = [(literal, field) for literal, field, _, _ in string.Formatter().parse(self.text)]
            place = {name: index for index, name in enumerate(columns)}
            texts = [
                None
                if all(value is None for value in row)
                else "".join(literal + (row[place[field]] or "" if field else "") for literal, field in parts).strip()
                for row in rows
            ]
        if TOO_LARGE in table.column_names:
            for row, size in enumerate(table[TOO_LARGE].to_pylist()):
                if size is not None:
                    problems[row] = ("too_large", f"{size:,} bytes in one value, max_text_bytes allows {self.max_bytes:,}")
        for number, text in enumerate(texts):
            if number in problems:
                texts[number] = None
            elif text is None:
                problems[number] = ("null", "the text is null")
            elif not text.strip():
                texts[number] = None
                problems[number] = ("empty", "the text is empty or only white space")
        return texts, problems


def filtered(table: pa.Table, condition: str) -> pa.Table:
    """The rows of ``table`` for which the SQL condition holds, in order, and those of which a value was taken out: what it says of them is not known.

    Raises ConfigError for a bad condition.
    """
    try:
        import duckdb
    except ImportError as error:
        raise ConfigError("filter: needs duckdb; pip install 'llmemb-ray[filter]'") from error
    numbered = table.append_column("__row", pa.array(range(table.num_rows), pa.int64()))
    try:
        with duckdb.connect(config={"enable_external_access": "false"}) as connection:
            connection.register("corpus", numbered)
            kept = connection.execute(f"SELECT __row FROM corpus WHERE {condition} ORDER BY __row").fetchnumpy()["__row"]  # noqa: S608 - the user's own condition
    except duckdb.Error as error:
        raise ConfigError(f"filter: {condition!r}: {str(error).splitlines()[0]}") from error
    if TOO_LARGE in table.column_names:
        kept = np.union1d(kept, np.flatnonzero(table[TOO_LARGE].is_valid().to_numpy()))
    return table.take(pa.array(kept, pa.int64()))


def _column_type(schema: pa.Schema, name: str) -> pa.DataType:
    if schema.names.count(name) > 1:
        raise BadFile(f"has {schema.names.count(name)} columns named {name!r}")
    if name in schema.names:
        return schema.field(name).type
    top, *path = name.split(".")
    if path and top in schema.names:
        if schema.names.count(top) > 1:
            raise BadFile(f"has {schema.names.count(top)} columns named {top!r}")
        type_ = schema.field(top).type
        for part in path:
            if not pa.types.is_struct(type_) or type_.get_field_index(part) < 0:
                raise BadFile(f"has no column {name!r}: {type_} has no field {part!r}")
            type_ = type_.field(part).type
        return type_
    raise BadFile(f"has no column {name!r}; its columns are {', '.join(schema.names[:20])}")


def _plain(type_: pa.DataType) -> pa.DataType:
    """The type as the shards hold it: dictionaries and views as their values, also inside structs and lists."""
    if pa.types.is_dictionary(type_):
        return _plain(type_.value_type)
    if type_ == pa.string_view():
        return pa.string()
    if type_ == pa.binary_view():
        return pa.binary()
    if pa.types.is_struct(type_):
        return pa.struct([field.with_type(_plain(field.type)) for field in type_])
    if pa.types.is_map(type_):
        return pa.map_(type_.key_field.with_type(_plain(type_.key_type)), type_.item_field.with_type(_plain(type_.item_type)), type_.keys_sorted)
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(type_.value_field.with_type(_plain(type_.value_type)), type_.list_size)
    for is_kind, make in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if is_kind(type_):
            return make(type_.value_field.with_type(_plain(type_.value_type)))
    return type_


def without_views(table: pa.Table) -> pa.Table:
    """Views and dictionaries as the values they stand for: Arrow cannot take rows of views, and what a dictionary's rows take shows only then."""
    schema = pa.schema([field.with_type(_plain(field.type)) for field in table.schema])
    return table if schema.equals(table.schema) else table.cast(schema)


def alike(tables: list[pa.Table]) -> list[pa.Table]:
    """Tables of one corpus with one type for each column: files may hold a text as text, bytes, dictionary or nothing but nulls."""
    for name in tables[0].column_names if tables else ():
        types = {table.schema.field(name).type for table in tables}
        if len(types) > 1:
            common = pa.large_binary() if all(_is_text(type_) for type_ in types) else pa.string()
            tables = [table.set_column(table.column_names.index(name), name, table[name].cast(common)) for table in tables]
    return tables


def _is_list(type_: pa.DataType) -> bool:
    return any(is_kind(type_) for is_kind in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view, pa.types.is_map))


def _is_text(type_: pa.DataType) -> bool:
    """Text, bytes, or nothing but nulls: a file whose texts are all null has no other type to give them."""
    type_ = _plain(type_)
    kinds = (pa.types.is_null, pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(is_kind(type_) for is_kind in kinds)


def column(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column, or a field of a struct by its dotted name, dictionaries and views decoded."""
    if name in table.column_names:
        found = table.column(name)
    else:
        top, *path = name.split(".")
        found = pc.struct_field(table.column(top), path)
    plain = _plain(found.type)
    return found if plain == found.type else found.cast(plain)


def id_values(ids: pa.ChunkedArray) -> list[Any]:
    """Python values of an id column; bytes that are no UTF-8 in a text column written as ``\\xNN``."""
    try:
        return ids.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [None if value is None else value.decode("utf-8", "backslashreplace") for value in ids.cast(pa.large_binary()).to_pylist()]


def _strings(values: pa.ChunkedArray) -> tuple[list[str | None], dict[int, str]]:
    """Python strings of a column of text, bytes or anything that casts to text; and rows that are not UTF-8."""
    if not _is_text(values.type) or pa.types.is_null(values.type):
        values = values.cast(pa.string())
    if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
        try:
            return values.to_pylist(), {}
        except UnicodeDecodeError:
            values = values.cast(pa.large_binary())
    texts: list[str | None] = []
    undecodable: dict[int, str] = {}
    for row, data in enumerate(values.to_pylist()):
        try:
            texts.append(None if data is None else data.decode("utf-8"))
        except UnicodeDecodeError as error:
            texts.append(None)
            undecodable[row] = f"not UTF-8 at byte {error.start}"
    return texts, undecodable
