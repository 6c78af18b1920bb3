"""What was found, fit for people and programs: with texts read back from the corpus, as lines, JSON or a Parquet file.

Invariant: a text that cannot be read back leaves the result as it is, and the reason is told once. Texts are read
of a bounded number of results at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmemb_ray.corpus import lookup
from llmemb_ray.errors import printable
from llmemb_ray.search.exact import Hit
from llmemb_ray.search.exact import hits as hits_in
from llmemb_ray.search.queries import Queries
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Storage, redact

BEGINNING = 100
"""Characters of a text in a line of results."""

TEXT_ROWS = 20_000
"""Results whose texts are in memory at once."""

REASONS_SHOWN = 3

Texts = list[str | None]


def beginning(text: str) -> str:
    """What a line of results shows of a text."""
    return lookup.beginning(text, BEGINNING)


def texts_of(run: Run, hits: Sequence[Hit]) -> tuple[Texts, Counter[str]]:
    """(text of each hit, of a chunk its own part, None where it cannot be read back; reasons with their counts)."""
    found = lookup.texts_at(run.plan.files, run.plan.selection, run.storage.access, {(hit.source_file, hit.source_row) for hit in hits})
    texts: Texts = []
    missing: Counter[str] = Counter()
    for hit in hits:
        key = (hit.source_file, hit.source_row)
        text = found.texts.get(key)
        if text is None:
            missing[found.missing[key]] += 1
        texts.append(text[hit.chunk_start : hit.chunk_end] if text is not None else None)
    return texts, missing


def notes(run: Run, missing: Counter[str] | None, shown: int) -> list[str]:
    """Lines that say what the results lack: units not done yet, texts that are not there."""
    lines = []
    if run.receipt is None:
        units = sum(1 for _ in run.plan.units())
        lines.append(f"the run is not finished: {len(run.commits):,} of {units:,} units are committed, only those are searched")
    if missing:
        reasons = "; ".join(reason for reason, _ in missing.most_common(REASONS_SHOWN))
        more = f"; and {len(missing) - REASONS_SHOWN} more reasons" if len(missing) > REASONS_SHOWN else ""
        lines.append(f"no text for {missing.total():,} of {shown:,} results: {reasons}{more}")
    return lines


def lines(queries: Queries, hits: list[list[Hit]], texts: Texts | None) -> Iterator[str]:
    """Each query and below it its results: score, id (else file and row), the beginning of the text (``texts`` are of all hits in order)."""
    following = iter(texts or [])
    for query, found in zip(queries.texts, hits, strict=True):
        yield beginning(query)
        for hit in found:
            name = printable(str(hit.id)).replace("\n", "\\n") if hit.id is not None else f"file {hit.source_file} row {hit.source_row}"
            chunk = f" chunk {hit.chunk}" if hit.chunk is not None else ""
            text = next(following, None)
            yield f"  {hit.score:.4f}  {name}{chunk}" + (f"  {beginning(text)}" if text else "")


def to_json(run: Run, queries: Queries, hits: list[list[Hit]], texts: Texts | None) -> list[dict[str, Any]]:
    """One object a query; each hit with the URL of its source file, and its text unless ``texts`` is None."""
    rows = []
    following = iter(texts or [])
    for number, (query, found) in enumerate(zip(queries.texts, hits, strict=True)):
        shown = [
            {"rank": rank, **hit.to_dict(), "source_url": redact(run.plan.files[hit.source_file].url)}
            | ({"text": next(following)} if texts is not None else {})
            for rank, hit in enumerate(found, 1)
        ]
        rows.append({"query": query} | ({"query_id": queries.ids[number]} if queries.ids is not None else {}) | {"hits": shown})
    return rows


def write_parquet(run: Run, queries: Queries, table: pa.Table, output: tuple[Storage, str], *, text: bool) -> Counter[str]:
    """Writes results (``exact.results``) to one Parquet file and returns why texts are missing.

    Columns: query, query_id (where there are ids), rank, score, id, source_file, source_row, chunk columns, text.
    """
    missing: Counter[str] = Counter()
    names, ids = pa.array(queries.texts, pa.string()), pa.array(queries.ids) if queries.ids is not None else None
    sink = pa.BufferOutputStream()
    writer: pq.ParquetWriter | None = None
    for start in range(0, max(1, table.num_rows), TEXT_ROWS):
        part = table.slice(start, TEXT_ROWS)
        columns = {"query": names.take(part["query"])} | ({"query_id": ids.take(part["query"])} if ids is not None else {})
        columns |= {name: part[name] for name in part.column_names if name != "query"}
        if text:
            found, reasons = texts_of(run, hits_in(part))
            columns["text"] = pa.array(found, pa.string())
            missing += reasons
        rows = pa.table(columns)
        writer = writer or pq.ParquetWriter(sink, rows.schema, compression="ZSTD")
        writer.write_table(rows)
    assert writer is not None
    writer.close()
    storage, name = output
    storage.put(name, memoryview(sink.getvalue()))
    return missing
