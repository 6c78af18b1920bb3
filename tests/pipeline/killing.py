"""A driver of a job in a process of its own, on a real S3 server, that tests kill parts of; and what must hold afterwards."""

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

import llmemb_ray
from llmemb_ray.shards.run import Run
from llmemb_ray.shards.verify import verify
from llmemb_ray.storage import Storage
from tests.s3_server import S3Server
from tests.small_jobs import vectors_of

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


def read(server: S3Server, prefix: str) -> tuple[Run, dict[int, np.ndarray]]:
    run = Run(Storage(server.url(prefix), server.access()))
    return run, {id_: vector for _, table in run.shards() for id_, vector in zip(table["id"].to_pylist(), vectors_of(table["embedding"]), strict=True)}


def assert_as_undisturbed(server: S3Server, model: Path, committed: list[dict[str, str]]) -> None:
    """The run holds what the same job makes in one process on transformers, and each commit seen before still stands."""
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
        backend="hf",
        quiet=True,
        endpoint_url=server.endpoint_url,
        storage_options=server.storage_options,
    )


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.send_signal(signal.SIGKILL)
