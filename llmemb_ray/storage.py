"""The one place that opens a file system.

Invariant: an object is either absent or whole under its final name. A local file is written beside
its name, synced and renamed; an object store gets one PUT. Every operation that can fail for a passing
reason is retried with exponential back-off and jitter, and every retry is counted. URLs are redacted
before they stand in a message. This module knows nothing of runs, shards or models.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import posixpath
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import tenacity
from fsspec.utils import glob_translate

from llmemb_ray.errors import ConfigError, NotFound, StorageError

T = TypeVar("T")

LIST_THREADS = 32
"""Threads for operations over many small objects; object stores answer in tens of milliseconds."""

SINGLE_PUT_BYTES = 4 * 2**30
"""Below this an object goes in one PUT (S3 allows 5 GiB); above it fsspec's multipart, which aborts on failure."""

_PERMANENT_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP}
_PERMANENT_OS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_CLIENT_MODULES = ("aiohttp", "botocore", "urllib3", "requests", "google.api_core", "azure.core")
_CREDENTIALS = re.compile(r"Credential|AccessDenied|Forbidden|InvalidAccessKey|SignatureDoesNotMatch|ProfileNotFound", re.I)
_USAGE = re.compile(r"ParamValidation|InvalidBucketName|Invalid bucket name|InvalidEndpoint|NoSuchBucket", re.I)
_USER_INFO = re.compile(r"((?<!abfs)(?<!abfss)://)[^/]*@|(://)[^/:]*:[^/]*@")
"""User and password in a URL; ``abfs://container@account`` is neither."""
_TEMPORARY_NAME = re.compile(r"\.tmp-[0-9a-f]{12}$")


class RetryCounter:
    """Counts retries of this process; ``take`` returns and resets, so that each attempt reports its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def add(self) -> None:
        with self._lock:
            self._count += 1

    def take(self) -> int:
        with self._lock:
            count, self._count = self._count, 0
            return count


RETRIES = RetryCounter()


def redact(url: str) -> str:
    """The URL without user, password and query string, fit for a message or a record."""
    url = _USER_INFO.sub("://", url)
    if url.startswith(("http://", "https://")):
        return url.split("?", 1)[0]
    return re.sub(r"\?[^/?]*=.*", "", url) if "://" in url else url


def absolute(url: str) -> str:
    """Local paths absolute, URLs without a closing slash, one name for one protocol. Raises ConfigError for credentials inside a URL."""
    url = re.sub(r"^(file|local)://(?=/)", "", url)
    url = re.sub(r"^s3a://", "s3://", url)
    if "://" not in url:
        return os.path.abspath(os.path.expanduser(url))
    if _USER_INFO.search(url):
        raise ConfigError(f"{redact(url)}: credentials do not belong in a URL; give them by environment, profile or storage_options")
    return url.rstrip("/")


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: throttling, resets and time-outs, but not a missing file or a full disk."""
    if isinstance(error, _PERMANENT_OS):
        return False
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_ERRNO and not _CREDENTIALS.search(str(error)) and not _USAGE.search(str(error))
    if isinstance(error, TimeoutError):
        return True
    module = type(error).__module__ or ""
    shown = type(error).__name__ + str(error)
    return module.startswith(_CLIENT_MODULES) and not _CREDENTIALS.search(shown) and not _USAGE.search(shown)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One object: ``path`` as its file system names it, ``size`` in bytes, ``version`` changes with the content."""

    path: str
    size: int
    version: str


def _version(info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "md5Hash", "generation"):
        if info.get(key):
            return f"etag:{str(info[key]).strip(chr(34))}"
    modified = info.get("mtime") or info.get("LastModified") or info.get("updated") or info.get("last_modified")
    return f"mtime:{modified}"


@dataclass(kw_only=True)
class Access:
    """How to reach storage: endpoint and fsspec options. May hold secrets: never printed, never recorded."""

    endpoint_url: str | None = None
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    retry_seconds: float = 300.0
    """How long an operation is retried before it fails for good."""

    def __repr__(self) -> str:
        return f"Access(endpoint_url={self.endpoint_url and redact(self.endpoint_url)!r})"

    def options_for(self, protocol: str) -> dict[str, Any]:
        """The options for one protocol: those under its name where they are told apart by protocol, else all."""
        by_protocol = all(isinstance(value, dict) and name in fsspec.available_protocols() for name, value in self.options.items())
        options = dict(self.options.get(protocol, {})) if by_protocol else dict(self.options)
        if protocol in ("s3", "s3a"):
            config = dict(options.get("config_kwargs", {}))
            config.setdefault("retries", {"max_attempts": 0})  # Ours retries, for longer, and counts.
            endpoint = self.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            if endpoint:
                options.setdefault("endpoint_url", endpoint)
                # S3-compatible stores often refuse botocore's newer default checksums; AWS itself accepts both.
                config.setdefault("request_checksum_calculation", "when_required")
                config.setdefault("response_checksum_validation", "when_required")
            options["config_kwargs"] = config
        return options


_OPENED: dict[tuple[str, str], Storage] = {}


def locate(url: str, access: Access) -> tuple[Storage, str]:
    """The storage of a file's directory, opened once a process, and the file's name there."""
    parent, name = posixpath.split(url)
    if parent.endswith(":"):  # A bucket's root has no parent to be named in.
        parent, name = url, ""
    key = (parent, json.dumps([access.endpoint_url, access.options, access.retry_seconds], sort_keys=True, default=str))
    if key not in _OPENED:
        _OPENED[key] = Storage(parent or "/", access)
    return _OPENED[key], name


class Storage:
    """A directory or prefix on one file system; ``path`` arguments are relative to it.

    Raises ``StorageError`` (``NotFound`` where nothing is there) with the redacted URL. Can be pickled:
    the file system is opened again in the process that unpickles it.
    """

    def __init__(self, url: str, access: Access | None = None) -> None:
        self.access = access or Access()
        self._url = url
        self._open()

    def _open(self) -> None:
        protocol, _ = fsspec.core.split_protocol(self._url)
        options = self.access.options_for(protocol or "file")
        try:
            # Not ``url_to_fs``: it takes "::" for a chain of file systems, and names of directories may hold it.
            kind = fsspec.get_filesystem_class(protocol or "file")
            self.fs = kind(**(kind._get_kwargs_from_urls(self._url) | {"use_listings_cache": False} | options))
            self.root = kind._strip_protocol(self._url)
        except (ImportError, ValueError, TypeError) as error:
            raise StorageError(f"cannot open {redact(self._url)}: {error}") from error
        if _is_s3(self.fs):
            self.fs.retries = 1  # Ours counts.
        self.root = self.root.rstrip("/") or "/"
        protocols = (self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol
        self._local = getattr(self.fs, "local_file", False) or "file" in protocols

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self._url, "access": self.access}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.access, self._url = state["access"], state["url"]
        self._open()

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    @property
    def url(self) -> str:
        return redact(self._url)

    def child(self, path: str) -> Storage:
        return Storage(posixpath.join(self._url.rstrip("/"), path), self.access)

    def full(self, path: str) -> str:
        return posixpath.join(self.root, path) if path else self.root

    def display(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{path}" if path else self.url

    def attempt(self, what: str, path: str, call: Callable[[], T]) -> T:
        """Runs one storage operation with retries; turns its last error into a ``StorageError``."""

        def count(_: tenacity.RetryCallState) -> None:
            RETRIES.add()

        try:
            return tenacity.Retrying(
                retry=tenacity.retry_if_exception(is_transient),
                wait=tenacity.wait_random_exponential(multiplier=0.2, max=15),
                stop=tenacity.stop_after_delay(self.access.retry_seconds),
                before_sleep=count,
                reraise=True,
            )(call)
        except FileNotFoundError as error:
            if what == "write":
                raise StorageError(f"cannot write {self.display(path)}: there is no such bucket or directory; create it first") from error
            raise NotFound(f"nothing found at {self.display(path)}") from error
        except PermissionError as error:
            raise StorageError(
                f"no permission to {what} {self.display(path)}: {_reason(error)}; check the credentials and the bucket policy or file mode"
            ) from error
        except OSError as error:
            way_out = "; free some space and run the same command again, it resumes" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise StorageError(f"cannot {what} {self.display(path)}: {_reason(error)}{way_out}") from error
        except TypeError as error:
            if "keyword argument" not in str(error) or not self.access.options:
                raise
            raise StorageError(
                f"cannot {what} {self.display(path)}: an option in storage_options is not for this kind of storage ({_reason(error)}); "
                "give options by protocol, as storage_options: {s3: {…}, http: {…}}"
            ) from error
        except Exception as error:
            if (type(error).__module__ or "").startswith(_CLIENT_MODULES):
                reason = f"{type(error).__name__}: {_reason(error)}"
                way_out = "; give credentials by environment, profile or storage_options" if _CREDENTIALS.search(reason) else ""
                raise StorageError(f"cannot {what} {self.display(path)}: {reason}{way_out}") from error
            raise

    # -- reading -----------------------------------------------------------------------------------

    def read(self, path: str) -> bytes:
        return self.attempt("read", path, lambda: bytes(self.fs.cat_file(self.full(path))))

    def read_range(self, path: str, start: int, end: int) -> bytes:
        return self.attempt("read", path, lambda: bytes(self.fs.cat_file(self.full(path), start=start, end=end)))

    def info(self, path: str = "") -> Entry:
        info = self.attempt("look at", path, lambda: self.fs.info(self.full(path)))
        if info["type"] == "directory":
            raise NotFound(f"{self.display(path)} is a directory, not a file")
        return Entry(path=path, size=int(info["size"]), version=_version(info))

    def exists(self, path: str = "") -> bool:
        return self._type(path) is not None

    def is_directory(self, path: str = "") -> bool:
        return self._type(path) == "directory"

    def _type(self, path: str) -> str | None:
        """From ``info``: fsspec's own ``exists`` and ``isdir`` answer no where the store cannot be reached."""
        try:
            return str(self.attempt("look at", path, lambda: self.fs.info(self.full(path))["type"]))
        except NotFound:
            return None

    def list(self, path: str = "") -> list[Entry]:
        """Every file under ``path``, sorted by name, with paths relative to this storage; [] if there is none."""

        def find() -> dict[str, dict[str, Any]]:
            try:
                if self._local:
                    directory = self.full(path)
                    return {info["name"]: info for info in self._walk(directory, (os.path.realpath(directory),))}
                return self.fs.find(self.full(path), detail=True)  # type: ignore[no-any-return]
            except FileNotFoundError:
                return {}

        infos = self.attempt("list", path, find)
        prefix = self.root.rstrip("/") + "/"
        return [
            Entry(path=name.removeprefix(prefix), size=int(info.get("size") or 0), version=_version(info))
            for name, info in sorted(infos.items())
            if info.get("type") != "directory" and name != self.full(path).rstrip("/") + "/"
        ]

    def _walk(self, directory: str, above: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """Files below a local directory. fsspec's own ``find`` passes over what it cannot list, and does not follow links.

        above: where the directories that lead here lie; a link back to one of them is not followed.
        """
        try:
            infos = self.fs.ls(directory, detail=True)
        except FileNotFoundError:
            return
        for entry in infos:
            info = entry
            if entry.get("islink"):
                with contextlib.suppress(FileNotFoundError):
                    info = self.fs.info(entry["name"])
            if info["type"] == "directory":
                place = os.path.realpath(info["name"])
                if place not in above:
                    yield from self._walk(info["name"], (*above, place))
            else:
                yield info

    def glob(self, pattern: str) -> builtins.list[Entry]:
        """The files that match ``pattern``, itself relative to this storage (``*``, ``**``, ``?``, ``[]``)."""
        fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
        matches = re.compile(glob_translate(pattern)).match
        return [entry for entry in self.list(fixed) if matches(entry.path)]

    def open(self, path: str, size: int | None = None) -> io.BufferedReader:
        """A seekable binary reader whose every range is fetched with retries; close it after use."""
        raw = _RangeReader(self, path, self.info(path).size if size is None else size)
        return io.BufferedReader(raw, buffer_size=64 * 1024 if self._local else 2**20)

    # -- writing -----------------------------------------------------------------------------------

    def put(self, path: str, data: bytes | memoryview) -> None:
        """Writes the whole object at once; what was there before stays until the new one is whole and durable."""
        target = self.full(path)

        def store() -> None:
            if not self._local:
                self.fs.pipe_file(target, bytes(data), **({"chunksize": SINGLE_PUT_BYTES} if _is_s3(self.fs) else {}))
                return
            temporary = f"{target}.tmp-{uuid.uuid4().hex[:12]}"
            self.fs.makedirs(posixpath.dirname(target), exist_ok=True)
            try:
                self.fs.pipe_file(temporary, data)
                _sync(temporary)
                os.replace(temporary, target)  # fsspec's ``mv`` falls back to copying, which shows half a file.
                _sync(posixpath.dirname(target))
            except OSError:
                if os.path.exists(temporary):
                    os.unlink(temporary)
                raise

        self.attempt("write", path, store)

    def delete(self, paths: Iterable[str]) -> None:
        """Deletes the objects; one that is already gone is no error. Raises StorageError for what a link puts outside of this storage."""

        def remove(path: str) -> None:
            self._require_inside(path)
            try:
                self.attempt("delete", path, lambda: self.fs.rm_file(self.full(path)))
            except NotFound:
                return

        _ = self.map(remove, list(paths))

    def _require_inside(self, path: str) -> None:
        if not self._local:
            return
        root, place = os.path.realpath(self.root), os.path.realpath(posixpath.dirname(self.full(path)))
        if os.path.commonpath([root, place]) != root:
            raise StorageError(f"refuses to delete {self.display(path)}: by a link it lies in {place}, outside of {self.url}; remove the link")

    def delete_tree(self, path: str) -> None:
        self.delete([entry.path for entry in self.list(path)])
        if self._local and self.exists(path):
            self.attempt("delete", path, lambda: self.fs.rm(self.full(path), recursive=True))

    def map(self, function: Callable[[str], T], paths: Sequence[str]) -> builtins.list[T]:
        """``function`` over many paths from a pool of threads, results in order; the first error is raised."""
        if len(paths) < 2:
            return [function(path) for path in paths]
        with ThreadPoolExecutor(max_workers=min(LIST_THREADS, len(paths))) as pool:
            return list(pool.map(function, paths))


def is_temporary(path: str) -> bool:
    """Whether this is what an interrupted local write left behind."""
    return bool(_TEMPORARY_NAME.search(path))


def _is_s3(fs: Any) -> bool:
    return "s3" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return redact(str(error)) or type(error).__name__


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _RangeReader(io.RawIOBase):
    """Random access by stateless range requests, so that each can be tried again by itself."""

    def __init__(self, storage: Storage, path: str, size: int) -> None:
        self._storage, self._path, self._size, self._position = storage, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        data = self._storage.read_range(self._path, self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def cache_directory(name: str) -> Path:
    """A directory that this node keeps files in from one command to the next."""
    directory = Path(os.environ.get("LLMEMB_CACHE", Path.home() / ".cache" / "llmemb_ray")) / name
    directory.mkdir(parents=True, exist_ok=True)
    return directory
