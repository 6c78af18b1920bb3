"""Exact search: the best rows of a run for some queries, by streaming its shards.

Invariant: queries are embedded with the run's own model and representation, in the query role. What is committed
is searched and nothing else. Memory holds row groups of vectors and the results, never the run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmemb_ray.config import ModelSettings
from llmemb_ray.corpus.columns import id_values
from llmemb_ray.embedders.embedder import Embedder, settle
from llmemb_ray.errors import InputError, RunMismatch
from llmemb_ray.representation.space import differences
from llmemb_ray.search.best import Best, Floats
from llmemb_ray.search.scan import check_queries, most_results, rows_at, scan, shards_of
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Access


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One row found, or one chunk of it. ``score`` is the cosine where the run's vectors are normalised, else the inner product."""

    score: float
    id: Any
    source_file: int
    """Index into ``run.plan.files``."""
    source_row: int
    chunk: int | None = None
    """Number of the chunk in its text; None where the run has no chunks."""
    chunk_start: int | None = None
    chunk_end: int | None = None
    """First and last+1 character of the chunk in its text."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_embedder(
    run: Run,
    access: Access | None = None,
    *,
    model: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Embedder:
    """The embedder that made a run's vectors. model: where its weights are now, if not where they were.

    trust_remote_code, allow_pickle: as settings of the embedding job; that the run was made with them does not count, its plan is a file like any other.
    Raises RunMismatch, field by field, if the model found is not in the run's space; ModelError if there is none.
    """
    settings, plan = run.plan.settings, run.plan
    commit = plan.space["model"]
    values: dict[str, Any] = {"model": model or plan.model_name, "adapter": plan.adapter_name}
    values |= {name: settings[name] for name in ("quantization", "rope_theta", "sliding_window") if name in settings}
    values |= {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    if model is None and not commit.startswith("sha256:"):
        values["revision"] = commit
    if access is not None:
        values |= {"endpoint_url": access.endpoint_url, "storage_options": access.options}
    spec = settle(ModelSettings.make(values), plan.representation)
    # A few queries are embedded sooner than vLLM has started, and both backends give the same vectors, unless weights are rounded.
    quantised = spec.stored or spec.quantization != "none"
    spec = replace(spec, backend=plan.engine["backend"] if quantised else "hf", backend_why="for queries")
    changed = list(differences(spec.space.to_dict(), plan.space))
    if changed:
        lines = "\n".join(f"  {name}: the run has {theirs!r}, {values['model']} has {ours!r}" for name, ours, theirs in changed)
        raise RunMismatch(f"{values['model']} is not in the vector space of {run.url}:\n{lines}")
    return Embedder(spec, device=device)


def embed_queries(embedder: Embedder, texts: list[str]) -> Floats:
    """float32 [Q, D]: the texts in the query role. Raises InputError naming the first query that is empty or cannot be embedded."""
    for number, text in enumerate(texts):
        if not text.strip():
            raise InputError(f"query {number} is empty; leave it out or write what to look for")
    embedded = embedder.encode_rows(texts, role="query")
    for number, reason in sorted(embedded.failed.items()):
        raise InputError(f"query {number} ({texts[number][:60]!r}): {reason}")
    return embedded.vectors


def search(run: Run, texts: list[str], *, top_k: int = 5, embedder: Embedder | None = None) -> list[list[Hit]]:
    """The ``top_k`` best rows for each text, best first; ties in the order of the corpus. Of an unfinished run, what is committed.

    Raises InputError for an empty text; RunMismatch or ModelError where the run's model is not found.
    """
    if not texts:
        return []
    embedder = embedder or load_embedder(run, run.storage.access)
    return search_vectors(run, embed_queries(embedder, texts), top_k=top_k)


def search_vectors(run: Run, queries_QD: npt.NDArray[np.float32], *, top_k: int) -> list[list[Hit]]:
    """queries_QD: float32 [Q, D] in the run's space."""
    return hits_of(search_table(run, queries_QD, top_k=top_k), len(queries_QD))


def search_table(run: Run, queries_QD: npt.NDArray[np.float32], *, top_k: int) -> pa.Table:
    """Like ``search_vectors`` for many queries: one row a result (``results``)."""
    queries_QD = check_queries(run, queries_QD)
    return results(run, scan(run.storage, run.precision, shards_of(run), queries_QD, most_results(run, top_k)))


def results(run: Run, best: Best) -> pa.Table:
    """query (int64, its number), rank (int32, from 1), score (float64), [id], source_file, source_row, [chunk, chunk_start, chunk_end];
    by query and rank.
    """
    queries, places = np.nonzero(best.positions_QK >= 0)
    table = rows_at(run, best.positions_QK[queries, places])
    own = {"query": pa.array(queries, pa.int64()), "rank": pa.array(places + 1, pa.int32()), "score": pa.array(best.scores_QK[queries, places])}
    return pa.table(own | {name: table[name] for name in table.column_names})


def hits_of(table: pa.Table, queries: int) -> list[list[Hit]]:
    """The rows of ``results`` as one list for each of the ``queries``."""
    found: list[list[Hit]] = [[] for _ in range(queries)]
    for query, hit in zip(table["query"].to_pylist(), hits(table), strict=True):
        found[query].append(hit)
    return found


def hits(table: pa.Table) -> list[Hit]:
    """The rows of ``results``, one after the other."""
    columns = {name: id_values(table[name]) if name == "id" else table[name].to_pylist() for name in table.column_names}
    columns.setdefault("id", [None] * table.num_rows)
    names = columns.keys() & Hit.__dataclass_fields__.keys()
    return [Hit(**{name: columns[name][row] for name in names}) for row in range(table.num_rows)]
