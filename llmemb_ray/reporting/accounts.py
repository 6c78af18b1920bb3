"""A run's sums, rates and estimate, from its commits and receipt alone.

Invariant: these figures are exact; nothing here comes from a sample. Reads no shard.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmemb_ray.errors import NotFound, OutputError
from llmemb_ray.shards.commits import Commit
from llmemb_ray.shards.run import OWN, Run
from llmemb_ray.storage import redact

ESTIMATE = f"{OWN}/plan/estimate.json"

BINS = 60
"""Points of time that a throughput is shown at."""

IDLE_SECONDS = 300.0
"""A pause of all actors that is cut out of the time shown: stopped, or waiting to be continued."""

HOSTS_DRAWN = 8
"""Hosts up to which each has a line of its own."""

ROWS_SHOWN = 10
"""Rows of the tables of slowest units and hosts."""

_SUMMED = (
    *("null_ids", "vectors", "copied", "reused", "truncated"),
    *("tokens", "tokens_computed", "tokens_padding", "tokens_shared", "tokens_shareable", "tokens_copied"),
    *("shard_bytes", "out_of_memory", "storage_retries"),
)
"""Fields that commits and receipts call the same."""


def sums(run: Run) -> dict[str, Any]:
    """The receipt's fields; of an unfinished run as they follow from the commits it has, None where they do not."""
    if run.receipt is not None:
        return run.receipt.to_dict()
    commits = run.commits
    reasons: Counter[str] = Counter()
    for commit in commits:
        reasons.update(commit.reasons)
    found: dict[str, Any] = {name: sum(getattr(commit, name) for commit in commits) for name in _SUMMED}
    embedded, rejected = sum(commit.embedded for commit in commits), sum(commit.rejected for commit in commits)
    vectors = max(1, found["vectors"])
    return found | {
        "units": len(commits),
        "rows_read": embedded + rejected,
        "rows_embedded": embedded,
        "rows_rejected": rejected,
        "rows_filtered": sum(commit.filtered for commit in commits),
        "rejects_by_reason": dict(reasons),
        "clipped_share": sum(commit.clipped for commit in commits) / (vectors * run.plan.dimension),
        "mean_cosine": sum(commit.mean_cosine * commit.vectors for commit in commits) / vectors,
        "dimension": run.plan.dimension,
        "dtype": run.plan.dtype,
        "token_budgets": sorted({commit.token_budget for commit in commits if commit.token_budget}),
        "backends": dict(Counter(commit.backend for commit in commits if commit.backend)),
        "seconds_model": sum(commit.seconds_model for commit in commits),
        "bad_files": {redact(file.url): str(file.problem) for file in run.plan.bad_files},
        "generation": run.plan.generation,
        "run_key": run.plan.run_key,
        "space": run.plan.space_digest,
        "versions": run.plan.versions,
        "version_changes": [],
        "reuse": {},
        "seconds_wall": None,
        "finished": None,
    }


# -- the estimate ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A figure of the plan's estimate beside the same of the run; ratio: actual over estimate, None where that is 0."""

    name: str
    estimate: float
    actual: float
    ratio: float | None


def estimate(run: Run, actual: dict[str, Any]) -> list[Compared]:
    """The numbers that both have; [] where no estimate was kept. Raises OutputError for an estimate that cannot be read."""
    try:
        said = json.loads(run.storage.read(ESTIMATE))
    except NotFound:
        return []
    except ValueError as error:
        raise OutputError(f"{run.storage.display(ESTIMATE)} is not JSON: {error}; delete it, the report is then without an estimate") from error
    if not isinstance(said, dict):
        raise OutputError(f"{run.storage.display(ESTIMATE)} holds no estimate; delete it, the report is then without one")
    names = [name for name in actual if _is_number(actual[name]) and _is_number(said.get(name))]
    return [Compared(name=name, estimate=said[name], actual=actual[name], ratio=actual[name] / said[name] if said[name] else None) for name in names]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- rates -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Rates in B bins of equal length, over the time in which some actor was at work."""

    bin_seconds: float
    seconds: list[float]
    """[B]: the middle of each bin, since the first unit began; pauses left out."""
    clock: list[float]
    """[B]: the same as Unix time."""
    tokens_per_s: dict[str, list[float]]
    """By host, or under "" for all hosts where they are many."""
    rows_per_s: list[float]
    pauses: list[float]
    """Where, on the axis of ``seconds``, a pause was left out."""
    paused_seconds: float


@dataclass(frozen=True, kw_only=True)
class Host:
    host: str
    units: int
    rows: int
    seconds_model: float
    tokens_per_s: float
    """Of its actors' model seconds, so of one actor."""


@dataclass(frozen=True, kw_only=True)
class Slow:
    unit: str
    url: str
    start: int
    rows: int
    seconds_model: float
    tokens_per_s: float
    of_median: float
    """Its tokens per second over those of the median unit."""
    host: str


def made_tokens(commit: Commit) -> int:
    """Tokens of the prompts that the model embedded: padding and copied prompts do not count, shared prefixes do."""
    return commit.tokens - commit.tokens_copied


@dataclass(frozen=True, kw_only=True)
class Worked:
    """A unit done, as its rates need it. finished: Unix time; seconds: that it took; tokens and rows: that it did."""

    host: str
    finished: float
    seconds: float
    tokens: int
    rows: int


def throughput(commits: list[Commit]) -> Throughput | None:
    """The rates of a run, of the tokens and rows that the model embedded; None where no unit is done."""
    return rates([Worked(host=c.host, finished=c.finished, seconds=c.seconds_model + c.seconds_write, tokens=made_tokens(c), rows=c.embedded) for c in commits])


def rates(units: list[Worked]) -> Throughput | None:
    """Each unit's work spread evenly over the time it took; None where no unit is done."""
    if not units:
        return None
    ends_C = np.array([unit.finished for unit in units])
    starts_C = ends_C - np.maximum([unit.seconds for unit in units], 1e-3)
    gaps = _pauses(starts_C, ends_C)
    before = np.cumsum([0.0, *(end - start for start, end in gaps)])
    gap_ends = np.array([end for _, end in gaps])
    origin = float(starts_C.min())

    def worked(times: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Seconds since the beginning, pauses left out."""
        shifted: npt.NDArray[np.float64] = times - origin - before[np.searchsorted(gap_ends, times, side="right")]
        return shifted

    begun_C, done_C = worked(starts_C), worked(ends_C)
    edges = np.linspace(0.0, float(done_C.max()), BINS + 1)
    width = float(edges[1] - edges[0])

    def rate(amounts: list[int], which: npt.NDArray[np.bool_]) -> list[float]:
        chosen, spent = np.flatnonzero(which), done_C - begun_C
        amounts_C = np.array(amounts, np.float64)
        total = np.array([float((amounts_C[chosen] * np.clip((edge - begun_C[chosen]) / spent[chosen], 0, 1)).sum()) for edge in edges])
        return [round(value, 3) for value in (np.diff(total) / width).tolist()]

    hosts_C = np.array([unit.host for unit in units])
    hosts = np.unique(hosts_C).tolist()
    everywhere = np.ones(len(units), np.bool_)
    tokens = [unit.tokens for unit in units]
    by_host = {host: hosts_C == host for host in hosts} if len(hosts) <= HOSTS_DRAWN else {"": everywhere}
    middles = (edges[:-1] + edges[1:]) / 2
    gap_places = worked(np.array([start for start, _ in gaps])) if gaps else np.zeros(0)
    return Throughput(
        bin_seconds=width,
        seconds=middles.tolist(),
        clock=(origin + middles + before[np.searchsorted(gap_places, middles, side="right")]).tolist(),
        tokens_per_s={host: rate(tokens, which) for host, which in by_host.items()},
        rows_per_s=rate([unit.rows for unit in units], everywhere),
        pauses=gap_places.tolist(),
        paused_seconds=float(before[-1]),
    )


def _pauses(starts_C: npt.NDArray[np.float64], ends_C: npt.NDArray[np.float64]) -> list[tuple[float, float]]:
    """(start, end) of the times longer than IDLE_SECONDS in which no unit was worked on."""
    order = np.argsort(starts_C, kind="stable")
    latest = np.maximum.accumulate(ends_C[order])[:-1]
    following = starts_C[order][1:]
    return [(float(latest[i]), float(following[i])) for i in np.flatnonzero(following - latest > IDLE_SECONDS)]


def hosts(commits: list[Commit]) -> list[Host]:
    """The slowest first."""
    of: dict[str, list[Commit]] = defaultdict(list)
    for commit in commits:
        of[commit.host].append(commit)
    found = []
    for host, own in of.items():
        seconds = sum(commit.seconds_model for commit in own)
        rate = sum(made_tokens(commit) for commit in own) / max(seconds, 1e-9)
        found.append(Host(host=host, units=len(own), rows=sum(commit.rows for commit in own), seconds_model=seconds, tokens_per_s=rate))
    return sorted(found, key=lambda host: host.tokens_per_s)


def slowest(run: Run) -> list[Slow]:
    """The units that took longest, the longest first; units whose vectors were all copied are none of them."""
    made = [commit for commit in run.commits if commit.seconds_model > 0 and made_tokens(commit) > 0]
    if not made:
        return []
    median = float(np.median([made_tokens(commit) / commit.seconds_model for commit in made]))
    longest = sorted(made, key=lambda commit: (-commit.seconds_model, commit.unit))[:ROWS_SHOWN]
    return [
        Slow(
            unit=commit.unit,
            url=redact(run.plan.files[commit.file].url),
            start=commit.start,
            rows=commit.rows,
            seconds_model=commit.seconds_model,
            tokens_per_s=made_tokens(commit) / commit.seconds_model,
            of_median=made_tokens(commit) / commit.seconds_model / median,
            host=commit.host,
        )
        for commit in longest
    ]
