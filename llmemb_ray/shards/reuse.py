"""Vectors of an earlier run, found by the hash of their prompt and copied instead of made again.

Invariant: a vector is copied only within one vector space and one engine, and only under the whole 16-byte
hash of the same token ids. The index of the earlier run lies in the new run's OUT, sorted by hash, and is read
where it lies on a node's disk: nothing proportional to the earlier run is held in memory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmemb_ray import parquet
from llmemb_ray.errors import NotFound, OutputError, RunMismatch
from llmemb_ray.representation.space import differences
from llmemb_ray.shards import partitions
from llmemb_ray.shards.partitions import Partitions
from llmemb_ray.shards.plan import Plan
from llmemb_ray.shards.precision import Precision
from llmemb_ray.shards.records import inside
from llmemb_ray.shards.run import OWN, Run, read_rows
from llmemb_ray.shards.schema import raw_values
from llmemb_ray.storage import Storage, cache_directory

DIRECTORY = f"{OWN}/reuse"
RECORD = f"{DIRECTORY}/index.json"
SHARDS = f"{DIRECTORY}/shards.parquet"
DELETED = f"{OWN}/deleted.parquet"

_REMEDY = f"delete {DIRECTORY} in the output and start the job again, which makes it anew"

_ENTRY = np.dtype([("hash", "<u8"), ("shard", "<i4"), ("row", "<i4")])
"""First 8 bytes of a prompt's hash, and where its vector stands."""


@dataclass
class Copies:
    """vectors: float32 [N, D], zero where ``found`` is not; raw: the same as stored, where both runs store alike."""

    found: npt.NDArray[np.bool_]
    vectors: npt.NDArray[np.float32]
    raw: npt.NDArray[Any] | None

    def take(self, rows: npt.NDArray[np.int64]) -> Copies:
        return Copies(self.found[rows], self.vectors[rows], None if self.raw is None else self.raw[rows])


def require_finished(earlier: Run) -> None:
    """Raises OutputError if a run that vectors are to be copied from is not finished."""
    if earlier.receipt is None:
        raise OutputError(f"reuse: the run in {earlier.url} is not finished; finish it first, with the embed command that began it")


def check(earlier: Run, plan: Plan) -> None:
    """Raises RunMismatch, field by field, if a run's vectors cannot stand in the run of ``plan``."""
    ours = {"space": plan.space, "engine": {name: plan.engine[name] for name in ("backend", "compute_dtype", "quantization")}}
    theirs = {"space": earlier.plan.space, "engine": {name: earlier.plan.engine[name] for name in ours["engine"]}}
    changed = [f"  {name}: that run has {there!r}, this one {here!r}" for name, here, there in differences(ours, theirs)]
    if earlier.plan.dtype not in (plan.dtype, "float32"):
        changed.append(f"  dtype: that run has {earlier.plan.dtype!r}, this one {plan.dtype!r}; only float32 can become another")
    if earlier.plan.dtype == plan.dtype and earlier.plan.engine["centre"] != plan.engine["centre"]:
        changed.append(f"  centre: that run has {earlier.plan.engine['centre']}, this one {plan.engine['centre']}")
    elif not changed and plan.calibrates and earlier.plan.dtype == plan.dtype:
        calibration = earlier.precision.calibration
        if calibration is None or plan.engine["calibration"] != calibration.digest:
            changed.append(f"  calibration: that run's codes have other ranges; give --calibration {earlier.url}")
    if bool(plan.corpus["chunk_pool"] == "mean") != bool(earlier.plan.corpus["chunk_pool"] == "mean"):
        changed.append(f"  chunk_pool: that run has {earlier.plan.corpus['chunk_pool']!r}, this one {plan.corpus['chunk_pool']!r}")
    if changed:
        raise RunMismatch(f"reuse: vectors of {earlier.url} cannot be copied into this run:\n" + "\n".join(changed))


def build_index(earlier: Run, output: Storage) -> list[str]:
    """Writes the index of a finished run's prompts into ``output``; nothing if it stands there already.

    Returns the earlier run's shards that cannot be read, whose vectors are made anew.
    """
    assert earlier.receipt is not None
    identity = {"run": earlier.url, "run_key": earlier.plan.run_key, "finished": earlier.receipt.finished}
    try:
        if json.loads(output.read(RECORD))["of"] == identity:
            return []
    except (NotFound, ValueError, TypeError, KeyError, RecursionError):
        pass  # None there, or none that can be read: it is made anew.
    output.delete_tree(DIRECTORY)
    output.put(SHARDS, parquet.to_bytes(pa.table({"shard": pa.array(earlier.shard_paths, pa.string())})))
    broken: list[str] = []
    with tempfile.TemporaryDirectory(prefix="llmemb-reuse-") as scratch:
        spread = Partitions(Path(scratch))
        for shard, table in enumerate(earlier.light_tables(["prompt_hash"], unreadable=broken)):
            digests = partitions.binary_digests(table["prompt_hash"])
            spread.add(digests, (np.int64(shard) << np.int64(32)) | np.arange(len(digests), dtype=np.int64))
        names = {}
        for number, (digests, places) in enumerate(spread):
            if len(digests):
                entries = np.zeros(len(digests), _ENTRY)
                entries["hash"] = _heads(digests)
                entries["shard"], entries["row"] = places >> 32, places & 0xFFFFFFFF
                names[str(number)] = f"{DIRECTORY}/{number:02d}.bin"
                output.put(names[str(number)], np.sort(entries, order="hash").tobytes())
    output.put(RECORD, json.dumps({"of": identity, "partitions": names}).encode())
    return broken


def _heads(digests: partitions.Digests) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(digests).view("<u8").reshape(-1, 2)[:, 0]


@dataclass
class Reuse:
    """What a worker needs to copy vectors of an earlier run."""

    earlier: Storage
    precision: Precision
    """Of the earlier run."""
    output: Storage
    raw: bool
    """Whether both runs store vectors alike, so that they are copied bit by bit."""
    _index: _Index | None = field(default=None, repr=False, init=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_index": None}

    def copies(self, hashes: pa.ChunkedArray, sign: Callable[[], None] = lambda: None) -> Copies:
        """The vectors of those prompts that the earlier run has. hashes: column ``prompt_hash`` of N rows; sign: called after each file that was read."""
        if self._index is None:
            self._index = _Index(self.output, sign)
        digests = partitions.binary_digests(hashes)
        found = np.zeros(len(digests), np.bool_)
        vectors = np.zeros((len(digests), self.precision.dimension), np.float32)
        raw: npt.NDArray[Any] | None = None
        shard_of, row_of = self._index.find(digests)
        for shard in np.unique(shard_of[shard_of >= 0]).tolist():
            rows = np.flatnonzero(shard_of == shard)
            table = read_rows(self.earlier, self._index.shards[shard], row_of[rows], ["prompt_hash", "embedding"])
            column, there = table["embedding"], partitions.binary_digests(table["prompt_hash"])
            same = partitions.sortable(there) == partitions.sortable(digests[rows])
            values = raw_values(column)
            found[rows[same]] = True
            vectors[rows[same]] = self.precision.decode(column)[same]
            if self.raw:
                raw = np.zeros((len(digests), values.shape[1]), values.dtype) if raw is None else raw
                raw[rows[same]] = values[same]
            sign()
        return Copies(found, vectors, raw)


class _Index:
    """The index as it lies on this node's disk, brought there once."""

    def __init__(self, output: Storage, sign: Callable[[], None]) -> None:
        from filelock import FileLock

        record = output.read(RECORD)
        here = cache_directory("reuse") / hashlib.sha256(record).hexdigest()[:32]
        names = _names(record, output.display(RECORD))
        with FileLock(f"{here}.lock"):
            if not here.is_dir():
                partial = Path(f"{here}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                for number, name in names.items():
                    (partial / str(number)).write_bytes(output.read(name))
                    sign()
                partial.rename(here)
        self._parts: dict[int, npt.NDArray[Any]] = {number: np.memmap(here / str(number), _ENTRY, "r") for number in names}
        self.shards = _shards(output.read(SHARDS), output.display(SHARDS))

    def find(self, digests: partitions.Digests) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(shard, row) of each digest by its first 8 bytes; −1 where there is none."""
        shards, rows = np.full(len(digests), -1, np.int64), np.zeros(len(digests), np.int64)
        places = partitions.partition_of(digests)
        for number in np.unique(places).tolist():
            part = self._parts.get(number)
            if part is None:
                continue
            here = np.flatnonzero(places == number)
            heads = _heads(digests[here])
            place = np.minimum(np.searchsorted(part["hash"], heads), len(part) - 1)
            hit = part["hash"][place] == heads
            shards[here[hit]], rows[here[hit]] = part["shard"][place[hit]], part["row"][place[hit]]
        return shards, rows


def _names(record: bytes, origin: str) -> dict[int, str]:
    """The files of an index by the number of their partition. Raises OutputError where the record, ``origin``, is none or names a file elsewhere."""
    try:
        names = {int(number): inside(name, origin, remedy=_REMEDY) for number, name in json.loads(record)["partitions"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise OutputError(f"{origin} is no index of an earlier run's vectors: {error}; {_REMEDY}") from error
    if not names.keys() <= set(range(partitions.COUNT)):
        raise OutputError(f"{origin} names partitions beyond 0 to {partitions.COUNT - 1}; {_REMEDY}")
    return names


def _shards(data: bytes, origin: str) -> list[str]:
    """The earlier run's shards by the numbers that an index has for them. Raises OutputError likewise."""
    try:
        return [inside(shard, origin, remedy=_REMEDY) for shard in parquet.read(data)["shard"].to_pylist()]
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise OutputError(f"{origin} is no list of an earlier run's shards: {error}; {_REMEDY}") from error


def write_deletions(earlier: Run, run: Run) -> int:
    """Lists the rows of the earlier run that ``run`` no longer has, in ``_llmemb/deleted.parquet``, and returns how many.

    A row is told by its id where both runs have ids of one type and it has one, else by its prompt. Shards of the earlier
    run that cannot be read are passed over.
    """
    by_id = bool(earlier.plan.selection.id and run.plan.selection.id) and earlier.plan.id_type == run.plan.id_type
    chunked = ["chunk"] if earlier.plan.chunked else []
    keys = ["id", "prompt_hash"] if by_id else ["prompt_hash"]
    with tempfile.TemporaryDirectory(prefix="llmemb-deleted-") as scratch:
        now, then = Partitions(Path(scratch) / "now"), Partitions(Path(scratch) / "then")
        for table in run.light_tables(keys):
            now.add(_row_digests(table, by_id))
        for number, table in enumerate(earlier.light_tables(keys, unreadable=[])):
            digests = _row_digests(table, by_id)
            then.add(digests, (np.int64(number) << np.int64(32)) | np.arange(len(digests), dtype=np.int64))
        gone = [numbers[~np.isin(partitions.sortable(there), partitions.sortable(here))] for (here, _), (there, numbers) in zip(now, then, strict=True)]
    places = np.sort(np.concatenate(gone))
    run.storage.delete([DELETED])
    if not len(places):
        return 0
    shards, rows = places >> 32, places & 0xFFFFFFFF
    columns = [*(["id"] if earlier.plan.selection.id else []), "source_file", "source_row", *chunked]
    tables = []
    for number, table in enumerate(earlier.light_tables(columns, unreadable=[])):
        first, last = np.searchsorted(shards, [number, number + 1])
        if first < last:
            tables.append(table.take(pa.array(rows[first:last])))
    deleted = pa.concat_tables(tables)
    if chunked:
        deleted = deleted.drop_columns(chunked).group_by(columns[: -len(chunked)], use_threads=False).aggregate([])
    run.storage.put(DELETED, parquet.to_bytes(deleted))
    return int(deleted.num_rows)


def _row_digests(table: pa.Table, by_id: bool) -> partitions.Digests:
    """V16 [N]: the digest of each row's id, of its prompt where it has none."""
    digests = partitions.binary_digests(table["prompt_hash"])
    if by_id:
        has_id = table["id"].is_valid().to_numpy()
        digests = digests.copy()
        digests[has_id] = partitions.id_digests(table["id"])
    return digests
