"""Commits of a synthesis: what makes a unit of requests done.

Invariant: as in ``shards.records``; asked = accepted + rejected + duplicates, in each unit and in total.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmemb_ray.shards.records import Records


@dataclass(frozen=True, kw_only=True)
class Made:
    """One unit done. Counts are of requests unless said otherwise."""

    unit: str
    attempt: str
    start: int
    rows: int
    accepted: int
    rejected: int
    duplicates: int = 0
    """Examples that another one of the run is equal or, where asked for, nearly equal to; found when all units were done."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Rejects and duplicates by reason."""
    notes: dict[str, int] = field(default_factory=dict)
    """Accepted examples by the length rule they break."""
    families: dict[str, int] = field(default_factory=dict)
    """Accepted."""
    languages: dict[str, int] = field(default_factory=dict)
    """Accepted."""
    shard: str | None = None
    """Path below OUT; None where nothing was accepted."""
    shard_bytes: int = 0
    shard_sha256: str = ""
    rejects: str | None = None
    rejects_bytes: int = 0
    rejects_sha256: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0
    """Requests that failed before the one that was answered."""
    seconds: float = 0.0
    """From the first of its requests to the commit."""
    finished: float = 0.0
    """Unix time of the commit."""
    host: str = ""


RECORDS = Records(Made)
