"""A job on an object store that throttles, resets and dawdles ends as on a quiet one, and says how often it tried again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llmemb_ray
from llmemb_ray.shards.run import Run
from llmemb_ray.shards.verify import verify
from llmemb_ray.storage import Storage
from tests.s3_proxy import BadDay
from tests.s3_server import S3Server
from tests.small_jobs import vectors_of


def embed(server: S3Server, endpoint: str, output: str, model: Path) -> llmemb_ray.Receipt:
    return llmemb_ray.embed(
        server.url("corpus"),
        server.url(output),
        model=str(model),
        actors="0",
        rows_per_unit=8,
        quiet=True,
        endpoint_url=endpoint,
        storage_options=server.storage_options,
        storage_retry_seconds=60,
    )


def contents(server: S3Server, output: str) -> dict[str, np.ndarray]:
    run = Run(Storage(server.url(output), server.access()))
    assert verify(run).problems == []
    return {id_: vector for _, table in run.shards() for id_, vector in zip(table["id"].to_pylist(), vectors_of(table["embedding"]), strict=True)}


@pytest.mark.timeout(240)
def test_throttled_cut_and_slow(s3: S3Server, corpus: Path, model: Path) -> None:
    s3.path("corpus").mkdir(parents=True, exist_ok=True)
    for file in corpus.iterdir():
        s3.path(f"corpus/{file.name}").write_bytes(file.read_bytes())
    quiet = embed(s3, s3.endpoint_url, "quiet", model)
    proxy = BadDay(s3.port, refused=0.2, cut=0.05, slow=0.1, slow_seconds=0.2)
    try:
        stormy = embed(s3, proxy.endpoint_url, "stormy", model)
    finally:
        proxy.stop()
    assert proxy.counts["refused"] > 5
    assert proxy.counts["cut"] > 0
    assert stormy.storage_retries > 5
    assert (stormy.rows_read, stormy.rows_embedded, stormy.rejects_by_reason, stormy.tokens) == (
        quiet.rows_read,
        quiet.rows_embedded,
        quiet.rejects_by_reason,
        quiet.tokens,
    )
    one, other = contents(s3, "quiet"), contents(s3, "stormy")
    assert one.keys() == other.keys()
    assert max(float(np.abs(one[key] - other[key]).max()) for key in one) <= 1e-5
