"""Finding the files of a corpus and reading their footers. Knows nothing of what is done with the rows.

Invariant: the same inputs give the same files in the same order on every machine.
"""

from __future__ import annotations

import posixpath
import re
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from llmemb_ray import parquet
from llmemb_ray.errors import InputError, NotFound, StorageError
from llmemb_ray.storage import LIST_THREADS, Access, Storage, absolute, locate, redact

ENDINGS = (".parquet", ".pq", ".parq")
_GLOB = re.compile(r"[*?\[]")
_WHOLE = re.compile(r"-?\d{1,18}")

MAX_COLUMNS = 100_000
"""Columns of a file at most, those inside structs counted; ``parquet.MAX_FOOTER_ITEMS`` bounds what it costs to count them."""

MAX_GROUP_ROWS = 2**31
"""Rows of a row group at most. A footer can promise more than any file holds; the plan would then have units without end."""

MAX_ROWS = 2**33
"""Rows of a file at most, for the same reason."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file of the corpus as the listing shows it."""

    url: str
    size: int
    version: str
    partitions: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Footer:
    """What a Parquet footer says: rows of each row group, bytes of each column (uncompressed), schema."""

    group_rows: tuple[int, ...]
    column_bytes: dict[str, int]
    schema: pa.Schema

    @property
    def rows(self) -> int:
        return sum(self.group_rows)


class BadFile(InputError):
    """A file that cannot be used; the message is the reason without the file's name."""


def discover(inputs: list[str], access: Access) -> list[Found]:
    """Every Parquet file of the inputs, in the order of the inputs and by name within each, none twice.

    Raises InputError for an input without files, StorageError where one cannot be listed.
    """
    found: dict[str, Found] = {}
    for given in inputs:
        url = absolute(given)
        try:
            entries = _expand(url, access)
        except NotFound as error:
            raise InputError(f"input {redact(given)}: {error}; check the path") from error
        if not entries:
            raise InputError(f"input {redact(given)}: no Parquet files there (files named {', '.join('*' + ending for ending in ENDINGS)})")
        for entry in entries:
            found.setdefault(entry.url, entry)
    return list(found.values())


def _expand(url: str, access: Access) -> list[Found]:
    if url.startswith(("http://", "https://")) and "?" in url:
        raise InputError(f"input {redact(url)}?…: signed URLs are not supported, they would stand in the plan; give the bucket's own URL and credentials")
    if _GLOB.search(url):
        first = _GLOB.search(url)
        assert first is not None
        base = url[: url.rindex("/", 0, first.start())]
        storage = Storage(base, access)
        entries = [entry for entry in storage.glob(url.removeprefix(base + "/")) if not _hidden(entry.path)]
    else:
        storage, name = locate(url, access)
        if storage.is_directory(name):
            base, storage = url, storage.child(name)
            entries = [entry for entry in storage.list() if entry.path.endswith(ENDINGS) and not _hidden(entry.path)]
        else:
            base = posixpath.dirname(url)
            entries = [storage.info(name)]
    return [
        Found(url=f"{base.rstrip('/')}/{entry.path}", size=entry.size, version=entry.version, partitions=_partitions(entry.path))
        for entry in sorted(entries, key=lambda entry: entry.path)
    ]


def _hidden(path: str) -> bool:
    return any(part.startswith(("_", ".")) and "=" not in part for part in path.split("/"))


def _partitions(path: str) -> tuple[tuple[str, str], ...]:
    """``year=2024/lang=en/x.parquet`` -> (("year", "2024"), ("lang", "en"))."""
    pairs = (part.split("=", 1) for part in path.split("/")[:-1] if "=" in part)
    return tuple((urllib.parse.unquote(key), urllib.parse.unquote(value)) for key, value in pairs)


def partition_values(files: list[Found], *, before: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """The partition columns of each file: integers where every value of a column is one, else strings.

    before: the partition columns of files that were there before, whose types stay. Raises InputError for a value that is no number among such.
    """
    values: dict[str, set[str]] = {}
    for file in files:
        for key, value in file.partitions:
            values.setdefault(key, set()).add(value)
    whole = {key for key, seen in values.items() if all(_WHOLE.fullmatch(value) for value in seen)}
    settled = {key: isinstance(value, int) for partitions in before for key, value in partitions.items()}
    whole = {key for key in whole | settled.keys() if settled.get(key, key in whole)}
    for file in files:
        for key, value in file.partitions:
            if key in whole and not _WHOLE.fullmatch(value):
                raise InputError(f"{redact(file.url)}: {key}={value} is no number, as it is for the files that the run has; embed it into another output")
    return [{key: int(value) if key in whole else value for key, value in file.partitions} for file in files]


def footer(found: Found, access: Access) -> Footer:
    """Reads one footer. Raises BadFile for what is no Parquet file, StorageError for what cannot be reached."""
    storage, name = locate(found.url, access)
    if found.size == 0:
        raise BadFile("is empty (0 bytes)")
    try:
        with storage.open(name, found.size) as reader:
            file = parquet.opened(reader)
            metadata = file.metadata
            if metadata.num_columns > MAX_COLUMNS:
                raise BadFile(f"has {metadata.num_columns:,} columns; {MAX_COLUMNS:,} are read at most")
            schema = parquet.plain_schema(file.schema_arrow)
    except pa.ArrowNotImplementedError as error:
        raise BadFile(f"cannot be read: {str(error).splitlines()[0]}") from error
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise BadFile(f"is not a whole Parquet file: {str(error).splitlines()[0]}") from error
    sizes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for column in range(row_group.num_columns):
            chunk = row_group.column(column)
            sizes[chunk.path_in_schema] = sizes.get(chunk.path_in_schema, 0) + chunk.total_uncompressed_size
    rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    if not all(0 <= count <= MAX_GROUP_ROWS for count in rows):
        raise BadFile(f"has a row group of {max(rows, key=abs):,} rows by its footer; {MAX_GROUP_ROWS:,} are read at most")
    if sum(rows) > MAX_ROWS:
        raise BadFile(f"has {sum(rows):,} rows by its footer; {MAX_ROWS:,} are read at most")
    return Footer(group_rows=rows, column_bytes=sizes, schema=schema)


def footers(files: list[Found], access: Access) -> list[Footer | str]:
    """The footer of each file, or the reason why it has none."""

    def one(found: Found) -> Footer | str:
        try:
            return footer(found, access)
        except (BadFile, StorageError) as error:
            return str(error)

    with ThreadPoolExecutor(max_workers=LIST_THREADS) as pool:
        return list(pool.map(one, files))
