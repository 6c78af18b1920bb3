"""Triples as they are written: an anchor, a positive, its hard negatives, and where each came from.

Invariant: a part's triples stand in one file, written at once with their counts in its metadata, so that a part that is there is done.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from llmemb_ray import parquet
from llmemb_ray.errors import OutputError
from llmemb_ray.shards.schema import METADATA_KEY, metadata_of
from llmemb_ray.storage import Storage

DIRECTORY = "triples"

SCHEMA = pa.schema(
    [
        ("anchor", pa.string()),
        ("positive", pa.string()),
        ("negative", pa.list_(pa.string())),
        ("positive_score", pa.float64()),
        ("negative_scores", pa.list_(pa.float64())),
        ("negative_ranks", pa.list_(pa.int32())),
        ("query_file", pa.int32()),
        ("query_row", pa.int64()),
        ("query_id", pa.string()),
        ("positive_id", pa.string()),
        ("negative_ids", pa.list_(pa.string())),
        ("negative_files", pa.list_(pa.int32())),
        ("negative_rows", pa.list_(pa.int64())),
    ]
)
"""negative and the lists beside it are of equal length, by rank. Scores are inner products: cosines where vectors are normalised.
negative_files: index into the plan of the corpus' run."""


def write(output: Storage, name: str, rows: Sequence[Mapping[str, Any]], counts: Mapping[str, Any]) -> None:
    """counts: of the part, kept in the file's metadata."""
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    output.put(f"{DIRECTORY}/{name}", parquet.to_bytes(table.replace_schema_metadata({METADATA_KEY: json.dumps(counts).encode()})))


def written(output: Storage) -> set[str]:
    """Names of the parts that are there."""
    return {entry.path.removeprefix(f"{DIRECTORY}/") for entry in output.list(DIRECTORY) if entry.path.endswith(".parquet")}


def counts_of(output: Storage, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The counts of parts. Raises OutputError for a part that is broken."""
    for name in names:
        try:
            with output.open(f"{DIRECTORY}/{name}") as reader:
                yield metadata_of(parquet.opened(reader).schema_arrow)
        except (pa.ArrowException, OSError) as error:
            raise OutputError(f"{output.display(f'{DIRECTORY}/{name}')} cannot be read: {error}; delete it and run the command again") from error


def added(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums of counts, those by reason as well."""
    total: Counter[str] = Counter()
    by_reason: dict[str, Counter[str]] = {}
    for one in counts:
        for name, value in one.items():
            if isinstance(value, dict):
                by_reason.setdefault(name, Counter()).update(value)
            else:
                total[name] += value
    return dict(total) | {name: dict(values) for name, values in by_reason.items()}
