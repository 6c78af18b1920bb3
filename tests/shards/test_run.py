"""A run as its readers see it: through commits alone, wherever it stands."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import llmemb_ray
from llmemb_ray.errors import ConfigError, OutputError
from llmemb_ray.shards import commits, lease
from llmemb_ray.shards.lease import Lease
from llmemb_ray.shards.receipt import PATH as RECEIPT
from llmemb_ray.shards.run import Run, open_run
from llmemb_ray.storage import Storage
from tests.s3_server import S3Server
from tests.shards.conftest import Finished
from tests.shards.small_plan import commit_of, small_plan
from tests.small_jobs import vectors_of


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    for url in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(OutputError, match=rf"{url} holds no run of llmemb_ray \(there is no _llmemb/plan in it\)"):
            open_run(str(url))
    with pytest.raises(ConfigError, match="credentials do not belong in a URL"):
        open_run("s3://key:secret@host/run")


def test_a_run_is_opened_by_a_relative_path_too(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.output.parent)
    run = open_run("run/")
    monkeypatch.chdir("/")
    assert len(run.commits) == 4


def test_shards_give_each_embedded_row_once_with_its_vector(finished: Finished) -> None:
    rows = [
        (file, row) for _, table in finished.run.shards() for file, row in zip(table["source_file"].to_pylist(), table["source_row"].to_pylist(), strict=True)
    ]
    assert rows == [(file, row) for file in range(2) for row in range(24) if row != 5]
    for _, table in finished.run.shards(["embedding"]):
        assert table.column_names == ["embedding"]
        np.testing.assert_allclose(np.linalg.norm(vectors_of(table["embedding"]), axis=1), 1, atol=1e-5)
    assert [(row["source_file"], row["source_row"], row["id"], row["reason"]) for table in finished.run.rejects() for row in table.to_pylist()] == [
        (0, 5, "0-5", "null"),
        (1, 5, "1-5", "null"),
    ]


def test_readers_see_no_shard_without_a_commit(finished: Finished) -> None:
    shard = next((finished.output / "data").iterdir())
    (finished.output / "data" / "000000-000000000000-ffffffffffff.parquet").write_bytes(shard.read_bytes())
    assert sum(table.num_rows for _, table in finished.run.shards()) == 46


def test_a_shard_that_is_gone_or_broken_is_named(finished: Finished) -> None:
    shard = sorted((finished.output / "data").iterdir())[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-30])
    with pytest.raises(OutputError, match=rf"{shard} cannot be read: .*; run verify"):
        list(finished.run.shards())
    shard.unlink()
    with pytest.raises(OutputError, match=rf"{shard} is named by a commit but is not there; run verify"):
        list(finished.run.shards())


def test_status_of_a_finished_run(finished: Finished) -> None:
    status = finished.run.status()
    assert (status["state"], status["units"], status["units_done"], status["rows"]) == ("finished", 4, 4, 48)
    assert status["receipt"]["rows_embedded"] == 46
    assert json.loads(json.dumps(status)) == status


def leave_lease(storage: Storage, age: float) -> None:
    held = Lease(owner="x", host="elsewhere", pid=1, heartbeat=time.time() - age, progress={"rows": 3})
    storage.put(lease.PATH, json.dumps(asdict(held)).encode())


def test_status_of_a_run_under_way_and_of_one_that_stopped(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    plan = small_plan()
    plan.save(storage)
    for unit in list(plan.units())[:2]:
        commits.write(storage, commit_of(unit))
    assert Run(storage).status()["state"] == "stopped"
    leave_lease(storage, age=1)
    status = Run(storage).status()
    assert (status["state"], status["units_done"], status["units"], status["rows"]) == ("running", 2, 7, 55)
    assert status["progress"] == {"rows": 3}
    assert status["driver"]["host"] == "elsewhere"
    leave_lease(storage, age=1000)
    status = Run(storage).status()
    assert status["state"] == "stopped"
    assert status["driver"]["heartbeat_age_s"] >= 1000


def test_a_run_on_s3_reads_like_one_on_disk(finished: Finished, s3: S3Server) -> None:
    storage = Storage(s3.url("run"), s3.access())
    for directory, _, names in os.walk(finished.output):
        for name in names:
            path = Path(directory, name)
            storage.put(str(path.relative_to(finished.output)), path.read_bytes())
    there = open_run(s3.url("run"), endpoint_url=s3.endpoint_url, options=s3.storage_options)
    here = finished.run
    assert there.commits == here.commits
    assert there.receipt == here.receipt
    for (_, one), (_, other) in zip(there.shards(), here.shards(), strict=True):
        assert one == other
    assert llmemb_ray.verify(there).problems == []
    assert storage.exists(RECEIPT)
