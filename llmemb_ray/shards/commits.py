"""Commits: the small records that make a unit done.

Invariant: a commit is written after its shard and rejects file are durable, at one key a unit; whichever
commit stands names files that are whole. Readers go through commits and see nothing else.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from llmemb_ray import parquet
from llmemb_ray.errors import NotFound, OutputError
from llmemb_ray.storage import Storage, is_temporary

DIRECTORY = "_llmemb/commits"
COMPACTED = "_llmemb/commits.parquet"
"""All commits of a finished run in one file."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One unit done. Counts are of rows unless said otherwise."""

    unit: str
    attempt: str
    file: int
    start: int
    rows: int
    """Rows of the unit in the source: embedded + rejected + filtered."""
    embedded: int
    rejected: int
    filtered: int = 0
    """Rows that the job's filter left out."""
    null_ids: int = 0
    vectors: int = 0
    """Rows of the shard: as many as embedded, or more where rows are cut into chunks."""
    copied: int = 0
    """Prompts whose vector was copied from an identical prompt of this run."""
    reused: int = 0
    """Prompts whose vector was copied from an earlier run."""
    clipped: int = 0
    """Values outside the calibration's ranges, written as the nearest code."""
    mean_cosine: float = 0.0
    """Mean cosine of all pairs of the shard's vectors; near 1 they have collapsed."""
    shard: str | None = None
    """Path below OUT; None where no row was embedded."""
    shard_bytes: int = 0
    shard_sha256: str = ""
    rejects: str | None = None
    rejects_bytes: int = 0
    rejects_sha256: str = ""
    reasons: dict[str, int] = field(default_factory=dict)
    """Rejects by reason."""
    tokens: int = 0
    """Tokens of all prompts, after truncation."""
    tokens_computed: int = 0
    """Tokens that went through the model, padding included."""
    tokens_padding: int = 0
    tokens_shared: int = 0
    """Tokens not computed because they stand in the shared prefix, or in vLLM's prefix cache."""
    tokens_shareable: int = 0
    """Tokens that stand in the shared prefix: what sharing to the token would not compute."""
    tokens_copied: int = 0
    """Tokens not computed because the vector was copied."""
    truncated: int = 0
    backend: str = ""
    token_budget: int = 0
    out_of_memory: int = 0
    """Times that the token budget was halved."""
    storage_retries: int = 0
    seconds_model: float = 0.0
    seconds_wait: float = 0.0
    """For the model, which was at work on another unit of the actor, and for copies to be looked up."""
    seconds_write: float = 0.0
    finished: float = 0.0
    """Unix time of the commit."""
    host: str = ""

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes, origin: str) -> Commit:
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise OutputError(f"{origin} is no commit record of this version: {error}") from error


def path(unit: str) -> str:
    return f"{DIRECTORY}/{unit}.json"


def committed_units(storage: Storage) -> set[str]:
    """Names of the units that are done: those with a commit of their own, by listing alone, and the compacted ones."""
    return _single_units(storage) | {commit.unit for commit in _compacted(storage)}


def _single_units(storage: Storage) -> set[str]:
    names = (entry.path.rsplit("/", 1)[1] for entry in storage.list(DIRECTORY) if not is_temporary(entry.path))
    return {name.removesuffix(".json") for name in names if name.endswith(".json")}


def read(storage: Storage, unit: str) -> Commit:
    return Commit.from_json(storage.read(path(unit)), storage.display(path(unit)))


def write(storage: Storage, commit: Commit) -> None:
    storage.put(path(commit.unit), commit.to_json())


def read_all(storage: Storage) -> list[Commit]:
    """The commit that stands for each unit, compacted or not, by unit."""
    commits = {commit.unit: commit for commit in _compacted(storage)}
    single = sorted(_single_units(storage) - set(commits))
    commits |= zip(single, storage.map(lambda unit: read(storage, unit), single), strict=True)
    return [commits[unit] for unit in sorted(commits)]


def compact(storage: Storage, commits: list[Commit]) -> None:
    """Writes all commits into one file, then removes the single ones. Stopped in between, nothing is lost."""
    records: list[dict[str, Any]] = [asdict(commit) | {"reasons": json.dumps(commit.reasons)} for commit in commits]
    storage.put(COMPACTED, parquet.to_bytes(pa.Table.from_pylist(records, schema=_SCHEMA)))
    storage.delete([entry.path for entry in storage.list(DIRECTORY)])


def _compacted(storage: Storage) -> list[Commit]:
    try:
        data = storage.read(COMPACTED)
    except NotFound:
        return []
    try:
        records = parquet.read(data).to_pylist()
        return [Commit(**(record | {"reasons": json.loads(record["reasons"])})) for record in records]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise OutputError(f"{storage.display(COMPACTED)} holds no commit records of this version: {error}") from error


def _arrow_type(annotation: str) -> pa.DataType:
    return {"int": pa.int64(), "float": pa.float64()}.get(annotation, pa.string())


_SCHEMA = pa.schema([(name, _arrow_type(str(f.type))) for name, f in Commit.__dataclass_fields__.items()])
