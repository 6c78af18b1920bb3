"""Commits: the small records that make a unit done.

Invariant: a commit is written after its shard and rejects file are durable, at one key a unit; whichever
commit stands names files that are whole. Readers go through commits and see nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmemb_ray.shards.records import COMPACTED, DIRECTORY, Records, path

__all__ = ["COMPACTED", "DIRECTORY", "Commit", "committed_units", "compact", "path", "read", "read_all", "write"]


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


_RECORDS = Records(Commit)

committed_units = _RECORDS.committed_units
read = _RECORDS.read
write = _RECORDS.write
read_all = _RECORDS.read_all
compact = _RECORDS.compact
