"""A Ray of this test's own, with GPUs that exist only in its books (Ray counts them, nothing uses them)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

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
