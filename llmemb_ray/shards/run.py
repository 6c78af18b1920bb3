"""A run as it stands in OUT: opened, read and iterated. What every reader of vectors goes through."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from llmemb_ray import parquet
from llmemb_ray.errors import NotFound, OutputError
from llmemb_ray.shards import commits as commit_records
from llmemb_ray.shards import lease
from llmemb_ray.shards.commits import Commit
from llmemb_ray.shards.plan import Plan
from llmemb_ray.shards.precision import Calibration, Precision
from llmemb_ray.shards.receipt import Receipt
from llmemb_ray.storage import LIST_THREADS, Access, Storage, absolute

DATA = "data"
REJECTS = "rejects"
OWN = "_llmemb"


class Run:
    """A run, finished or not, through its commits. Raises OutputError where ``url`` holds none."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        plan = Plan.load(storage)
        if plan is None:
            raise OutputError(f"{storage.url} holds no run of llmemb_ray (there is no {OWN}/plan in it)")
        self.plan: Plan = plan

    @property
    def url(self) -> str:
        return self.storage.url

    @cached_property
    def receipt(self) -> Receipt | None:
        """The accounts; None while the run is not finished, files appended to it included."""
        receipt = Receipt.load(self.storage)
        return None if receipt is None or receipt.run_key in self.plan.earlier_run_keys else receipt

    @cached_property
    def commits(self) -> list[Commit]:
        """The commit of each finished unit, as they stood when first asked for."""
        return commit_records.read_all(self.storage)

    @cached_property
    def precision(self) -> Precision:
        """How the vectors are written; its ``decode`` makes float32 vectors of an ``embedding`` column of whatever dtype."""
        return self.plan.precision(Calibration.load(self.storage) if self.plan.calibrates else None)

    def shards(self, columns: list[str] | None = None) -> Iterator[tuple[Commit, pa.Table]]:
        """The committed shards, a row group at a time: (commit, table with ``columns`` or all)."""
        for commit in self.commits:
            if commit.shard is not None:
                for table in read_groups(self.storage, commit.shard, columns):
                    yield commit, table

    @property
    def shard_paths(self) -> list[str]:
        """Of the committed shards, in the order of their units."""
        return [commit.shard for commit in self.commits if commit.shard is not None]

    def light_tables(self, columns: list[str], *, unreadable: list[str] | None = None) -> Iterator[pa.Table]:
        """Each committed shard's ``columns``, whole, in order; some are read ahead, so only for columns that are small.

        unreadable: takes the paths of shards that are gone or broken, which then yield a table without rows and columns of their own type.
        """
        shards = self.shard_paths

        def whole(path: str) -> pa.Table:
            try:
                return pa.concat_tables(read_groups(self.storage, path, columns))
            except OutputError:
                if unreadable is None:
                    raise
                unreadable.append(path)
                types = {"prompt_hash": pa.binary(16)}
                return pa.table({name: pa.array([], types.get(name, pa.null())) for name in columns})

        with ThreadPoolExecutor(max_workers=LIST_THREADS) as pool:
            for start in range(0, len(shards), LIST_THREADS):
                yield from pool.map(whole, shards[start : start + LIST_THREADS])

    def rejects(self) -> Iterator[pa.Table]:
        for commit in self.commits:
            if commit.rejects is not None:
                yield from read_groups(self.storage, commit.rejects, None)

    def status(self) -> dict[str, Any]:
        """Where the run stands, from storage alone: units done, rows, and the driver's last heartbeat if one is at work."""
        done = commit_records.committed_units(self.storage)
        total = sum(1 for _ in self.plan.units())
        receipt = self.receipt
        held = lease.read(self.storage)
        at_work = held is not None and receipt is None and not held.stale()
        state = "finished" if receipt else "running" if at_work else "stopped"
        return {
            "run": self.url,
            "state": state,
            "model": self.plan.model_name,
            "run_key": self.plan.run_key,
            "space": self.plan.space_digest,
            "units": total,
            "units_done": receipt.units if receipt else len(done),
            "rows": self.plan.rows,
            "progress": held.progress if held and not receipt else None,
            "driver": {"host": held.host, "pid": held.pid, "heartbeat_age_s": round(held.age(), 1)} if held and not receipt else None,
            "receipt": receipt.to_dict() if receipt else None,
        }


@contextmanager
def opened(storage: Storage, path: str) -> Iterator[pq.ParquetFile]:
    """One Parquet file of a run. Raises OutputError naming a file that is gone or broken, also for what goes wrong within the block."""
    try:
        with storage.open(path) as reader:
            yield parquet.opened(reader)
    except NotFound as error:
        raise OutputError(f"{storage.display(path)} is named by a commit but is not there; run verify") from error
    except (pa.ArrowException, OSError) as error:
        raise OutputError(f"{storage.display(path)} cannot be read: {error}; run verify") from error


def group_edges(file: pq.ParquetFile) -> npt.NDArray[np.int64]:
    """int64 [row groups + 1]: the first row of each row group, and the number of rows."""
    return np.cumsum([0, *(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))])


def read_groups(storage: Storage, path: str, columns: list[str] | None) -> Iterator[pa.Table]:
    """The row groups of one Parquet file of the run. Raises OutputError naming a file that is gone or broken."""
    with opened(storage, path) as file:
        for group in range(file.num_row_groups):
            yield parquet.plain(file.read_row_group(group, columns=columns))


def read_rows(storage: Storage, path: str, rows: npt.NDArray[np.int64], columns: list[str]) -> pa.Table:
    """Some rows of one shard, in the order of ``rows``; of other row groups nothing is read. Raises OutputError likewise."""
    wanted, order = np.unique(rows, return_inverse=True)
    with opened(storage, path) as file:
        edges = group_edges(file)
        groups = np.searchsorted(edges, wanted, side="right") - 1
        parts = [file.read_row_group(group, columns=columns).take(pa.array(wanted[groups == group] - edges[group])) for group in np.unique(groups).tolist()]
    table = parquet.plain(pa.concat_tables(parts))
    return table if np.array_equal(wanted, rows) else table.take(pa.array(order))


def open_run(url: str, **access: Any) -> Run:
    """Opens a run. ``access``: ``endpoint_url``, ``options``. Raises OutputError."""
    return Run(Storage(absolute(url), Access(**access)))
