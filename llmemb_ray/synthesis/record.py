"""What a synthesis is: the record that stands in OUT while it is made and after.

Invariant: a record stands for one run key. Of one run only the count may grow; the units of what was asked for before stay as they were.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import pyarrow as pa

from llmemb_ray import parquet
from llmemb_ray.errors import NotFound, OutputError, RunMismatch
from llmemb_ray.representation.space import differences, digest
from llmemb_ray.shards import lease
from llmemb_ray.storage import Storage
from llmemb_ray.synthesis.commits import RECORDS, Made
from llmemb_ray.synthesis.receipt import Receipt
from llmemb_ray.synthesis.units import WRITTEN, Unit, units

PATH = "_llmemb/synthesis.json"

CHANGES_SHOWN = 8

FORMAT = 1
"""Version of the layout of OUT. A reader refuses a later one."""


@dataclass(frozen=True, kw_only=True)
class Record:
    identity: dict[str, Any]
    """What decides every example; its digest is the run key."""
    segments: list[int]
    """Counts that were asked for one after the other, growing."""
    unit_rows: int
    settings: dict[str, Any]
    """As given, secrets left out; only for the reader."""
    versions: dict[str, str]
    created: float
    """Unix time."""
    format: int = FORMAT

    @property
    def run_key(self) -> str:
        return digest(self.identity)

    @property
    def generator(self) -> str:
        return str(self.identity["generator"])

    @property
    def count(self) -> int:
        return self.segments[-1]

    def units(self) -> Iterator[Unit]:
        return units(self.segments, self.unit_rows)

    def up_to(self, count: int) -> Record:
        """The same run for at least so many examples."""
        return self if count <= self.count else replace(self, segments=[*self.segments, count])

    def require(self, identity: dict[str, Any], where: str) -> None:
        """Raises RunMismatch unless the run is of these settings."""
        changed = [f"  {name}: {_short(then)} there, {_short(now)} now" for name, then, now in differences(self.identity, identity)]
        if changed:
            told = "\n".join(changed[:CHANGES_SHOWN])
            raise RunMismatch(f"{where} holds a synthesis with other settings:\n{told}\nSet them as they were, name another out, or begin anew with overwrite")

    def save(self, output: Storage) -> None:
        output.put(PATH, json.dumps(asdict(self), indent=1, ensure_ascii=False).encode())

    @classmethod
    def load(cls, output: Storage) -> Record | None:
        """None where there is none. Raises OutputError."""
        try:
            record = cls(**json.loads(output.read(PATH)))
        except NotFound:
            return None
        except (ValueError, TypeError) as error:
            raise OutputError(f"{output.display(PATH)} is no record of a synthesis of this version: {error}") from error
        if record.format > FORMAT:
            raise OutputError(f"{output.display(PATH)} was written by a later version of llmemb_ray; read it with that")
        return record


@dataclass(frozen=True)
class Synthesis:
    """A synthesis as it stands in OUT, finished or not."""

    storage: Storage
    record: Record = field(repr=False)

    @classmethod
    def open(cls, output: Storage) -> Synthesis | None:
        """None where OUT holds none."""
        record = Record.load(output)
        return None if record is None else cls(output, record)

    @cached_property
    def receipt(self) -> Receipt | None:
        """The accounts; None while the run is not finished, a count that grew included."""
        receipt = Receipt.load(self.storage)
        return receipt if receipt is not None and receipt.asked == self.record.count else None

    @cached_property
    def commits(self) -> list[Made]:
        """As they stood when first asked for, by row."""
        return RECORDS.read_all(self.storage)

    def tables(self, kind: str) -> Iterator[tuple[Made, pa.Table]]:
        """(commit, what it wrote of a kind), ``shard`` or ``rejects``, by row. Raises OutputError naming a file that is gone or broken."""
        for commit in self.commits:
            path = getattr(commit, kind)
            if path is None:
                continue
            if not WRITTEN.fullmatch(path):
                raise OutputError(f"commit {commit.unit} of {self.storage.url} names {path!r}, which no synthesis writes; run verify")
            yield commit, read(self.storage, path)

    def status(self) -> dict[str, Any]:
        """Where the run stands, from storage alone."""
        receipt, held = self.receipt, lease.read(self.storage)
        done = receipt.units if receipt else len(RECORDS.committed_units(self.storage))
        at_work = held is not None and receipt is None and not held.stale()
        return {
            "run": self.storage.url,
            "state": "finished" if receipt else "running" if at_work else "stopped",
            "model": self.record.generator,
            "run_key": self.record.run_key,
            "units": sum(1 for _ in self.record.units()),
            "units_done": done,
            "rows": self.record.count,
            "progress": held.progress if held and not receipt else None,
            "driver": {"host": held.host, "pid": held.pid, "heartbeat_age_s": round(held.age(), 1)} if held and not receipt else None,
            "receipt": receipt.to_dict() if receipt else None,
        }


def read(output: Storage, path: str) -> pa.Table:
    """A file that a commit names. Raises OutputError."""
    try:
        return parquet.read(output.read(path))
    except NotFound as error:
        raise OutputError(f"{output.display(path)} is named by a commit but is not there; run verify") from error
    except (pa.ArrowException, OSError) as error:
        raise OutputError(f"{output.display(path)} cannot be read: {error}; run verify") from error


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 80 else f"{shown[:77]}…"
