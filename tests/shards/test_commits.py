"""Commits: one key a unit, compacted without loss, broken records named."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llmemb_ray.errors import OutputError, StorageError
from llmemb_ray.shards import commits
from llmemb_ray.storage import Access, Storage
from tests.faulty_fs import FAULTS, FOREVER
from tests.shards.small_plan import commit_of, small_plan

UNITS = list(small_plan().units())


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def test_a_commit_comes_back_as_it_was(storage: Storage) -> None:
    commit = commit_of(UNITS[0], reasons={"null": 3, "empty": 1}, seconds_model=1.25, host="wörker", rejects=None)
    commits.write(storage, commit)
    assert commits.read(storage, commit.unit) == commit
    assert commits.read_all(storage) == [commit]


def test_of_two_attempts_at_a_unit_one_stands(storage: Storage) -> None:
    for attempt in ("first", "second"):
        commits.write(storage, commit_of(UNITS[0], attempt=attempt))
    assert [commit.attempt for commit in commits.read_all(storage)] == ["second"]


def test_committed_units_are_those_with_a_whole_record(storage: Storage) -> None:
    assert commits.committed_units(storage) == set()
    for unit in UNITS[:3]:
        commits.write(storage, commit_of(unit))
    storage.put(f"{commits.path(UNITS[4].name)}.tmp-0123456789ab", b"{half")
    assert commits.committed_units(storage) == {unit.name for unit in UNITS[:3]}
    assert [commit.unit for commit in commits.read_all(storage)] == [unit.name for unit in UNITS[:3]]


def test_compaction_keeps_every_field_of_every_commit(storage: Storage) -> None:
    written = [commit_of(unit, reasons={"null": number}, host=f"h{number}", seconds_write=number / 8) for number, unit in enumerate(UNITS)]
    written[0] = replace(written[0], shard=None, rejects=None, reasons={})
    for commit in reversed(written):
        commits.write(storage, commit)
    commits.compact(storage, commits.read_all(storage))
    assert [entry.path for entry in storage.list()] == [commits.COMPACTED]
    assert commits.read_all(storage) == written
    assert commits.committed_units(storage) == {unit.name for unit in UNITS}


def test_compaction_stopped_anywhere_loses_and_doubles_nothing(tmp_path: Path) -> None:
    plain, faulty = Storage(str(tmp_path)), Storage(f"faulty://{tmp_path}", Access(retry_seconds=0.01))
    written = [commit_of(unit) for unit in UNITS]
    stopped = 0
    try:
        while True:
            plain.delete([commits.COMPACTED])
            for commit in written:
                commits.write(plain, commit)
            FAULTS.set(at=stopped + 1, times=FOREVER)
            try:
                commits.compact(faulty, written)
            except StorageError:
                stopped += 1
                assert commits.read_all(plain) == written
            else:
                break
    finally:
        FAULTS.clear()
    assert stopped >= len(UNITS) + 3, "it was stopped at each write, listing and deletion"
    assert commits.read_all(plain) == written


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"unit": "x"}', b"\xff"])
def test_a_broken_record_is_named(storage: Storage, data: bytes) -> None:
    storage.put(commits.path("000000-000000000000"), data)
    with pytest.raises(OutputError, match=r"_llmemb/commits/000000-000000000000\.json is no commit record of this version"):
        commits.read_all(storage)


def test_a_record_of_a_later_version_is_refused_and_not_half_understood(storage: Storage) -> None:
    later = asdict(commit_of(UNITS[0])) | {"chunks": 3}
    storage.put(commits.path(UNITS[0].name), json.dumps(later).encode())
    with pytest.raises(OutputError, match="chunks"):
        commits.read_all(storage)


def test_broken_compacted_records_are_named(storage: Storage) -> None:
    commits.compact(storage, [commit_of(unit) for unit in UNITS * 200])
    whole = storage.read(commits.COMPACTED)
    for data in (b"", whole[:-20], whole[:300] + bytes(200) + whole[500:], b"PAR1" + bytes(20) + b"PAR1"):
        storage.put(commits.COMPACTED, data)
        with pytest.raises(OutputError, match=r"_llmemb/commits\.parquet holds no commit records of this version"):
            commits.read_all(storage)
