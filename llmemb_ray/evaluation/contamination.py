"""Which texts of an evaluation stand in training files too: exact match ignoring case and white space (paper 2, appendix B).

Invariant: memory holds the distinct texts of the evaluation, never the training files, which are streamed. Every string of a training
file is looked at, whatever its column, but for the heading of CSV and TSV; a list of strings is looked at string by string.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import posixpath
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llmemb_ray.errors import ConfigError, InputError, NotFound
from llmemb_ray.evaluation.tables import table
from llmemb_ray.storage import Access, absolute, locate, redact

EXAMPLES = 5
"""Texts shown of each task."""

EXAMPLE_CHARACTERS = 200

TASKS_SHOWN, EXAMPLES_SHOWN = 24, 10
"""In a terminal: the tasks with the largest shares, and some texts."""

BATCH_ROWS = 4096
"""Rows of Parquet decoded at a time."""

COLUMNS, OTHERS = 1000, "(others)"
"""Columns of a file told apart, and the name of all others: the keys of JSON objects may be data."""

FIELD_CHARACTERS = 2**31 - 1
"""Of one CSV field; Python's own limit of 131,072 is less than a long document."""

KINDS = {".parquet": "parquet", ".pq": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "text"}
"""By the ending of a file's name, that of compression (.gz) left out; any other is text with a text a line."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One task. texts: as the suite has them; distinct: ignoring case and white space; found: distinct ones that stand in training files."""

    texts: int
    distinct: int
    found: int
    examples: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the distinct texts."""
        return self.found / self.distinct if self.distinct else 0.0


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a training file. strings: looked at; matches: of these, those that are texts of the evaluation; distinct: different ones."""

    file: str
    column: str
    strings: int
    matches: int
    distinct: int


@dataclass(frozen=True, kw_only=True)
class Contamination:
    tasks: dict[str, Found]
    columns: list[Column]

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        for name, task in self.tasks.items():
            found["tasks"][name]["share"] = task.share
        return found

    def lines(self) -> list[str]:
        """For a terminal: a table of the tasks, then of the training columns, then examples."""
        named = list(self.tasks.items())
        if len(named) > TASKS_SHOWN:
            named = sorted(named, key=lambda pair: -pair[1].share)[:TASKS_SHOWN]
        tasks = [[name, f"{task.texts:,}", f"{task.distinct:,}", f"{task.found:,}", f"{task.share:.2%}"] for name, task in named]
        told = ["contamination: texts that stand in the training files too, ignoring case and white space"]
        told += table(["task", "texts", "distinct", "found", "share"], tasks)
        rest = [task for name, task in self.tasks.items() if name not in dict(named)]
        if rest:
            found = [task.found for task in rest if task.found]
            told.append(f"… and {len(rest):,} more tasks with smaller shares, of which {len(found):,} have {sum(found):,} texts found; all stand in the record")
        columns = [
            [posixpath.basename(column.file), column.column, f"{column.strings:,}", f"{column.matches:,}", f"{column.distinct:,}"] for column in self.columns
        ]
        told += ["", *table(["training file", "column", "strings", "matches", "distinct"], columns, words=2)]
        examples = {normal(example): f"{name}: {example!r}" for name, task in named for example in task.examples[:2]}
        return told + (["", "examples", *list(examples.values())[:EXAMPLES_SHOWN]] if examples else [])


def from_dict(data: Mapping[str, Any]) -> Contamination:
    """The inverse of ``to_dict``."""
    tasks = {name: Found(**{key: value for key, value in task.items() if key != "share"}) for name, task in data["tasks"].items()}
    return Contamination(tasks=tasks, columns=[Column(**column) for column in data["columns"]])


def normal(text: str) -> str:
    """Without case and without any white space."""
    return "".join(text.casefold().split())


def check(training: Sequence[str], texts_by_task: Mapping[str, Sequence[str]], access: Access | None = None) -> Contamination:
    """Looks for the texts of tasks in training files, directories of them, or URLs.

    Raises InputError for a file that is missing or malformed, naming its line; ConfigError where no file is named.
    """
    if not training:
        raise ConfigError("contamination: name at least one training file")
    wanted = {name: dict.fromkeys(key for text in texts if (key := normal(text))) for name, texts in texts_by_task.items()}
    known = {key for keys in wanted.values() for key in keys}
    seen: set[str] = set()
    columns = [column for url in _files(training, access or Access()) for column in _scan(url, access or Access(), known, seen)]
    tasks = {}
    for name, texts in texts_by_task.items():
        hits = wanted[name].keys() & seen
        examples: dict[str, str] = {}
        for text in texts:
            if len(examples) == EXAMPLES:
                break
            if (key := normal(text)) in hits:
                examples.setdefault(key, text[:EXAMPLE_CHARACTERS])
        tasks[name] = Found(texts=len(texts), distinct=len(wanted[name]), found=len(hits), examples=list(examples.values()))
    return Contamination(tasks=tasks, columns=columns)


def keys(files: Sequence[str], access: Access) -> frozenset[str]:
    """What ``normal`` makes of every string in files of evaluation texts, or directories of them. Raises as ``check`` does."""
    return frozenset(key for url in _files(files, access) for _, text in _strings(url, access) if (key := normal(text)))


def _files(training: Sequence[str], access: Access) -> Iterator[str]:
    for named in training:
        url = absolute(named)
        storage, name = locate(url, access)
        if not storage.is_directory(name):
            yield url
            continue
        entries = [entry.path for entry in storage.list(name) if not posixpath.basename(entry.path).startswith((".", "_"))]
        if not entries:
            raise InputError(f"contamination: there is no file in {redact(named)}")
        yield from (posixpath.join(posixpath.dirname(url), path) for path in entries)


def _scan(url: str, access: Access, known: set[str], seen: set[str]) -> list[Column]:
    """Goes through a file; texts found join ``seen``."""
    strings: dict[str, int] = {}
    matches: dict[str, int] = {}
    distinct: dict[str, set[str]] = {}
    for name, value in _strings(url, access):
        column = name if name in strings or len(strings) < COLUMNS else OTHERS
        strings[column] = strings.get(column, 0) + 1
        key = normal(value)
        if key in known:
            matches[column] = matches.get(column, 0) + 1
            distinct.setdefault(column, set()).add(key)
    for keys in distinct.values():
        seen |= keys
    return [
        Column(file=redact(url), column=column, strings=count, matches=matches.get(column, 0), distinct=len(distinct.get(column, ())))
        for column, count in strings.items()
    ]


def _strings(url: str, access: Access) -> Iterator[tuple[str, str]]:
    """(column, string) of all strings of a file."""
    storage, name = locate(url, access)
    compressed = name.endswith(".gz")
    kind = KINDS.get(posixpath.splitext(name.removesuffix(".gz"))[1].lower(), "text")
    try:
        with contextlib.ExitStack() as stack:
            binary: Any = stack.enter_context(storage.open(name))
            if kind == "parquet":
                yield from _parquet(binary, url)
                return
            if compressed:
                binary = stack.enter_context(gzip.open(binary, "rb"))
            text = stack.enter_context(io.TextIOWrapper(binary, encoding="utf-8-sig", newline="" if kind in ("csv", "tsv") else "\n"))
            yield from {"json": _json, "csv": _delimited, "tsv": _delimited, "text": _plain}[kind](text, url)
    except NotFound as error:
        raise InputError(f"contamination: {redact(url)} is not there") from error
    except UnicodeDecodeError as error:
        raise InputError(f"contamination: {redact(url)} is not UTF-8: {error.reason}; write it as UTF-8 first") from error
    except EOFError as error:
        raise InputError(f"contamination: {redact(url)} ends too soon: {error}") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"contamination: {redact(url)} is not what gzip wrote: {error}") from error


def _parquet(binary: Any, url: str) -> Iterator[tuple[str, str]]:
    import pyarrow as pa

    from llmemb_ray import parquet

    try:
        for batch in parquet.opened(binary).iter_batches(batch_size=BATCH_ROWS):
            table = parquet.plain(pa.Table.from_batches([batch]))
            for name, column in zip(table.schema.names, table.columns, strict=True):
                if _holds_text(column.type):
                    yield from ((path, text) for value in column.to_pylist() for path, text in _inside(value, name))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"contamination: {redact(url)} cannot be read as Parquet: {error}") from error


def _holds_text(kind: Any) -> bool:
    """Whether a column of this type can hold strings; a column of vectors is not decoded."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    if types.is_struct(kind) or types.is_map(kind) or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return any(_holds_text(kind.field(index).type) for index in range(kind.num_fields))
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _inside(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """All strings of a nested value; those of a mapping under ``name.key``."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _inside(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _inside(item, name)


def _json(text: io.TextIOWrapper, url: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(f"contamination: {redact(url)} line {number} is not JSON: {error}; one JSON value a line is wanted") from error
        yield from ((name or "value", found) for name, found in _inside(value, ""))


def _delimited(text: io.TextIOWrapper, url: str) -> Iterator[tuple[str, str]]:
    """The first line names the columns."""
    tabs = ".tsv" in posixpath.basename(url).lower()
    csv.field_size_limit(min(FIELD_CHARACTERS, sys.maxsize))
    reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(text)
    names: list[str] = []
    try:
        for row in reader:
            if not names:
                names = row
                continue
            for place, value in enumerate(row):
                yield names[place] if place < len(names) else f"column {place + 1}", value
    except csv.Error as error:
        raise InputError(f"contamination: {redact(url)} line {reader.line_num}: {error}") from error


def _plain(text: io.TextIOWrapper, url: str) -> Iterator[tuple[str, str]]:
    for line in text:
        if line.strip():
            yield "line", line
