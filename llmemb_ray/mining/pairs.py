"""Queries with their positives, read from files of any size and written in parts that everything later goes by.

Invariant: a row of the files is in one part or among the rejects, with its file and row; memory holds one part, and the judgements where
they come from a file of their own. A part is as many queries as are searched for at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from llmemb_ray import parquet
from llmemb_ray.config import MineSettings
from llmemb_ray.corpus import rows as corpus_rows
from llmemb_ray.corpus.rows import version as version
from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.storage import Access, Storage, absolute, redact

DIRECTORY, REJECTS = "pairs", "rejects"

QUERY_NAMES, POSITIVE_NAMES, POSITIVE_ID_NAMES, ID_NAMES = (
    ("query", "anchor", "text", "sent0"),
    ("positive", "pos", "sent1"),
    ("positive_id", "positive_ids"),
    ("query_id", "id", "_id"),
)
"""Columns taken, the first that is there, where none is named."""

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("query_file", pa.int32()),
        ("query_row", pa.int64()),
        ("query_id", pa.string()),
        ("anchor", pa.string()),
        ("positives", pa.list_(pa.string())),
        ("positive_ids", pa.list_(pa.string())),
    ]
)
"""Of a part. id: place in the part; query_file, query_row: where it was read, from 0; positives: texts, or none where there are ids."""

REJECT_SCHEMA = pa.schema([("query_file", pa.int32()), ("query_row", pa.int64()), ("query_id", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names in the files. One of positive, positive_id is given, unless there are judgements."""

    query: str
    positive: str | None
    positive_id: str | None
    query_id: str | None

    @property
    def names(self) -> list[str]:
        return [name for name in dict.fromkeys((self.query, self.positive, self.positive_id, self.query_id)) if name]


@dataclass(frozen=True, kw_only=True)
class Written:
    """files: URLs of what was read; parts: names of the files written; rows: read; pairs: rows in the parts; by_id: whether positives are ids;
    reasons: rejects by reason.
    """

    files: list[str]
    parts: list[str]
    rows: int
    pairs: int
    by_id: bool
    reasons: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A row that is no query with a positive."""

    query_file: int
    query_row: int
    query_id: str | None
    reason: str
    detail: str


def part_name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def files_of(settings: MineSettings) -> list[str]:
    """URLs of the files that the settings name. Raises InputError or ConfigError."""
    return corpus_rows.files_of(settings.queries, settings.access, setting="queries")


def write(settings: MineSettings, files: Sequence[str], output: Storage) -> Written:
    """Reads all files and writes the parts and what was rejected.

    Raises ConfigError for a column that is not there, InputError for a file that cannot be read or where no row is a query with a positive.
    """
    access = settings.access
    judged = read_qrels(settings.qrels, access) if settings.qrels else None
    parts: list[str] = []
    rows = pairs = flushed = 0
    held: list[dict[str, Any]] = []
    bad: list[Bad] = []
    reasons: Counter[str] = Counter()
    by_id = judged is not None
    last: Bad | None = None

    def flush() -> None:
        nonlocal held, bad, pairs, flushed
        name = part_name(len(parts))
        if bad:
            write_rejects(output, f"read-{part_name(flushed)}", bad)
        if held:
            table = pa.Table.from_pylist([{"id": number} | row for number, row in enumerate(held)], schema=SCHEMA)
            output.put(f"{DIRECTORY}/{name}", parquet.to_bytes(table))
            parts.append(name)
            pairs += len(held)
        held, bad, flushed = [], [], flushed + 1

    columns: Columns
    for file, url in enumerate(files):

        def choose(names: Sequence[str], url: str = url) -> Sequence[str]:
            nonlocal columns
            columns = _columns(settings, names, redact(url))
            return columns.names

        for number, values in enumerate(corpus_rows.read(url, access, choose, setting="queries")):
            by_id = by_id or columns.positive_id is not None
            made = _row(values, columns, judged, file, number)
            rows += 1
            if isinstance(made, Bad):
                bad.append(made)
                reasons[made.reason] += 1
                last = made
            else:
                held.append(made)
            if len(held) >= settings.block_queries or len(bad) >= settings.block_queries:
                flush()
    flush()
    if not pairs:
        why = f": file {redact(files[last.query_file])} row {last.query_row}: {last.detail}" if last else ""
        raise InputError(f"queries: none of {rows:,} rows is a query with a positive{why}")
    return Written(files=[redact(url) for url in files], parts=parts, rows=rows, pairs=pairs, by_id=by_id, reasons=dict(reasons))


def read_qrels(url: str, access: Access) -> dict[str, list[str]]:
    """Ids of the positives by id of the query. Raises InputError at a line that is malformed."""
    shown = redact(url)
    judged: dict[str, list[str]] = {}
    for number, line in enumerate(corpus_rows.text_lines(absolute(url), access, setting="qrels"), 1):
        fields = line.rstrip("\r\n").split("\t")
        if (number == 1 and not _is_number(fields[-1])) or not line.strip():
            continue
        if len(fields) != 3 or not _is_number(fields[2]):
            raise InputError(f"qrels: {shown} line {number} is not query-id, corpus-id and score between tabs; give BEIR's file qrels/SPLIT.tsv")
        if float(fields[2]) > 0:
            judged.setdefault(fields[0], []).append(fields[1])
    return judged


def write_rejects(output: Storage, name: str, bad: Sequence[Bad]) -> None:
    output.put(f"{REJECTS}/{name}", parquet.to_bytes(pa.Table.from_pylist([vars(one) for one in bad], schema=REJECT_SCHEMA)))


def _columns(settings: MineSettings, names: Sequence[str], shown: str) -> Columns:
    def find(setting: str, usual: Sequence[str], what: str = "") -> str | None:
        named = getattr(settings, setting)
        if named is not None and named not in names:
            raise ConfigError(f"{setting}: {shown} has no column {named!r}; its columns are {', '.join(names)}")
        found = named or next((name for name in usual if name in names), None)
        if found is None and what:
            raise ConfigError(f"{setting}: {shown} has no column {' or '.join(usual)} {what}; name one of {', '.join(names)}")
        return found

    query, query_id = find("query_column", QUERY_NAMES, "of the queries"), find("query_id_column", ID_NAMES)
    assert query is not None
    if settings.qrels:
        if query_id is None:
            raise ConfigError(f"query_id_column: {shown} has no column {' or '.join(ID_NAMES)}, which qrels goes by; name one of {', '.join(names)}")
        return Columns(query=query, positive=None, positive_id=None, query_id=query_id)
    named = find("positive_id_column", ()) if settings.positive_id_column else None
    positive = None if named else find("positive_column", POSITIVE_NAMES)
    positive_id = named or (None if positive else find("positive_id_column", POSITIVE_ID_NAMES))
    if positive is None and positive_id is None:
        raise ConfigError(
            f"positive_column: {shown} has no column {' or '.join((*POSITIVE_NAMES, *POSITIVE_ID_NAMES))}; "
            f"name one of {', '.join(names)} with positive_column or positive_id_column, or give qrels"
        )
    return Columns(query=query, positive=positive, positive_id=positive_id, query_id=query_id)


def _row(values: dict[str, Any], columns: Columns, judged: dict[str, list[str]] | None, file: int, number: int) -> dict[str, Any] | Bad:
    id_name = columns.query_id or next((name for name in ID_NAMES if name in values), None)  # Rows of JSON lines may have what their file's first lack.
    id_ = values.get(id_name) if id_name else None
    query_id = None if id_ is None else str(id_)
    sound = query_id is None or corpus_rows.is_unicode(query_id)

    def bad(reason: str, detail: str) -> Bad:
        return Bad(query_file=file, query_row=number, query_id=query_id if sound else None, reason=reason, detail=detail)

    anchor = values.get(columns.query)
    if problem := corpus_rows.text_problem(anchor):
        return bad(problem, f"column {columns.query!r}: {_shown(anchor)} is no text to search for")
    if not sound:
        return bad("not valid Unicode", f"column {id_name!r}: {_shown(query_id)} is no id of a query")
    if judged is not None:
        ids = judged.get(query_id or "", [])
        if not ids:
            return bad("no positive", f"column {columns.query_id!r}: qrels has no positive for query {query_id!r}")
        texts: list[str] = []
    else:
        name = columns.positive or columns.positive_id
        assert name is not None
        value = values.get(name)
        items = value if isinstance(value, list) else [value]
        if columns.positive:
            for item in items:
                if problem := corpus_rows.text_problem(item):
                    return bad(problem, f"column {name!r}: {_shown(item)} is no text of a positive")
            texts, ids = [str(item) for item in dict.fromkeys(items)], []
        else:
            if any(item is None or isinstance(item, dict | list) or item == "" for item in items):
                return bad("null", f"column {name!r}: {_shown(value)} is no id of a positive")
            texts, ids = [], list(dict.fromkeys(str(item) for item in items))
            if not all(map(corpus_rows.is_unicode, ids)):
                return bad("not valid Unicode", f"column {name!r}: {_shown(value)} is no id of a positive")
        if not texts and not ids:
            return bad("no positive", f"column {name!r}: the list is empty")
    return {"query_file": file, "query_row": number, "query_id": query_id, "anchor": anchor, "positives": texts, "positive_ids": ids}


def _shown(value: Any) -> str:
    return repr(value)[:60]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
