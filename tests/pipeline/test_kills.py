"""Killing every kind of process in the middle of a real job on a real S3 server, then the same rows, counts and vectors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llmemb_ray.errors import LeaseHeld
from tests.pipeline.killing import ROWS, ROWS_PER_UNIT, Driver, assert_as_undisturbed, embed_plainly, kill, read
from tests.s3_server import S3Server

pytestmark = pytest.mark.timeout(300)


def test_actor_worker_and_storage_die_while_the_job_goes_on(server: S3Server, model: Path) -> None:
    driver = Driver(server, model)
    snapshots = [driver.wait_for_commits(4)]
    actors = driver.workers("EmbedUnits")
    assert actors, "the embedder actor was not found"
    kill(actors)
    snapshots.append(driver.wait_for_commits(len(snapshots[-1]) + 15))
    kill(driver.workers("read_and_tokenize"))
    snapshots.append(driver.wait_for_commits(len(snapshots[-1]) + 5))
    server.kill()
    snapshots.append(driver.commits())
    time.sleep(4)
    assert driver.process.poll() is None, driver.output()
    server.start()
    driver.finish()
    assert_as_undisturbed(server, model, snapshots)
    receipt = read(server, "out")[0].receipt
    assert receipt is not None
    assert receipt.storage_retries > 0


def test_a_killed_driver_is_continued_and_a_second_one_kept_out(server: S3Server, model: Path) -> None:
    driver = Driver(server, model)
    driver.wait_for_commits(3)
    environment = os.environ | server.environment
    state = subprocess.run([sys.executable, "-m", "llmemb_ray.cli", "status", server.url("out"), "--json"], env=environment, capture_output=True, text=True)
    assert json.loads(state.stdout)["state"] == "running", state.stderr
    with pytest.raises(LeaseHeld, match="another driver"):
        embed_plainly(server, model, "out")
    ray_processes = psutil.Process(driver.process.pid).children(recursive=True)
    driver.process.kill()
    driver.process.wait()
    psutil.wait_procs(ray_processes, timeout=20)
    snapshot = driver.commits()
    assert 3 <= len(snapshot) < ROWS // ROWS_PER_UNIT, "the driver was not killed in the middle"

    data = server.path("out/data")
    before = {path.name for path in data.glob("*.parquet")}
    again = Driver(server, model)
    seen: set[str] = set()
    while again.process.poll() is None:
        seen |= {path.name for path in data.glob("*.parquet")}
        time.sleep(0.05)
    again.finish()
    attempted = {name.rsplit("-", 1)[0] for name in seen - before}
    assert attempted & set(snapshot) == set(), "a committed unit was attempted again"
    assert_as_undisturbed(server, model, [snapshot])
