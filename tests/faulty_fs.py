"""A local file system, protocol ``faulty``, that fails or dies at a chosen operation. The files are real files.

    from tests.faulty_fs import FAULTS
    FAULTS.set(at=3, error=errno.EIO)                 the 3rd operation raises OSError(EIO), once
    FAULTS.set(at=3, times=2, error=errno.EIO)        the 3rd and the 4th
    FAULTS.set(at=1, times=FOREVER, error=errno.ENOSPC, operations={"write"})   every write from now on
    FAULTS.set(at=5, die=True)                        the process ends with os._exit(9) at its 5th operation
    FAULTS.set(at=1, die=True, moment="half", path=r"data/")    … with half of the first shard's bytes written
    FAULTS.clear()
    with FAULTS.recording() as log: …                 log: [(operation, path), …], to learn how many there are

Then use ``faulty:///absolute/path`` as any other URL. Importing this module registers the protocol in this process;
a Ray worker or another process imports it itself (``worker_process_setup_hook="tests.faulty_fs.install"``). Another
process takes its fault from the environment: ``FAULTS.environment(at=…, …)`` makes the variables, which are read at import.

Operations are what ``llmemb_ray.storage`` asks for: info, list, read, mkdir, write, delete. They are numbered from 1 over
the process, all threads together; only those that match ``operations`` and ``path`` (a regular expression, searched) count.
The rename that ends a local write is no operation of its own: ``moment="after"`` dies between the write and the rename.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem

FOREVER = 10**9

VARIABLE = "FAULTY_FS"

OPERATIONS = ("info", "list", "read", "mkdir", "write", "delete")


@dataclass(frozen=True, kw_only=True)
class Fault:
    at: int
    """Number of the operation that fails, from 1."""
    times: int = 1
    """How many operations fail from there on."""
    error: int = errno.EIO
    die: bool = False
    """End the process by ``os._exit(9)`` instead of raising."""
    moment: Literal["before", "half", "after"] = "before"
    """When: before the operation, with half of a write's bytes on disk, or when it is done."""
    operations: tuple[str, ...] = OPERATIONS
    path: str = ""


class Faults:
    """Counts operations and knows which of them fails."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nested = threading.local()
        self._log: list[tuple[str, str]] | None = None
        self.count = 0
        """Matching operations since ``set``."""
        self.fault: Fault | None = Fault(**json.loads(os.environ[VARIABLE])) if VARIABLE in os.environ else None

    def set(self, **fault: Any) -> None:
        self.fault, self.count = Fault(**fault), 0

    def clear(self) -> None:
        self.fault, self.count = None, 0

    @staticmethod
    def environment(**fault: Any) -> dict[str, str]:
        """Environment variables that set the fault in a new process."""
        return {VARIABLE: json.dumps(asdict(Fault(**fault)))}

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[tuple[str, str]]]:
        self._log = log = []
        try:
            yield log
        finally:
            self._log = None

    @contextlib.contextmanager
    def operation(self, name: str, path: str, half: Any = None) -> Iterator[None]:
        """Wraps one operation. half: does half of it."""
        if getattr(self._nested, "inside", False):
            yield
            return
        fault = self._meets(name, path)
        if fault is not None and fault.moment != "after":
            if fault.moment == "half" and half is not None:
                half()
            self._strike(fault, path)
        self._nested.inside = True
        try:
            yield
        finally:
            self._nested.inside = False
        if fault is not None and fault.moment == "after":
            self._strike(fault, path)

    def _meets(self, name: str, path: str) -> Fault | None:
        with self._lock:
            if self._log is not None:
                self._log.append((name, path))
            fault = self.fault
            if fault is None or name not in fault.operations or not re.search(fault.path, path):
                return None
            self.count += 1
            return fault if fault.at <= self.count < fault.at + fault.times else None

    @staticmethod
    def _strike(fault: Fault, path: str) -> None:
        if fault.die:
            os._exit(9)
        raise OSError(fault.error, os.strerror(fault.error), path)


FAULTS = Faults()


class FaultyFileSystem(LocalFileSystem):
    protocol = "faulty"

    def info(self, path: Any, **kwargs: Any) -> Any:
        with FAULTS.operation("info", os.fspath(path)):
            return super().info(path, **kwargs)

    def ls(self, path: Any, detail: bool = False, **kwargs: Any) -> Any:
        with FAULTS.operation("list", path):
            return super().ls(path, detail=detail, **kwargs)

    def cat_file(self, path: Any, start: int | None = None, end: int | None = None, **kwargs: Any) -> Any:
        with FAULTS.operation("read", path):
            return super().cat_file(path, start=start, end=end, **kwargs)

    def makedirs(self, path: Any, exist_ok: bool = False) -> None:
        with FAULTS.operation("mkdir", path):
            super().makedirs(path, exist_ok=exist_ok)

    def pipe_file(self, path: Any, value: Any, mode: str = "overwrite", **kwargs: Any) -> None:
        with FAULTS.operation("write", path, half=lambda: super(FaultyFileSystem, self).pipe_file(path, bytes(value)[: len(value) // 2])):
            super().pipe_file(path, value, mode=mode, **kwargs)

    def rm_file(self, path: Any) -> None:
        with FAULTS.operation("delete", path):
            super().rm_file(path)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        with FAULTS.operation("delete", str(path)):
            super().rm(path, recursive=recursive, maxdepth=maxdepth)


def install() -> None:
    fsspec.register_implementation(FaultyFileSystem.protocol, FaultyFileSystem, clobber=True)


install()
