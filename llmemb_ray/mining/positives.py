"""The texts of the positives, also of those that are named by their ids in the corpus, and all that is known to be a positive of a query.

Invariant: a query's positives are those of every row with the same query, so that what is a positive in one row is a negative in none.
Memory holds ids and keys of positives, about 100 and 16 bytes each; of texts, one part's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmemb_ray import parquet
from llmemb_ray.corpus import lookup
from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.mining import equality, pairs
from llmemb_ray.mining.equality import Ints
from llmemb_ray.mining.pairs import Bad
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Storage

DIRECTORY = "positives"

SCHEMA = pa.schema([("id", pa.int64()), ("pair", pa.int64()), ("text", pa.string()), ("positive_id", pa.string())])
"""id: place in the part; pair: place of the query in its part."""

NOT_IN_CORPUS = "positive not in the corpus"


def read(output: Storage, path: str) -> pa.Table:
    with output.open(path) as reader:
        return parquet.read(reader)


@dataclass(frozen=True)
class Known:
    """anchors, positives: int64 [P], keys of all pairs, sorted by anchor."""

    anchors: Ints
    positives: Ints

    def of(self, anchor: int) -> Ints:
        """Keys of all positives of a query."""
        return self.positives[np.searchsorted(self.anchors, anchor) : np.searchsorted(self.anchors, anchor, side="right")]

    @property
    def texts(self) -> Ints:
        """Sorted keys of all queries and positives."""
        return np.unique(np.concatenate([self.anchors, self.positives]))


def write(output: Storage, parts: Sequence[str], run: Run, *, by_id: bool) -> dict[str, int]:
    """Writes the positives of each part; returns counts: positives, missing (ids that the corpus does not have), rejected (queries left without).

    Raises ConfigError where the corpus has no ids, InputError where no positive is in it or its files changed.
    """
    known = _places_of(run, _ids(output, parts)) if by_id else {}
    counts = {"positives": 0, "missing": 0, "rejected": 0}
    for name in parts:
        table = read(output, f"{pairs.DIRECTORY}/{name}")
        texts = texts_at(run, {known[id_] for ids in table["positive_ids"].to_pylist() for id_ in ids if id_ in known}) if by_id else {}
        rows, bad = [], []
        for pair in table.to_pylist():
            found = [(texts[known[id_]], id_) for id_ in pair["positive_ids"] if id_ in known]
            counts["missing"] += len(pair["positive_ids"]) - len(found)
            found += [(text, None) for text in pair["positives"]]
            rows += [{"pair": pair["id"], "text": text, "positive_id": id_} for text, id_ in found]
            if not found:
                detail = f"the corpus has no row with id {', '.join(pair['positive_ids'][:3])}"
                bad.append(Bad(**{field: pair[field] for field in ("query_file", "query_row", "query_id")}, reason=NOT_IN_CORPUS, detail=detail))
        if bad:
            pairs.write_rejects(output, f"positives-{name}", bad)
        if rows:
            output.put(f"{DIRECTORY}/{name}", parquet.to_bytes(pa.Table.from_pylist([{"id": number} | row for number, row in enumerate(rows)], schema=SCHEMA)))
        counts["positives"] += len(rows)
        counts["rejected"] += len(bad)
    if not counts["positives"]:
        raise InputError(f"queries: none of {counts['missing']:,} ids of positives is in the corpus of {run.url}; check positive_id_column and id_column")
    return counts


def known(output: Storage, parts: Sequence[str]) -> Known:
    """All pairs of query and positive, by their keys."""
    anchors, positives = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for name in parts:
        of_pairs = equality.keys(read(output, f"{pairs.DIRECTORY}/{name}")["anchor"].to_pylist())
        for table in part(output, name):
            anchors.append(of_pairs[table["pair"].to_numpy()])
            positives.append(equality.keys(table["text"].to_pylist()))
    left, right = np.concatenate(anchors), np.concatenate(positives)
    order = np.argsort(left, kind="stable")
    return Known(left[order], right[order])


def part(output: Storage, name: str) -> Iterator[pa.Table]:
    """The positives of a part; nothing if it has none."""
    if output.exists(f"{DIRECTORY}/{name}"):
        yield read(output, f"{DIRECTORY}/{name}")


def _ids(output: Storage, parts: Sequence[str]) -> pa.Array:
    found = [pa.array([], pa.string())]
    for name in parts:
        ids = read(output, f"{pairs.DIRECTORY}/{name}")["positive_ids"].combine_chunks()
        found.append(pc.unique(ids.flatten()).cast(pa.string()))
    return pc.unique(pa.concat_arrays(found))


def _places_of(run: Run, wanted: pa.Array) -> dict[str, lookup.RowKey]:
    """File and row of each id that the corpus has; of an id that it has several times, the first."""
    if run.plan.selection.id is None:
        raise ConfigError(f"positive_id_column: the corpus of {run.url} has no ids; name its column of ids with id_column")
    places: dict[str, lookup.RowKey] = {}
    for table in run.light_tables(["id", "source_file", "source_row"]):
        try:
            ids = table["id"].cast(pa.string())
        except pa.ArrowInvalid as error:
            raise InputError(f"positive_id_column: the ids of {run.url} cannot be written as text: {error}; give the positives as texts") from error
        rows = table.set_column(table.column_names.index("id"), "id", ids).filter(pc.is_in(ids, value_set=wanted))
        for id_, file, row in zip(*(rows[name].to_pylist() for name in ("id", "source_file", "source_row")), strict=True):
            places.setdefault(id_, (file, row))
    return places


def texts_at(run: Run, wanted: set[lookup.RowKey]) -> dict[lookup.RowKey, str]:
    """Texts of the corpus by file and row. Raises InputError for one that cannot be read back."""
    found = lookup.texts_at(run.plan.files, run.plan.selection, run.storage.access, wanted)
    for why in found.missing.values():
        raise InputError(f"corpus: {len(found.missing):,} texts cannot be read back: {why}")
    return found.texts
