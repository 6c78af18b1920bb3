"""A Ray of this test's own, with GPUs that exist only in its books (Ray counts them, nothing uses them)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipeline.killing import ROWS
from tests.s3_server import S3Server

FAKE_GPUS = 2
ROOT = str(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def ray_with_fake_gpus() -> Iterator[None]:
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=FAKE_GPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"worker_process_setup_hook": "tests.pipeline.poison.install", "env_vars": {"PYTHONPATH": ROOT}},
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture
def server(s3: S3Server) -> S3Server:
    s3.path("corpus").mkdir()
    for file in range(4):
        numbers = range(file * ROWS // 4, (file + 1) * ROWS // 4)
        texts = [None if number % 997 == 5 else f"document {number} speaks of {number % 7} things" for number in numbers]
        pq.write_table(pa.table({"id": list(numbers), "text": texts}), s3.path(f"corpus/{file}.parquet"), row_group_size=400)
    return s3
