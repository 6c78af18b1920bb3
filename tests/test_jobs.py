"""``ray job submit`` against a real cluster of several nodes, with the corpus and the run on a real S3 server."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmemb_ray.shards.run import Run
from llmemb_ray.shards.verify import verify
from llmemb_ray.storage import Storage
from tests.ray_cluster import ENVIRONMENT, RAY, RayCluster
from tests.s3_server import S3Server

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    cluster = RayCluster(workers=2)
    yield cluster
    cluster.stop()


def submit(cluster: RayCluster, server: S3Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Submits ``jobs/embed.py`` from this checkout, as the README says; what git ignores stays behind."""
    runtime_env = json.dumps({"env_vars": server.environment | {"HF_HUB_OFFLINE": "1"}})
    command = [RAY, "job", "submit", "--address", cluster.dashboard, "--working-dir", str(ROOT), "--runtime-env-json", runtime_env]
    command += ["--", sys.executable, "jobs/embed.py", *arguments]
    for _ in range(30):
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=ENVIRONMENT)
        if "No available agent to submit job" not in done.stderr:
            break
        time.sleep(1)  # The nodes are up, but the agent that takes jobs is not yet.
    return done


def test_the_job_runs_on_the_cluster_and_is_verified(cluster: RayCluster, s3: S3Server, model: Path) -> None:
    s3.path("corpus").mkdir(parents=True)
    s3.path("model").mkdir()
    for file in model.iterdir():
        s3.path(f"model/{file.name}").write_bytes(file.read_bytes())
    for number in range(3):
        rows = range(number * 200, (number + 1) * 200)
        pq.write_table(pa.table({"id": list(rows), "text": [f"document {row}" for row in rows]}), s3.path(f"corpus/{number}.parquet"), row_group_size=100)
    arguments = [s3.url("corpus"), s3.url("out"), "--model", s3.url("model"), "--actors", "2", "--cpus-per-actor", "1", "--rows-per-unit", "25"]
    done = submit(cluster, s3, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "600 rows read = 600 embedded + 0 rejected" in done.stdout
    run = Run(Storage(s3.url("out"), s3.access()))
    assert verify(run, against=[s3.url("corpus")]).problems == []
    assert run.receipt is not None
    assert run.receipt.units == 24


def test_a_failing_job_fails_in_plain_words(cluster: RayCluster, s3: S3Server, model: Path) -> None:
    done = submit(cluster, s3, s3.url("nothing-here"), s3.url("out"), "--model", str(model))
    assert done.returncode == 1, "ray job submit exits 1 for any failed job"
    assert "nothing found at" in done.stdout or "no Parquet files" in done.stdout, done.stdout
