"""The receipt: the accounts of a finished run.

Invariant: rows read = rows embedded + rows rejected, for each unit and in total, or there is no receipt.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from llmemb_ray.errors import NotFound, OutputError, RejectsExceeded, RunFailed, UnhealthyVectors
from llmemb_ray.shards.commits import Commit
from llmemb_ray.shards.plan import Plan
from llmemb_ray.storage import Storage, redact

PATH = "_llmemb/receipt.json"

NOT_FINITE = "not_finite"
"""Reason of a reject whose vector holds NaN or infinity."""

COLLAPSED = 0.98
"""Mean cosine of pairs from which on a run's vectors are called collapsed: unlike texts should not be so alike."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    run_key: str
    space: str
    units: int
    rows_read: int
    rows_embedded: int
    rows_rejected: int
    rows_filtered: int
    """Left out by the job's filter; not counted as read."""
    rejects_by_reason: dict[str, int]
    null_ids: int
    vectors: int
    """Rows of the shards: rows_embedded, or more where texts are cut into chunks."""
    copied: int
    """Prompts whose vector was copied from an identical prompt of the run."""
    reused: int
    """Prompts whose vector was copied from an earlier run."""
    clipped_share: float
    """Share of the values that lay outside the calibration's ranges (int8)."""
    mean_cosine: float
    """Mean cosine of pairs of vectors, within units; near 1 the vectors have collapsed."""
    truncated: int
    dimension: int
    dtype: str
    tokens: int
    tokens_computed: int
    tokens_padding: int
    tokens_shared: int
    """Not computed, because they stood in the shared prefix (or in vLLM's prefix cache)."""
    tokens_shareable: int = 0
    """That stood in the shared prefix: what sharing to the token would not compute."""
    tokens_copied: int
    shard_bytes: int
    token_budgets: list[int]
    backends: dict[str, int] = field(default_factory=dict)
    """Units by the backend that made them; two where a change of backend was accepted."""
    out_of_memory: int
    storage_retries: int
    seconds_model: float
    """Summed over actors."""
    seconds_wall: float
    """Of the driver that finished the run, this time."""
    bad_files: dict[str, str] = field(default_factory=dict)
    """Left-out files, whose rows are unknown, and why."""
    versions: dict[str, str] = field(default_factory=dict)
    version_changes: list[str] = field(default_factory=list)
    generation: int = 0
    """How often files were appended or the backend was changed."""
    reuse: dict[str, Any] = field(default_factory=dict)
    """The run that vectors were copied from, and how many of its rows this one no longer has."""
    finished: float = 0.0

    @property
    def reject_rate(self) -> float:
        return self.rows_rejected / self.rows_read if self.rows_read else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, storage: Storage) -> None:
        storage.put(PATH, json.dumps(self.to_dict(), indent=1, sort_keys=True).encode())

    @classmethod
    def load(cls, storage: Storage) -> Receipt | None:
        try:
            return cls(**json.loads(storage.read(PATH)))
        except NotFound:
            return None
        except (ValueError, TypeError) as error:
            raise OutputError(f"{storage.display(PATH)} is no receipt of this version: {error}") from error

    def check_health(self, max_nan: int, where: str) -> None:
        """Raises UnhealthyVectors if more rows than allowed have a vector that is not finite."""
        count = self.rejects_by_reason.get(NOT_FINITE, 0)
        if count > max_nan:
            raise UnhealthyVectors(
                f"{count} rows have a vector that is not finite (allowed {max_nan}); they stand in {where}/rejects with reason {NOT_FINITE}. "
                "Such a model often needs another compute_dtype (bfloat16 or float32, not float16), and vectors a dtype other than float16; "
                "or repeat the command with a larger max_nan (nothing is embedded again)"
            )

    def check_rejects(self, largest_rate: float, floor: int, where: str) -> None:
        """Raises RejectsExceeded if more rows were rejected than allowed; ``floor`` rows are always allowed."""
        if self.rows_rejected > floor and self.reject_rate > largest_rate:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.rejects_by_reason.items(), key=lambda item: -item[1]))
            raise RejectsExceeded(
                f"{self.rows_rejected} of {self.rows_read} rows were rejected ({self.reject_rate:.2%}, allowed {largest_rate:.2%}): {reasons}. "
                f"They stand with their reasons in {where}/rejects; mend them, or repeat the command with a larger max_reject_rate (nothing is embedded again)"
            )


def reconcile(plan: Plan, commits: list[Commit]) -> None:
    """Raises RunFailed unless the commits account for every row of every unit of the plan, once."""
    units = {unit.name: unit for unit in plan.units()}
    counts = Counter(commit.unit for commit in commits)
    problems = [f"unit {name} has no commit" for name in units if name not in counts]
    problems += [f"unit {name} has {count} commits" for name, count in counts.items() if count > 1]
    for commit in commits:
        unit = units.get(commit.unit)
        if unit is None:
            problems.append(f"commit {commit.unit} belongs to no unit of the plan")
        elif commit.rows != unit.rows or commit.embedded + commit.rejected + commit.filtered != unit.rows:
            problems.append(f"unit {commit.unit} has {unit.rows} rows, its commit accounts for {commit.embedded} + {commit.rejected} + {commit.filtered}")
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise RunFailed(
            "the accounts do not balance: " + "; ".join(problems[:10]) + more + ". Run the embed command again, it does the units without a commit; "
            "where a commit is wrong, delete it first, or begin anew with overwrite"
        )


def make_receipt(
    plan: Plan, commits: list[Commit], *, seconds_wall: float, versions: dict[str, str], finished: float, reuse: dict[str, Any] | None = None
) -> Receipt:
    """Sums the commits up. Raises RunFailed if they do not balance."""
    reconcile(plan, commits)
    reasons: Counter[str] = Counter()
    for commit in commits:
        reasons.update(commit.reasons)
    embedded, rejected = sum(c.embedded for c in commits), sum(c.rejected for c in commits)
    vectors = sum(c.vectors for c in commits)
    return Receipt(
        run_key=plan.run_key,
        space=plan.space_digest,
        units=len(commits),
        rows_read=embedded + rejected,
        rows_embedded=embedded,
        rows_rejected=rejected,
        rows_filtered=sum(c.filtered for c in commits),
        rejects_by_reason=dict(reasons),
        null_ids=sum(c.null_ids for c in commits),
        vectors=vectors,
        copied=sum(c.copied for c in commits),
        reused=sum(c.reused for c in commits),
        clipped_share=round(sum(c.clipped for c in commits) / max(1, vectors * plan.dimension), 9),
        mean_cosine=round(sum(c.mean_cosine * c.vectors for c in commits) / max(1, vectors), 6),
        truncated=sum(c.truncated for c in commits),
        dimension=plan.dimension,
        dtype=plan.dtype,
        tokens=sum(c.tokens for c in commits),
        tokens_computed=sum(c.tokens_computed for c in commits),
        tokens_padding=sum(c.tokens_padding for c in commits),
        tokens_shared=sum(c.tokens_shared for c in commits),
        tokens_shareable=sum(c.tokens_shareable for c in commits),
        tokens_copied=sum(c.tokens_copied for c in commits),
        shard_bytes=sum(c.shard_bytes for c in commits),
        backends=dict(Counter(c.backend for c in commits if c.backend)),
        token_budgets=sorted({c.token_budget for c in commits if c.token_budget}),
        out_of_memory=sum(c.out_of_memory for c in commits),
        storage_retries=sum(c.storage_retries for c in commits),
        seconds_model=round(sum(c.seconds_model for c in commits), 3),
        seconds_wall=round(seconds_wall, 3),
        bad_files={redact(file.url): str(file.problem) for file in plan.bad_files},
        versions=versions,
        version_changes=[f"{name}: {plan.versions.get(name)} → {now}" for name, now in versions.items() if plan.versions.get(name) != now],
        generation=plan.generation,
        reuse=reuse or {},
        finished=finished,
    )
