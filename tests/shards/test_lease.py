"""The lease keeps a second driver out, gives way when its driver is dead, and notices when it is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from llmemb_ray.errors import LeaseHeld, OutputError, StorageError
from llmemb_ray.shards import lease
from llmemb_ray.shards.lease import PATH, Lease, LeaseHolder
from llmemb_ray.storage import Access, Storage
from tests.faulty_fs import FAULTS, FOREVER

SAID: list[str] = []


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "STALE_SECONDS", 3.0)
    SAID.clear()
    yield
    FAULTS.clear()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def holder(storage: Storage, *, wait: float = 4.0, rows: int = 0) -> LeaseHolder:
    return LeaseHolder(storage, lambda: {"rows": rows}, wait_seconds=wait, waiting=SAID.append)


def leave(storage: Storage, *, age: float, host: str = "elsewhere", pid: int = 1) -> None:
    """The lease of a driver that was last heard of ``age`` seconds ago, by its own clock."""
    storage.put(PATH, json.dumps(asdict(Lease(owner="other", host=host, pid=pid, heartbeat=time.time() - age))).encode())


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_the_lease_is_there_while_held_and_gone_after(storage: Storage) -> None:
    assert lease.read(storage) is None
    with holder(storage, rows=7):
        held = lease.read(storage)
        assert held is not None
        assert (held.pid, held.progress) == (os.getpid(), {"rows": 7})
        assert not held.stale()
        first = held.heartbeat
        assert eventually(lambda: (lease.read(storage) or held).heartbeat > first)
    assert lease.read(storage) is None


def test_a_second_driver_is_refused_while_the_heartbeat_moves(storage: Storage) -> None:
    with holder(storage) as first:
        with (
            pytest.raises(
                LeaseHeld, match=rf"another driver \(process {os.getpid()} on .*is at work on {storage.url}; wait for it, or stop it and run this command again"
            ),
            holder(storage),
        ):
            pass
        assert first.lost is None
    assert SAID
    assert "waiting to see whether it still is" in SAID[0]


def test_a_lease_long_silent_is_taken_over_at_once(storage: Storage) -> None:
    leave(storage, age=60)
    began = time.monotonic()
    with holder(storage):
        assert (lease.read(storage) or pytest.fail("no lease")).owner != "other"
    assert time.monotonic() - began < 1


def test_the_lease_of_a_dead_process_of_this_machine_is_taken_over_at_once(storage: Storage) -> None:
    import socket

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    leave(storage, age=0, host=socket.gethostname(), pid=ended.pid)
    began = time.monotonic()
    with holder(storage):
        pass
    assert time.monotonic() - began < 1


def test_a_lease_whose_heartbeat_stands_still_is_waited_for(storage: Storage) -> None:
    leave(storage, age=1)
    with holder(storage):
        pass
    assert any("waiting to see" in line for line in SAID)


def test_a_dead_driver_whose_clock_was_ahead_does_not_keep_the_run_for_ever(storage: Storage) -> None:
    leave(storage, age=-3600)
    with holder(storage, wait=6.0):
        assert (lease.read(storage) or pytest.fail("no lease")).owner != "other"


def test_a_driver_that_may_not_wait_is_refused(storage: Storage) -> None:
    leave(storage, age=1)
    with pytest.raises(LeaseHeld), holder(storage, wait=-1.0):
        pass


def test_a_lost_lease_is_noticed_and_left_to_its_new_owner(storage: Storage) -> None:
    with holder(storage) as first:
        leave(storage, age=0)
        assert eventually(lambda: first.lost is not None)
        assert first.lost == f"process 1 on elsewhere took the lease on {storage.url}"
    held = lease.read(storage)
    assert held is not None
    assert held.owner == "other"


def test_a_deleted_lease_is_written_again(storage: Storage) -> None:
    with holder(storage) as first:
        storage.delete([PATH])
        assert eventually(lambda: lease.read(storage) is not None)
        assert first.lost is None


def test_heartbeats_that_storage_refuses_are_survived(tmp_path: Path) -> None:
    storage = Storage(f"faulty://{tmp_path}", Access(retry_seconds=0.01))
    with holder(storage) as first:
        FAULTS.set(at=1, times=5, operations=("write",))
        assert eventually(lambda: FAULTS.count > 6)
        assert first.lost is None
    assert lease.read(storage) is None


def test_a_lease_that_cannot_be_deleted_does_not_hide_the_jobs_own_error(tmp_path: Path) -> None:
    storage = Storage(f"faulty://{tmp_path}", Access(retry_seconds=0.01))

    def work() -> None:
        with holder(storage):
            FAULTS.set(at=1, times=FOREVER, operations=("delete",))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()


def test_an_output_that_cannot_be_written_fails_when_the_lease_is_taken() -> None:
    with pytest.raises(StorageError, match=r"cannot write /proc/nowhere/_llmemb/lease\.json"), holder(Storage("/proc/nowhere")):
        pass


@pytest.mark.parametrize("data", [b"", b"[]", b'{"owner": "x"}'])
def test_a_broken_lease_says_what_to_do(storage: Storage, data: bytes) -> None:
    storage.put(PATH, data)
    with pytest.raises(OutputError, match=r"lease\.json is no lease of this version: .*; delete it if no driver is at work"), holder(storage):
        pass
