"""Killing every kind of process in the middle of a real job on a real S3 server, then the same rows, counts and vectors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import llmemb_ray
from llmemb_ray.errors import LeaseHeld
from llmemb_ray.shards.run import Run
from llmemb_ray.shards.verify import verify
from llmemb_ray.storage import Storage
from tests.s3_server import S3Server
from tests.small_jobs import vectors_of

pytestmark = pytest.mark.timeout(300)

ROWS, ROWS_PER_UNIT = 10000, 40


class Driver:
    """``llmemb embed`` as a user starts it, in a process of its own with a Ray of its own."""

    def __init__(self, server: S3Server, model: Path, *extra: str) -> None:
        self.server = server
        arguments = [server.url("corpus"), server.url("out"), "--model", str(model), "--actors", "1", "--rows-per-unit", str(ROWS_PER_UNIT), *extra]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmemb_ray.cli", "embed", *arguments],
            env=os.environ | server.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def commits(self) -> dict[str, str]:
        """Unit -> attempt of every commit that is visible now."""
        directory = self.server.path("out/_llmemb/commits")
        found = {}
        for path in directory.glob("*.json") if directory.is_dir() else ():
            try:
                found[path.stem] = json.loads(path.read_text())["attempt"]
            except (ValueError, FileNotFoundError):
                continue  # Being written, or compacted away, at this moment.
        return found

    def wait_for_commits(self, count: int) -> dict[str, str]:
        deadline = time.monotonic() + 120
        while len(found := self.commits()) < count:
            if self.process.poll() is not None:
                raise AssertionError(f"the job ended too soon:\n{self.output()}")
            assert time.monotonic() < deadline, f"{len(found)} commits after two minutes"
            time.sleep(0.1)
        return found

    def workers(self, title: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def output(self) -> str:
        return self.process.communicate(timeout=200)[0]

    def finish(self) -> None:
        output = self.output()
        assert self.process.returncode == 0, output


@pytest.fixture
def server(s3: S3Server) -> S3Server:
    s3.path("corpus").mkdir()
    for file in range(4):
        numbers = range(file * ROWS // 4, (file + 1) * ROWS // 4)
        texts = [None if number % 997 == 5 else f"document {number} speaks of {number % 7} things" for number in numbers]
        pq.write_table(pa.table({"id": list(numbers), "text": texts}), s3.path(f"corpus/{file}.parquet"), row_group_size=400)
    return s3


def read(server: S3Server, prefix: str) -> tuple[Run, dict[int, np.ndarray]]:
    run = Run(Storage(server.url(prefix), server.access()))
    return run, {id_: vector for _, table in run.shards() for id_, vector in zip(table["id"].to_pylist(), vectors_of(table["embedding"]), strict=True)}


def assert_as_undisturbed(server: S3Server, model: Path, committed: list[dict[str, str]]) -> None:
    run, found = read(server, "out")
    assert verify(run, against=[server.url("corpus")]).problems == []
    embed_plainly(server, model, "plain")
    plain, expected = read(server, "plain")
    assert found.keys() == expected.keys()
    assert max(float(np.abs(found[key] - expected[key]).max()) for key in expected) <= 1e-5
    assert run.receipt is not None
    assert plain.receipt is not None
    for name in ("rows_read", "rows_embedded", "rows_rejected", "rejects_by_reason", "tokens", "units"):
        assert getattr(run.receipt, name) == getattr(plain.receipt, name)
    final = {commit.unit: commit.attempt for commit in run.commits}
    for snapshot in committed:
        assert {unit: final[unit] for unit in snapshot} == snapshot, "a committed unit was attempted again"


def embed_plainly(server: S3Server, model: Path, prefix: str) -> None:
    """The same job in this process."""
    llmemb_ray.embed(
        server.url("corpus"),
        server.url(prefix),
        model=str(model),
        actors="0",
        rows_per_unit=ROWS_PER_UNIT,
        quiet=True,
        endpoint_url=server.endpoint_url,
        storage_options=server.storage_options,
    )


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.send_signal(signal.SIGKILL)


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
