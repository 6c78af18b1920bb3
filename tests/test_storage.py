"""Storage on local disk, on a file system that fails, and on a real S3 server."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmemb_ray.errors import ConfigError, NotFound, StorageError
from llmemb_ray.storage import RETRIES, Access, Storage, absolute, is_temporary, locate, redact
from tests.faulty_fs import FAULTS, FOREVER
from tests.s3_server import KEY, SECRET, S3Server


@pytest.fixture(autouse=True)
def _clean_slate() -> Iterator[None]:
    RETRIES.take()
    yield
    FAULTS.clear()


@pytest.fixture
def faulty(tmp_path: Path) -> Storage:
    return Storage(f"faulty://{tmp_path}", Access(retry_seconds=20))


# -- local -------------------------------------------------------------------------------------------


def test_put_and_read_back_with_directories_made_on_the_way(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "out"))
    storage.put("a/b/c.bin", b"\x00\x01")
    assert storage.read("a/b/c.bin") == b"\x00\x01"
    assert storage.read_range("a/b/c.bin", 1, 2) == b"\x01"
    assert [entry.path for entry in storage.list()] == ["a/b/c.bin"]
    assert storage.child("a").read("b/c.bin") == b"\x00\x01"
    assert storage.exists("a/b")
    assert storage.is_directory("a/b")
    assert not storage.exists("a/x")
    assert not storage.is_directory("a/b/c.bin")


def test_a_reader_sees_the_old_object_or_the_new_one_and_never_a_part(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    contents = [bytes([letter]) * 300_000 for letter in b"ab"]
    storage.put("x", contents[0])
    stop = threading.Event()

    def rewrite() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            storage.put("x", contents[turn % 2])

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        seen = {(tmp_path / "x").read_bytes() for _ in range(200)}
    finally:
        stop.set()
        writer.join()
    assert seen <= set(contents)
    assert [entry.path for entry in storage.list()] == ["x"]


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_a_process_that_dies_while_writing_leaves_the_old_object_whole(tmp_path: Path, moment: str) -> None:
    (tmp_path / "x").write_bytes(b"old")
    code = f"import tests.faulty_fs\nfrom llmemb_ray.storage import Storage\nStorage('faulty://{tmp_path}').put('x', b'n' * 1000)"
    environment = os.environ | FAULTS.environment(at=1, die=True, moment=moment, operations=["write"])
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 9
    assert (tmp_path / "x").read_bytes() == b"old"
    left = [entry.path for entry in Storage(str(tmp_path)).list() if entry.path != "x"]
    assert len(left) == (0 if moment == "before" else 1)
    assert all(is_temporary(path) for path in left)


def test_a_failed_write_leaves_nothing_behind(faulty: Storage, tmp_path: Path) -> None:
    FAULTS.set(at=1, times=FOREVER, error=errno.ENOSPC, operations=("write",), moment="half")
    with pytest.raises(StorageError, match=r"cannot write .*/x: No space left on device; free some space and run the same command again"):
        faulty.put("x", b"1234")
    assert list(tmp_path.iterdir()) == []
    assert RETRIES.take() == 0


def test_deleting_what_is_gone_is_no_error(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for name in "abc":
        storage.put(name, b"")
    storage.delete(["a", "gone", "b"])
    assert [entry.path for entry in storage.list()] == ["c"]
    storage.put("tree/deep/file", b"")
    storage.delete_tree("tree")
    storage.delete_tree("tree")
    assert not (tmp_path / "tree").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=f"nothing found at {tmp_path}/no/where"):
        Storage(str(tmp_path)).read("no/where")
    assert Storage(str(tmp_path)).list("no") == []


def test_glob_takes_files_of_one_level_or_of_all(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for path in ("a.pq", "b.txt", "d/a.pq", "d/e/a.pq", "d2/b.pq"):
        storage.put(path, b"")
    assert [entry.path for entry in storage.glob("*.pq")] == ["a.pq"]
    assert [entry.path for entry in storage.glob("d*/*.pq")] == ["d/a.pq", "d2/b.pq"]
    assert [entry.path for entry in storage.glob("d/**/*.pq")] == ["d/a.pq", "d/e/a.pq"]
    assert [entry.path for entry in storage.glob("d/[a-b].p?")] == ["d/a.pq"]
    assert storage.glob("nowhere/*.pq") == []


def test_links_are_followed_and_have_the_version_of_what_they_point_to(tmp_path: Path) -> None:
    """A snapshot of the Hugging Face hub is a directory of links."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    (blobs / "more").mkdir(parents=True)
    snapshot.mkdir()
    (blobs / "one").write_bytes(b"12345")
    (blobs / "more" / "two").write_bytes(b"1")
    os.utime(blobs / "one", (1, 1))
    (snapshot / "a").symlink_to(blobs / "one")
    (snapshot / "b").symlink_to(blobs / "more", target_is_directory=True)
    (snapshot / "gone").symlink_to(tmp_path / "nothing")
    storage = Storage(str(snapshot))
    listed = {entry.path: entry for entry in storage.list()}
    assert {path: entry.size for path, entry in listed.items()} == {"a": 5, "b/two": 1, "gone": 0}
    assert listed["a"].version == storage.info("a").version


def test_a_directory_that_cannot_be_listed_is_an_error_and_not_left_out(faulty: Storage) -> None:
    faulty.put("a/one", b"")
    faulty.put("b/two", b"")
    FAULTS.set(at=1, times=FOREVER, error=errno.EACCES, operations=("list",), path="/b$")
    with pytest.raises(StorageError, match=r"no permission to list .*check the credentials and the bucket policy or file mode"):
        faulty.list()
    FAULTS.set(at=1, times=2, error=errno.EIO, operations=("list",), path="/b$")
    assert [entry.path for entry in faulty.glob("*/*")] == ["a/one", "b/two"]


# -- failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.EIO, errno.ECONNRESET, errno.ETIMEDOUT, errno.EAGAIN])
def test_passing_errors_are_retried_and_counted(faulty: Storage, error: int) -> None:
    FAULTS.set(at=1, times=2, error=error, operations=("write",))
    faulty.put("x", b"data")
    FAULTS.set(at=1, error=error, operations=("read",))
    assert faulty.read("x") == b"data"
    assert RETRIES.take() == 3
    assert RETRIES.take() == 0


@pytest.mark.parametrize("error", [errno.ENOENT, errno.EACCES, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EDQUOT])
def test_lasting_errors_are_not_retried(faulty: Storage, error: int) -> None:
    FAULTS.set(at=1, times=FOREVER, error=error, operations=("read",))
    began = time.monotonic()
    with pytest.raises(StorageError, match="/x"):
        faulty.read("x")
    assert FAULTS.count == 1
    assert RETRIES.take() == 0
    assert time.monotonic() - began < 5


def test_retrying_ends_and_says_what_it_tried(tmp_path: Path) -> None:
    FAULTS.set(at=1, times=FOREVER, error=errno.EIO)
    with pytest.raises(StorageError, match=f"cannot read .*{tmp_path}/x: Input/output error"):
        Storage(f"faulty://{tmp_path}", Access(retry_seconds=0.5)).read("x")
    assert RETRIES.take() > 0


def test_no_permission_says_what_to_look_at(faulty: Storage) -> None:
    FAULTS.set(at=1, times=FOREVER, error=errno.EACCES)
    with pytest.raises(StorageError, match=r"no permission to write .*/x: Permission denied; check the credentials and the bucket policy or file mode"):
        faulty.put("x", b"")


def test_a_place_that_refuses_even_root_fails_by_name() -> None:
    with pytest.raises(StorageError, match=r"cannot write /proc/nowhere/x"):
        Storage("/proc/nowhere").put("x", b"")


def test_a_file_in_the_way_fails_by_name(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot write .*/out/x"):
        Storage(str(tmp_path / "out")).put("x", b"")


def test_an_unknown_protocol_says_so() -> None:
    with pytest.raises(StorageError, match=r"cannot open nonsense://there: .*nonsense"):
        Storage("nonsense://there")


def test_errors_of_our_own_pass_through_untouched(tmp_path: Path) -> None:
    def broken() -> None:
        raise KeyError("a mistake in our code")

    with pytest.raises(KeyError):
        Storage(str(tmp_path)).attempt("read", "x", broken)
    assert RETRIES.take() == 0


# -- URLs and secrets --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://user:pass@host/bucket/x", "s3://host/bucket/x"),
        ("https://user:p@ss@host/x", "https://host/x"),
        ("https://token@host/x?X-Amz-Signature=abc", "https://host/x"),
        ("abfs://box@account.dfs.core.windows.net/x?sig=abc", "abfs://box@account.dfs.core.windows.net/x"),
        ("abfs://box:key@account.dfs.core.windows.net/x", "abfs://account.dfs.core.windows.net/x"),
        ("s3://bucket/part-?.parquet", "s3://bucket/part-?.parquet"),
        ("s3://bucket/mail@home.parquet", "s3://bucket/mail@home.parquet"),
        ("/data/what?.parquet", "/data/what?.parquet"),
    ],
)
def test_redaction_takes_secrets_and_nothing_else(url: str, shown: str) -> None:
    assert redact(url) == shown


def test_credentials_in_a_url_are_refused_without_being_shown() -> None:
    with pytest.raises(ConfigError, match=r"^s3://host/x: credentials do not belong in a URL; give them by environment") as caught:
        absolute("s3://AKIA:secret/x@host/x".replace("secret/x", "secret"))
    assert "secret" not in str(caught.value)
    assert absolute("abfs://box@account.dfs.core.windows.net/x/") == "abfs://box@account.dfs.core.windows.net/x"


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert absolute("corpus/../x") == str(tmp_path / "x")
    assert absolute("~/x") == "/home/someone/x"
    assert absolute("s3://bucket/x/") == "s3://bucket/x"


def test_secrets_never_show(s3: S3Server) -> None:
    storage = Storage(s3.url("x"), s3.access())
    shown = repr(storage) + repr(storage.access) + storage.url + storage.display("y")
    with pytest.raises(StorageError) as caught:
        Storage(s3.url("x"), s3.access(options={"key": KEY, "secret": "wr0ng-secret"}, retry_seconds=5)).read("y")
    assert SECRET not in shown
    assert "wr0ng-secret" not in str(caught.value)


def test_a_file_is_located_in_its_directory(tmp_path: Path) -> None:
    storage, name = locate(f"{tmp_path}/sub/x.parquet", Access())
    assert (storage.url, name) == (f"{tmp_path}/sub", "x.parquet")
    assert locate(f"{tmp_path}/sub/y.parquet", Access())[0] is storage


def test_storage_goes_to_another_process(tmp_path: Path, s3: S3Server) -> None:
    for storage in (Storage(str(tmp_path)), Storage(s3.url("deep/er"), s3.access(retry_seconds=7))):
        storage.put("x", b"here")
        again = pickle.loads(pickle.dumps(storage))
        assert again.read("x") == b"here"
        assert (again.url, again.access.retry_seconds) == (storage.url, storage.access.retry_seconds)


# -- S3 ----------------------------------------------------------------------------------------------


def test_s3_put_read_list_delete(s3: S3Server) -> None:
    storage = Storage(s3.url("out"), s3.access())
    assert storage.list() == []
    assert not storage.exists()
    for path in ("data/a.parquet", "data/b.parquet", "plan/c.json"):
        storage.put(path, path.encode())
    assert s3.path("out/data/a.parquet").read_bytes() == b"data/a.parquet"
    assert [(entry.path, entry.size) for entry in storage.list("data")] == [("data/a.parquet", 14), ("data/b.parquet", 14)]
    assert storage.is_directory("data")
    assert not storage.is_directory("data/a.parquet")
    assert storage.read_range("plan/c.json", 5, 8) == b"c.j"
    with storage.open("plan/c.json") as reader:
        reader.seek(-4, os.SEEK_END)
        assert reader.read() == b"json"
    storage.delete(["data/a.parquet", "data/never"])
    assert [entry.path for entry in storage.list()] == ["data/b.parquet", "plan/c.json"]
    storage.delete_tree("data")
    assert [entry.path for entry in storage.list()] == ["plan/c.json"]
    with pytest.raises(NotFound, match=rf"nothing found at s3://{s3.bucket}/out/data/b.parquet"):
        storage.read("data/b.parquet")


def test_s3_versions_tell_contents_apart_and_agree_between_list_glob_and_info(s3: S3Server) -> None:
    storage = Storage(s3.url("in"), s3.access())
    storage.put("d/x.parquet", b"one")
    before = storage.info("d/x.parquet")
    assert storage.list() == storage.glob("*/*.parquet") == [before]
    storage.put("d/x.parquet", b"two")
    after = storage.info("d/x.parquet")
    assert after.size == before.size
    assert after.version != before.version


def test_s3_bucket_root(s3: S3Server) -> None:
    Storage(s3.url("d"), s3.access()).put("x.parquet", b"1")
    storage, name = locate(s3.url(), s3.access())
    assert storage.is_directory(name)
    assert [entry.path for entry in storage.list()] == ["d/x.parquet"]
    assert [entry.path for entry in Storage(s3.url(), s3.access()).glob("*/x.*")] == ["d/x.parquet"]


def test_s3_many_objects_are_all_listed(s3: S3Server) -> None:
    """A listing comes in pages of a thousand."""
    for number in range(1203):
        s3.path(f"{number:04d}").write_bytes(b"x")
    listed = Storage(s3.url(), s3.access()).list()
    assert [entry.path for entry in listed] == [f"{number:04d}" for number in range(1203)]


def test_s3_comes_back_after_the_server_was_killed(s3: S3Server) -> None:
    storage = Storage(s3.url("out"), s3.access(retry_seconds=60))
    storage.put("before", b"1")
    s3.kill()
    again = threading.Timer(2.0, s3.start)
    again.start()
    try:
        storage.put("after", b"2")
    finally:
        again.join()
    assert RETRIES.take() > 0
    assert [entry.path for entry in storage.list()] == ["after", "before"]


def test_s3_that_is_down_is_an_error_and_not_an_empty_listing(s3: S3Server) -> None:
    storage = Storage(s3.url("out"), s3.access(retry_seconds=0.1, options=s3.storage_options | {"config_kwargs": {"retries": {"max_attempts": 1}}}))
    storage.put("d/x", b"1")
    s3.kill()
    for ask in (
        lambda: storage.list(),
        lambda: storage.glob("*/x"),
        lambda: storage.exists("d/x"),
        lambda: storage.is_directory("d"),
        lambda: storage.read("d/x"),
    ):
        with pytest.raises(StorageError, match=rf"cannot (list|look at|read) s3://{s3.bucket}/out"):
            ask()


def test_s3_wrong_credentials_and_buckets_fail_at_once_with_a_way_out(s3: S3Server) -> None:
    s3.path("x").write_bytes(b"1")
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"credentials"):
        Storage(s3.url(), s3.access(options={"key": "nobody", "secret": "nothing"})).read("x")
    with pytest.raises(StorageError, match=r"cannot write s3://no-such-bucket/out/x: there is no such bucket or directory; create it first"):
        Storage("s3://no-such-bucket/out", s3.access()).put("x", b"")
    with pytest.raises(StorageError, match=r"s3://Not_A Bucket/out/x"):
        Storage("s3://Not_A Bucket/out", s3.access()).put("x", b"")
    assert time.monotonic() - began < 30
    assert RETRIES.take() == 0


def test_options_can_be_told_apart_by_protocol(tmp_path: Path) -> None:
    access = Access(options={"s3": {"key": "K"}, "http": {"block_size": 0}})
    assert access.options_for("s3")["key"] == "K"
    assert access.options_for("http") == {"block_size": 0}
    assert access.options_for("file") == {}
    assert Access(options={"key": "K"}).options_for("s3")["key"] == "K"
    storage = Storage("http://127.0.0.1:9", Access(options={"key": "K"}, retry_seconds=0.1))
    with pytest.raises(StorageError, match="give options by protocol"):
        storage.read("x")
