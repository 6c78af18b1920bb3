"""Rows of Parquet, JSON lines, CSV and TSV files as mappings, streamed: for files that are read whole, whatever their kind.

Invariant: the same files give the same rows in the same order; memory holds one row group's batch, or the first lines and then one. Knows
nothing of what the columns mean: who reads says which it wants once it was told their names.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import posixpath
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import pyarrow as pa

from llmemb_ray import parquet
from llmemb_ray.corpus.files import ENDINGS, discover
from llmemb_ray.errors import InputError, NotFound
from llmemb_ray.storage import Access, absolute, locate, redact

LINES = {".jsonl": "JSON lines", ".ndjson": "JSON lines", ".csv": "CSV", ".tsv": "TSV"}
"""Kinds by ending; a file of another one is taken for Parquet."""

BATCH_ROWS = 4096
FIRST_ROWS = 100
"""Of JSON lines: the columns of a file are those that any of them has."""
FIELD_CHARACTERS = 2**31 - 1
"""Of one CSV field; Python's own limit of 131,072 is less than a long document."""

Rows = Generator[dict[str, Any], None, None]

Choose = Callable[[Sequence[str]], Sequence[str]]
"""The columns of a file -> those that are wanted of it; raises ConfigError where one is missing."""


def kind_of(url: str) -> str:
    return LINES.get(posixpath.splitext(url)[1].lower(), "Parquet")


def files_of(inputs: Sequence[str], access: Access, *, setting: str) -> list[str]:
    """URLs of files, and of those of any kind in directories and globs, in the order given and by name within each, none twice.

    Raises InputError for an input without files. A single file of lines is not looked at.
    """
    urls: dict[str, None] = {}
    for given in inputs:
        url = absolute(given)
        glob = any(character in url for character in "*?[")
        if not glob and kind_of(url) != "Parquet":
            urls[url] = None
            continue
        storage, name = locate(url, access)
        if not glob and storage.is_directory(name):
            endings = (*ENDINGS, *LINES)
            found = [one.url for one in discover([f"{url}/**/*"], access) if one.url.lower().endswith(endings)]
            if not found:
                raise InputError(f"{setting}: {redact(given)} holds no files named {', '.join('*' + ending for ending in endings)}")
        else:
            found = [one.url for one in discover([given], access)]
        urls |= dict.fromkeys(found)
    return list(urls)


def version(url: str, access: Access) -> list[Any]:
    """What changes with a file: its URL, size and version. Raises InputError where it is not there."""
    storage, name = locate(url, access)
    try:
        entry = storage.info(name)
    except NotFound as error:
        raise InputError(f"{error}; check the path") from error
    return [redact(url), entry.size, entry.version]


def columns_of(url: str, access: Access, *, setting: str) -> list[str]:
    """The file's columns: of JSON lines those of the first ``FIRST_ROWS`` rows; [] of a file without rows. Raises InputError."""
    seen: list[str] = []

    def keep(names: Sequence[str]) -> Sequence[str]:
        seen.extend(names)
        return names[:1]

    with contextlib.closing(read(url, access, keep, setting=setting)) as rows:
        next(rows, None)
    return seen


def read(url: str, access: Access, choose: Choose, *, setting: str) -> Rows:
    """Values of each row by column. ``choose`` is called once, before the first row; rows of JSON lines and CSV hold other columns too, and
    those of JSON lines only their own, which need not be among those of the file.

    setting: named in messages. Raises InputError for a file that is not there or malformed, with its line.
    """
    kind = kind_of(url)
    if kind == "JSON lines":
        return _json_lines(url, access, choose, setting)
    return _parquet(url, access, choose, setting) if kind == "Parquet" else _csv(url, access, choose, "\t" if kind == "TSV" else ",", setting)


def text_problem(value: Any) -> str | None:
    """Why a value is no text: 'null', 'not text', 'empty' (nothing but white space), 'not valid Unicode' (JSON's lone surrogates); None if it is one."""
    if value is None:
        return "null"
    if not isinstance(value, str):
        return "not text"
    if not value.strip():
        return "empty"
    return None if is_unicode(value) else "not valid Unicode"


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def text_lines(url: str, access: Access, *, setting: str) -> Iterator[str]:
    """The lines of a text file with their ends. Raises InputError."""
    storage, name = locate(url, access)
    try:
        with io.TextIOWrapper(storage.open(name), encoding="utf-8-sig", newline="") as lines:
            yield from lines
    except NotFound as error:
        raise InputError(f"{setting}: {error}; check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{setting}: {redact(url)} is not UTF-8: {error.reason} at byte {error.start} of a block; write it as UTF-8") from error


def _parquet(url: str, access: Access, choose: Choose, setting: str) -> Rows:
    storage, name = locate(url, access)
    try:
        with storage.open(name) as reader:
            file = parquet.opened(reader)
            for batch in file.iter_batches(BATCH_ROWS, columns=list(choose(file.schema_arrow.names))):
                yield from parquet.plain(pa.Table.from_batches([batch])).to_pylist()
    except NotFound as error:
        raise InputError(f"{setting}: {error}; check the path") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{setting}: {redact(url)} cannot be read as Parquet: {error}") from error


def _json_lines(url: str, access: Access, choose: Choose, setting: str) -> Rows:
    rows = _objects(url, access, setting)
    first = list(itertools.islice(rows, FIRST_ROWS))
    if first:
        choose(list(dict.fromkeys(name for row in first for name in row)))
    yield from first
    yield from rows


def _objects(url: str, access: Access, setting: str) -> Rows:
    shown = redact(url)
    for number, line in enumerate(text_lines(url, access, setting=setting), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{setting}: {shown} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f'{setting}: {shown} line {number} is no object; write {{"COLUMN": value, …}}')
        yield row


def _csv(url: str, access: Access, choose: Choose, delimiter: str, setting: str) -> Rows:
    csv.field_size_limit(min(FIELD_CHARACTERS, sys.maxsize))
    lines = csv.reader(text_lines(url, access, setting=setting), delimiter=delimiter, strict=True)
    try:
        names = next(lines, None)
        if names is None:
            return
        choose(names)
        for row in lines:
            if not row:
                continue
            if len(row) != len(names):
                raise InputError(
                    f"{setting}: {redact(url)} line {lines.line_num} has {len(row)} fields, its heading {len(names)}; quote fields that hold {delimiter!r}"
                )
            yield dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{setting}: {redact(url)} line {lines.line_num} is not CSV: {error}") from error
