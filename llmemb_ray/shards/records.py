"""Records of units that are done: one small object each, and one file for all of a finished run.

Invariant: a record stands whole at one key a unit, and what it names lies in OUT: who can write a record cannot have a file elsewhere read.
What it says of the unit is for its own class to tell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, Generic, TypeVar

import pyarrow as pa

from llmemb_ray import parquet
from llmemb_ray.errors import NotFound, OutputError
from llmemb_ray.storage import Storage, is_temporary

DIRECTORY = "_llmemb/commits"
COMPACTED = "_llmemb/commits.parquet"
"""All records of a finished run in one file."""

Record = TypeVar("Record")
"""A dataclass of integers, floats, strings and dictionaries, with a field ``unit``."""


_INSIDE = re.compile(r"(?:[A-Za-z0-9_=-][A-Za-z0-9._=-]*/)*[A-Za-z0-9_=-][A-Za-z0-9._=-]*")
_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "str": (str,), "str | None": (str, type(None)), "dict[str, int]": (dict,)}


def path(unit: str) -> str:
    return f"{DIRECTORY}/{unit}.json"


def inside(named: Any, origin: str, *, remedy: str = "put it back as it was, or delete it and embed its unit again") -> str:
    """A path that a record names, relative to OUT. Raises OutputError where it would lead elsewhere. origin: the record."""
    if not isinstance(named, str) or not _INSIDE.fullmatch(named):
        raise OutputError(f"{origin} names {named!r}, which is no file of this output; the record was altered: {remedy}")
    return named


class Records(Generic[Record]):
    """Those of one class."""

    def __init__(self, kind: type[Record]) -> None:
        self._kind = kind
        types: dict[str, str] = {field.name: str(field.type) for field in fields(kind)}  # type: ignore[arg-type]
        self._types = types
        self._nested = [name for name, type_ in types.items() if type_.startswith("dict")]
        known = {"int": pa.int64(), "float": pa.float64()}
        self._schema = pa.schema([(name, known.get(type_, pa.string())) for name, type_ in types.items()])

    def encoded(self, record: Record) -> bytes:
        return json.dumps(asdict(record), sort_keys=True).encode()  # type: ignore[call-overload]

    def decoded(self, data: bytes, origin: str) -> Record:
        """Raises OutputError. origin: as it is named there."""
        try:
            return self._made(json.loads(data), origin)
        except (ValueError, TypeError, RecursionError) as error:
            raise OutputError(f"{origin} is no commit record of this version: {error}") from error

    def _made(self, values: dict[str, Any], origin: str) -> Record:
        """Raises OutputError, and TypeError for values of other types than the fields have."""
        record = self._kind(**values)
        for name, type_ in self._types.items():
            value = getattr(record, name)
            if not isinstance(value, _TYPES[type_]) or (isinstance(value, dict) and not all(isinstance(count, int) for count in value.values())):
                raise TypeError(f"its {name} is no {type_}")
        for name in ("unit", "shard", "rejects"):
            if getattr(record, name) is not None:
                inside(getattr(record, name), origin)
        return record

    def committed_units(self, storage: Storage) -> set[str]:
        """Names of the units that are done: those with a record of their own, by listing alone, and the compacted ones."""
        return _single_units(storage) | {record.unit for record in self._compacted(storage)}  # type: ignore[attr-defined]

    def read(self, storage: Storage, unit: str) -> Record:
        return self.decoded(storage.read(path(unit)), storage.display(path(unit)))

    def write(self, storage: Storage, record: Record) -> None:
        storage.put(path(record.unit), self.encoded(record))  # type: ignore[attr-defined]

    def read_all(self, storage: Storage) -> list[Record]:
        """The record that stands for each unit, compacted or not, by unit."""
        records = {record.unit: record for record in self._compacted(storage)}  # type: ignore[attr-defined]
        single = sorted(_single_units(storage) - set(records))
        records |= zip(single, storage.map(lambda unit: self.read(storage, unit), single), strict=True)
        return [records[unit] for unit in sorted(records)]

    def compact(self, storage: Storage, records: Sequence[Record]) -> None:
        """Writes all records into one file, then removes the single ones. Stopped in between, nothing is lost."""
        rows: list[dict[str, Any]] = [asdict(record) for record in records]  # type: ignore[call-overload]
        for row in rows:
            row |= {name: json.dumps(row[name]) for name in self._nested}
        storage.put(COMPACTED, parquet.to_bytes(pa.Table.from_pylist(rows, schema=self._schema)))
        storage.delete([entry.path for entry in storage.list(DIRECTORY)])

    def _compacted(self, storage: Storage) -> list[Record]:
        try:
            data = storage.read(COMPACTED)
        except NotFound:
            return []
        try:
            rows = parquet.read(data).to_pylist()
            return [self._made(row | {name: json.loads(row[name]) for name in self._nested}, storage.display(COMPACTED)) for row in rows]
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise OutputError(f"{storage.display(COMPACTED)} holds no commit records of this version: {error}") from error


def _single_units(storage: Storage) -> set[str]:
    names = (entry.path.rsplit("/", 1)[1] for entry in storage.list(DIRECTORY) if not is_temporary(entry.path))
    return {name.removesuffix(".json") for name in names if name.endswith(".json")}
