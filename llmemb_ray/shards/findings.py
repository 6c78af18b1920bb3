"""What a check of a run found, and the checks that are the same whatever the run made: files and their sizes, checksums.

Invariant: knows of a commit only what files it names; what stands in them is for each kind of run to check.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from llmemb_ray import parquet
from llmemb_ray.errors import CheckFailed, NotFound
from llmemb_ray.storage import Storage

Level = Literal["quick", "sample", "full"]

SAMPLE_SHARE, SAMPLE_LEAST = 0.05, 20
"""Units looked into by ``sample``, evenly spaced over the run."""

PROBLEMS_KEPT = 100

DIRECTORIES = ("data", "rejects")
"""Where the files lie that commits name."""


class Names(Protocol):
    """A commit, as the files that it names."""

    @property
    def shard(self) -> str | None: ...
    @property
    def shard_bytes(self) -> int: ...
    @property
    def rejects(self) -> str | None: ...
    @property
    def rejects_bytes(self) -> int: ...


@dataclass
class Checked(ABC):
    """What was found. ``problems`` is empty for a sound run; the first ``PROBLEMS_KEPT`` are kept, all are counted."""

    run: str
    level: Level
    units: int = 0
    units_read: int = 0
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    problem_count: int = 0

    def problem(self, text: str) -> None:
        self.problem_count += 1
        if len(self.problems) < PROBLEMS_KEPT:
            self.problems.append(text)

    @property
    def sound(self) -> bool:
        return self.problem_count == 0

    @property
    def looked_into(self) -> str:
        """What of the run was checked, in words."""
        return {"quick": "names, sizes and counts", "sample": f"contents of {self.units_read} units", "full": "all contents"}[self.level]

    @abstractmethod
    def summary(self) -> str:
        """Of a sound run, in one line."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"sound": self.sound}

    def require(self) -> None:
        """Raises CheckFailed with what was found, if anything."""
        if not self.sound:
            shown = "\n".join(f"  {problem}" for problem in self.problems[:20])
            more = f"\n  … and {self.problem_count - 20} more" if self.problem_count > 20 else ""
            raise CheckFailed(f"{self.run} is not sound, {self.problem_count} problems:\n{shown}{more}")


def files(storage: Storage, commits: Sequence[Names], findings: Checked, *, finished: bool) -> None:
    """Every file that a commit names is there with its size; in a finished run no other is."""
    sizes = {entry.path: entry.size for directory in DIRECTORIES for entry in storage.list(directory)}
    named = {path: size for c in commits for path, size in ((c.shard, c.shard_bytes), (c.rejects, c.rejects_bytes)) if path}
    for path, size in named.items():
        if path not in sizes:
            findings.problem(f"{path} is named by a commit but is not there")
        elif sizes[path] != size:
            findings.problem(f"{path} has {sizes[path]} bytes, its commit says {size}")
    if finished:
        for path in sorted(set(sizes) - set(named)):
            findings.problem(f"{path} is named by no commit")


_Commit = TypeVar("_Commit")


def chosen(commits: Sequence[_Commit], level: Level) -> Sequence[_Commit]:
    """Those whose files ``level`` looks into."""
    if level == "full":
        return commits
    count = min(len(commits), max(SAMPLE_LEAST, int(len(commits) * SAMPLE_SHARE)))
    return [commits[int(place)] for place in np.linspace(0, len(commits) - 1, count)] if commits else []


def table(storage: Storage, path: str, sha256: str, findings: Checked) -> pa.Table | None:
    """A file that has the checksum of its commit; None where it is gone, which ``files`` tells, or not whole."""
    try:
        data = storage.read(path)
    except NotFound:
        return None
    if hashlib.sha256(data).hexdigest() != sha256:
        findings.problem(f"{path} does not have the checksum of its commit: its content changed")
        return None
    try:
        return parquet.read(data)
    except (pa.ArrowInvalid, OSError) as error:
        findings.problem(f"{path} cannot be read: {error}")
        return None
