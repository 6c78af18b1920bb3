"""One attempt at a unit: embed, write the shard, write the rejects, commit.

Invariant: an attempt starts only where no commit is visible, writes under names of its own, and commits last;
two attempts never mix. A row without a usable vector becomes a reject. The unit's accounts are its commit.
"""

from __future__ import annotations

import hashlib
import socket
import time
import uuid
from collections import Counter
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llmemb_ray.corpus.columns import id_values
from llmemb_ray.embedders.embedder import Embedder
from llmemb_ray.errors import NotFound
from llmemb_ray.pipeline import metrics
from llmemb_ray.pipeline.making import Computing, Isolation, Making, OnPack, Workshop
from llmemb_ray.pipeline.prepare import Job, Prepared, reject_table
from llmemb_ray.shards import commits, schema
from llmemb_ray.shards.commits import Commit
from llmemb_ray.shards.precision import Precision
from llmemb_ray.shards.receipt import NOT_FINITE
from llmemb_ray.shards.run import DATA, REJECTS
from llmemb_ray.storage import RETRIES

OWN_COLUMNS = ("n_tokens", "truncated", "prompt_hash", *schema.CHUNK_COLUMNS)
"""Behind the vector, before the kept columns."""


def existing(job: Job, unit: str) -> Commit | None:
    """The commit that stands for a unit, if any."""
    try:
        return commits.read(job.output, unit)
    except NotFound:
        return None


def run(
    job: Job,
    prepared: Prepared,
    embedder: Embedder,
    workshop: Workshop,
    *,
    on_pack: OnPack | None = None,
    isolation: Isolation | None = None,
    computing: Computing = nullcontext,
) -> Commit:
    """Makes one attempt and returns the commit: its own, or the one that already stood. Raises StorageError."""
    standing = existing(job, prepared.unit.name)
    if standing is not None:
        return standing
    precision = workshop.precision
    started = time.perf_counter()
    made = Making(job, prepared, embedder, workshop, on_pack, computing).vectors(isolation)
    seconds_making = time.perf_counter() - started
    metrics.Meter("embed", job.run_key).computed(made.work)
    problems = made.failed | _unusable(made.vectors, made.failed, precision)
    rows, vectors, rejected = made.rows, made.vectors, prepared.rejected
    copied = made.copies
    if problems:
        problems, bad = _of_texts(rows, problems)
        ids = id_values(rows["id"]) if "id" in rows.column_names else None
        rejected = pa.concat_tables([rejected, reject_table(prepared.unit.file, rows["source_row"].to_pylist(), ids, problems)])
        good = np.flatnonzero(~bad)
        rows, vectors = rows.take(pa.array(good)), vectors[good]
        copied = copied.take(good) if copied is not None else None
    started = time.perf_counter()
    attempt = uuid.uuid4().hex[:12]
    unit = prepared.unit
    metadata = {"run_key": job.run_key, "space": job.space, "unit": unit.name, "attempt": attempt} | precision.metadata
    values, clipped = precision.encode(vectors)
    if copied is not None and copied.raw is not None:
        values[copied.found] = copied.raw[copied.found]
    shard, shard_data = _write_shard(job, precision, unit.name, attempt, rows, values, metadata)
    rejects, rejects_data = None, b""
    if rejected.num_rows:
        rejects = f"{REJECTS}/{unit.name}-{attempt}.parquet"
        rejects_data = schema.encode_rejects(rejected, metadata)
        job.output.put(rejects, rejects_data)
    commit = Commit(
        unit=unit.name,
        attempt=attempt,
        file=unit.file,
        start=unit.start,
        rows=unit.rows,
        embedded=len(np.unique(rows["source_row"].to_numpy())),
        rejected=rejected.num_rows,
        filtered=prepared.filtered,
        null_ids=_null_ids(rows),
        vectors=rows.num_rows,
        copied=made.copied,
        reused=made.reused,
        clipped=clipped,
        mean_cosine=round(mean_cosine(vectors), 6),
        shard=shard,
        shard_bytes=len(shard_data),
        shard_sha256=hashlib.sha256(shard_data).hexdigest() if shard else "",
        rejects=rejects,
        rejects_bytes=len(rejects_data),
        rejects_sha256=hashlib.sha256(rejects_data).hexdigest() if rejects else "",
        reasons=dict(Counter(rejected["reason"].to_pylist())),
        tokens=made.tokens,
        tokens_computed=made.work.computed,
        tokens_padding=made.work.padding,
        tokens_shared=made.work.shared,
        tokens_shareable=made.work.shareable,
        tokens_copied=made.tokens_copied,
        truncated=int(np.count_nonzero(rows["truncated"].to_numpy())) if rows.num_rows else 0,
        backend=embedder.backend.name,
        token_budget=embedder.backend.token_budget,
        out_of_memory=made.work.out_of_memory,
        storage_retries=prepared.storage_retries + RETRIES.take(),
        seconds_model=round(made.work.seconds, 4),
        seconds_wait=round(seconds_making - made.work.seconds, 4),
        seconds_write=round(time.perf_counter() - started, 4),
        finished=time.time(),
        host=socket.gethostname(),
    )
    commits.write(job.output, commit)
    return commit


def _write_shard(
    job: Job, precision: Precision, unit: str, attempt: str, rows: pa.Table, values: npt.NDArray[Any], metadata: dict[str, Any]
) -> tuple[str | None, bytes]:
    if not rows.num_rows:
        return None, b""
    columns = {name: rows[name] for name in rows.column_names if name != "token_ids"}
    place = list(columns).index("source_row") + 1
    embedding = {"embedding": schema.embedding_column(values, precision.dtype)}
    ordered = dict(list(columns.items())[:place]) | embedding | {name: columns[name] for name in OWN_COLUMNS if name in columns} | columns
    data = schema.encode_shard(pa.table(ordered), metadata, vector_bytes=schema.vector_bytes(precision.dimension, precision.dtype))
    path = f"{DATA}/{unit}-{attempt}.parquet"
    job.output.put(path, data)
    return path, data


def _unusable(vectors: npt.NDArray[np.float32], failed: dict[int, Any], precision: Precision) -> dict[int, tuple[str, str]]:
    """Rows whose vector holds NaN or infinity (as written, so after a cast to float16) or is zero."""
    written = "float16" if precision.dtype == "float16" else "float32"
    with np.errstate(over="ignore"):
        finite = np.isfinite(vectors.astype(written)).all(axis=1)
    zero = ~vectors.any(axis=1)
    problems = {int(row): (NOT_FINITE, f"its vector is not finite in {written}") for row in np.flatnonzero(~finite)}
    problems |= {int(row): ("zero_vector", "its vector is zero") for row in np.flatnonzero(zero & finite)}
    return {row: problem for row, problem in problems.items() if row not in failed}


def _null_ids(rows: pa.Table) -> int:
    if "id" not in rows.column_names:
        return 0
    ids = rows.filter(pc.equal(rows["chunk"], 0))["id"] if "chunk" in rows.column_names else rows["id"]
    return int(ids.null_count)


def _of_texts(rows: pa.Table, problems: dict[int, tuple[str, str]]) -> tuple[dict[int, tuple[str, str]], npt.NDArray[np.bool_]]:
    """The problems by the first row of each text they concern, and all rows of these texts: a text is embedded whole or not at all."""
    source = rows["source_row"].to_numpy()
    bad = np.zeros(len(source), np.bool_)
    bad[list(problems)] = True
    if "chunk" not in rows.column_names:
        return problems, bad
    numbers = rows["chunk"].to_numpy()
    of_texts: dict[int, tuple[str, str]] = {}
    for row in sorted(problems):
        reason, detail = problems[row]
        of_texts.setdefault(row - int(numbers[row]), (reason, f"chunk {numbers[row]}: {detail}"))
    return of_texts, np.isin(source, source[bad])


def mean_cosine(vectors_ND: npt.NDArray[np.float32]) -> float:
    """Mean cosine over all pairs of vectors, from their sum; 0 for fewer than two."""
    count = len(vectors_ND)
    if count < 2:
        return 0.0
    norms = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    total = (vectors_ND / np.maximum(norms, 1e-12)).sum(axis=0, dtype=np.float64)
    return float((total @ total - count) / (count * (count - 1)))
