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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmemb_ray.corpus.columns import id_values
from llmemb_ray.embedders.embedder import Embedder
from llmemb_ray.embedders.work import Work
from llmemb_ray.errors import NotFound
from llmemb_ray.pipeline.prepare import Job, Prepared, reject_table
from llmemb_ray.representation import TokenRows
from llmemb_ray.shards import commits, schema
from llmemb_ray.shards.commits import Commit
from llmemb_ray.shards.run import DATA, REJECTS
from llmemb_ray.storage import RETRIES

OnPack = Callable[[int, int], None]
"""Called with (rows, tokens) of each pack that is done."""


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """How to embed a unit that has killed its engine before, so that the row at fault is found.

    ranges: row ranges to embed one after the other; ``entering(range)`` is called before each and outlives the process
    poison: rows known to kill the engine
    """

    ranges: list[tuple[int, int]]
    poison: frozenset[int] = frozenset()
    entering: Callable[[tuple[int, int]], None] = field(default=lambda _: None)


def existing(job: Job, unit: str) -> Commit | None:
    """The commit that stands for a unit, if any."""
    try:
        return commits.read(job.output, unit)
    except NotFound:
        return None


def run(job: Job, prepared: Prepared, embedder: Embedder, *, on_pack: OnPack | None = None, isolation: Isolation | None = None) -> Commit:
    """Makes one attempt and returns the commit: its own, or the one that already stood. Raises StorageError."""
    standing = existing(job, prepared.unit.name)
    if standing is not None:
        return standing
    started = time.perf_counter()
    vectors, failed, work = _embed(job, prepared, embedder, on_pack, isolation)
    seconds_model = time.perf_counter() - started
    problems = failed | _unusable(vectors, failed, job)
    rows = prepared.accepted
    good = np.setdiff1d(np.arange(rows.num_rows), np.fromiter(problems, np.int64, len(problems)))
    rejected = prepared.rejected
    if problems:
        ids = id_values(rows["id"]) if "id" in rows.column_names else None
        rejected = pa.concat_tables([rejected, reject_table(prepared.unit.file, rows["source_row"].to_pylist(), ids, problems)])
        rows, vectors = rows.take(pa.array(good)), vectors[good]
    started = time.perf_counter()
    attempt = uuid.uuid4().hex[:12]
    unit = prepared.unit
    metadata = {"run_key": job.run_key, "space": job.space, "unit": unit.name, "attempt": attempt}
    shard, shard_data = _write_shard(job, unit.name, attempt, rows, vectors, metadata)
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
        embedded=rows.num_rows,
        rejected=rejected.num_rows,
        filtered=prepared.filtered,
        null_ids=rows["id"].null_count if "id" in rows.column_names else 0,
        shard=shard,
        shard_bytes=len(shard_data),
        shard_sha256=hashlib.sha256(shard_data).hexdigest() if shard else "",
        rejects=rejects,
        rejects_bytes=len(rejects_data),
        rejects_sha256=hashlib.sha256(rejects_data).hexdigest() if rejects else "",
        reasons=dict(Counter(rejected["reason"].to_pylist())),
        tokens=work.tokens,
        tokens_computed=work.computed,
        tokens_padding=work.padding,
        tokens_shared=work.shared,
        truncated=int(np.count_nonzero(rows["truncated"].to_numpy())) if rows.num_rows else 0,
        token_budget=embedder.backend.budget.value,
        out_of_memory=work.out_of_memory,
        storage_retries=prepared.storage_retries + RETRIES.take(),
        seconds_model=round(seconds_model, 4),
        seconds_write=round(time.perf_counter() - started, 4),
        finished=time.time(),
        host=socket.gethostname(),
    )
    commits.write(job.output, commit)
    return commit


def _write_shard(job: Job, unit: str, attempt: str, rows: pa.Table, vectors: npt.NDArray[np.float32], metadata: dict[str, Any]) -> tuple[str | None, bytes]:
    if not rows.num_rows:
        return None, b""
    columns = {name: rows[name] for name in rows.column_names if name != "token_ids"}
    place = list(columns).index("source_row") + 1
    embedding = {"embedding": schema.embedding_column(vectors, job.dtype)}
    ordered = dict(list(columns.items())[:place]) | embedding | {n: columns[n] for n in ("n_tokens", "truncated")} | columns
    data = schema.encode_shard(pa.table(ordered), metadata, vector_bytes=vectors.shape[1] * np.dtype(job.dtype).itemsize)
    path = f"{DATA}/{unit}-{attempt}.parquet"
    job.output.put(path, data)
    return path, data


def _embed(
    job: Job, prepared: Prepared, embedder: Embedder, on_pack: OnPack | None, isolation: Isolation | None
) -> tuple[npt.NDArray[np.float32], dict[int, tuple[str, str]], Work]:
    """(vectors [N, D], row -> (reason, detail) of failed rows, work done)."""
    rows = prepared.tokens
    if isolation is None:
        result = embedder.embed_tokens(rows, job.role, on_pack=on_pack)
        return result.vectors, {row: ("engine", detail) for row, detail in result.failed.items()}, result.work
    vectors = np.zeros((len(rows), embedder.dimension), np.float32)
    problems = dict.fromkeys(isolation.poison, ("kills_engine", "the process that held the model died on this row, again and again"))
    work = Work()
    for first, last in isolation.ranges:
        todo = [row for row in range(first, min(last, len(rows))) if row not in isolation.poison]
        isolation.entering((first, last))
        result = embedder.embed_tokens(TokenRows.from_lists([rows[row] for row in todo]), job.role, on_pack=on_pack)
        vectors[todo] = result.vectors
        problems |= {todo[row]: ("engine", detail) for row, detail in result.failed.items()}
        work.add(result.work)
    return vectors, problems, work


def _unusable(vectors: npt.NDArray[np.float32], failed: dict[int, Any], job: Job) -> dict[int, tuple[str, str]]:
    """Rows whose vector holds NaN or infinity (as written, so after a cast to float16) or is zero."""
    with np.errstate(over="ignore"):
        finite = np.isfinite(vectors.astype(job.dtype)).all(axis=1)
    zero = ~vectors.any(axis=1)
    problems = {int(row): ("not_finite", f"its vector is not finite in {job.dtype}") for row in np.flatnonzero(~finite)}
    problems |= {int(row): ("zero_vector", "its vector is zero") for row in np.flatnonzero(zero & finite)}
    return {row: problem for row, problem in problems.items() if row not in failed}
