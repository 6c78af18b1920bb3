"""The search that the command runs: queries from the command line or a file, on this machine or a cluster.

Invariant: what cannot work (no run, no model, a file in the way) is told before the shards are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from llmemb_ray.config import SearchSettings
from llmemb_ray.errors import OutputError
from llmemb_ray.search import exact
from llmemb_ray.search.queries import Queries, read_queries
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Storage, absolute, locate, redact


@dataclass(frozen=True)
class Found:
    """table: ``exact.results``; output: where they are to be written, if to a file."""

    run: Run
    queries: Queries
    table: pa.Table
    output: tuple[Storage, str] | None


def find(settings: SearchSettings) -> Found:
    """Raises ConfigError, InputError, OutputError, ModelError, StorageError or RunFailed."""
    run = Run(Storage(absolute(settings.run), settings.access))
    output = locate(absolute(settings.out), settings.access) if settings.out else None
    if output is not None and output[0].exists(output[1]) and not settings.overwrite:
        raise OutputError(f"out: {redact(settings.out or '')} is there already; name another file, or replace it with overwrite")
    if settings.queries is not None:
        queries = read_queries(settings.queries, settings.access, query_column=settings.query_column, id_column=settings.query_id_column)
    else:
        queries = Queries(settings.text)
    chosen = settings.model_dump(include={"model", "trust_remote_code", "allow_pickle"})
    if not settings.on_cluster and settings.ray_address is None:
        vectors = exact.embed_queries(exact.load_embedder(run, settings.access, **chosen), queries.texts)
        return Found(run, queries, exact.search_table(run, vectors, top_k=settings.top_k), output)
    from llmemb_ray.connection import connected
    from llmemb_ray.search import cluster

    with connected(settings.ray_address):
        vectors = cluster.embed_queries(run, queries.texts, **chosen)
        return Found(run, queries, cluster.search_table(run, vectors, top_k=settings.top_k), output)
