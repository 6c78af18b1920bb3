"""Everything that a report says of a run, as plain data: collected here, drawn elsewhere.

Invariant: sums come from commits and receipt, never from the sample; what comes from the sample stands in
``health``, ``lengths`` and ``points``. Memory holds the commits and the sample, never the run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from llmemb_ray.corpus.columns import id_values
from llmemb_ray.reporting import accounts, health, projection, rejects, texts
from llmemb_ray.reporting import sample as sampling
from llmemb_ray.reporting.accounts import Compared, Host, Slow, Throughput
from llmemb_ray.reporting.health import Health
from llmemb_ray.reporting.rejects import Reason
from llmemb_ray.reporting.sample import Sample
from llmemb_ray.reporting.texts import Excerpts, Span
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import redact

LENGTH_BINS = 60
"""Bars of the histogram of prompt lengths at most."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Prompts by their tokens: counts [B] of lengths in ``[edges[b], edges[b + 1])``."""

    edges: list[int]
    counts: list[int]
    counted: int
    """Prompts counted: all rows of the row groups that the sample was taken from."""
    median: int
    percentile_99: int
    longest: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """One sampled vector on the map."""

    x: float
    y: float
    id: str | None
    url: str
    source_row: int
    chunk: int | None
    n_tokens: int
    text: str | None


@dataclass(frozen=True, kw_only=True)
class Facts:
    run: str
    state: str
    """finished, running or stopped, as ``status`` says."""
    units: int
    units_committed: int
    model: str
    adapter: str | None
    role: str
    run_key: str
    space: str
    generation: int
    created: float
    accounts: dict[str, Any]
    """The receipt's fields, or the sums so far."""
    estimate: list[Compared]
    throughput: Throughput | None
    hosts: list[Host]
    slowest: list[Slow]
    rejects: list[Reason]
    lengths: Lengths | None
    health: Health
    map_method: str
    points: list[Point]
    texts_missing: list[str]
    """Why source texts could not be read back."""
    with_text: bool
    calibration: dict[str, Any] | None
    files: int
    representation: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``: all but the points of the map."""
        return {name: value for name, value in asdict(self).items() if name != "points"}


def collect(run: Run, *, sample_size: int, with_text: bool) -> Facts:
    """Raises OutputError where files of the run cannot be read; source files that cannot only leave their texts out."""
    plan = run.plan
    status = run.status()
    sums = accounts.sums(run)
    sample = sampling.draw(run, sample_size)
    reasons = rejects.by_reason(run)
    spans = _spans(sample)
    found = Excerpts()
    if with_text:
        found = texts.excerpts(run, [*spans, *(((e.source_file, e.source_row), 0, None) for reason in reasons for e in reason.examples)])
    sampled_rows = {span[0] for span in spans}
    method, points = _points(run, sample, spans, found)
    calibration = run.precision.calibration if len(sample) else None
    return Facts(
        run=run.url,
        state=status["state"],
        units=status["units"],
        units_committed=len(run.commits),
        model=plan.model_name,
        adapter=plan.adapter_name,
        role=plan.role,
        run_key=plan.run_key,
        space=plan.space_digest,
        generation=plan.generation,
        created=plan.created,
        accounts=sums,
        estimate=accounts.estimate(run, sums),
        throughput=accounts.throughput(run.commits),
        hosts=accounts.hosts(run.commits),
        slowest=accounts.slowest(run),
        rejects=rejects.with_texts(reasons, found),
        lengths=_lengths(sample),
        health=health.measure(sample, plan, sums),
        map_method=method,
        points=points,
        # A reject has often no text to be read; a row that was embedded had one.
        texts_missing=list(texts.reasons({key: reason for key, reason in found.missing.items() if key in sampled_rows})),
        with_text=with_text,
        calibration={"rows": calibration.rows, "digest": calibration.digest, "space": calibration.space} if calibration else None,
        files=len(plan.files),
        representation=plan.representation.to_dict(),
        settings=plan.settings,
        versions=sums["versions"],
    )


def _spans(sample: Sample) -> list[Span]:
    rows = sample.rows
    keys = zip(rows["source_file"].to_pylist(), rows["source_row"].to_pylist(), strict=True)
    if "chunk_start" not in rows.column_names:
        return [(key, 0, None) for key in keys]
    return list(zip(keys, rows["chunk_start"].to_pylist(), rows["chunk_end"].to_pylist(), strict=True))


def _points(run: Run, sample: Sample, spans: list[Span], found: Excerpts) -> tuple[str, list[Point]]:
    usable = np.flatnonzero(np.isfinite(sample.vectors_ND).all(axis=1) & sample.vectors_ND.any(axis=1))
    method, places_N2 = projection.project(sample.vectors_ND[usable])
    names = sample.rows.column_names
    ids = id_values(sample.rows["id"]) if "id" in names else None
    chunks = sample.rows["chunk"].to_pylist() if "chunk" in names else None
    lengths = sample.rows["n_tokens"].to_pylist()
    points = []
    for place, row in zip(places_N2.tolist(), usable.tolist(), strict=False):
        (file, source_row), _, _ = spans[row]
        points.append(
            Point(
                x=round(place[0], 3),
                y=round(place[1], 3),
                id=None if ids is None or ids[row] is None else str(ids[row]),
                url=redact(run.plan.files[file].url),
                source_row=source_row,
                chunk=chunks[row] if chunks else None,
                n_tokens=lengths[row],
                text=found.texts.get(spans[row]),
            )
        )
    return method, points


def _lengths(sample: Sample) -> Lengths | None:
    counts_T = sample.lengths_T
    counted = int(counts_T.sum())
    if not counted:
        return None
    present = np.flatnonzero(counts_T)
    first, last = int(present[0]), int(present[-1])
    width = -(-(last - first + 1) // LENGTH_BINS)
    edges = list(range(first, last + width + 1, width))
    running = np.cumsum(counts_T)
    return Lengths(
        edges=edges,
        counts=[int(counts_T[low:high].sum()) for low, high in pairwise(edges)],
        counted=counted,
        median=int(np.searchsorted(running, counted * 0.5)),
        percentile_99=int(np.searchsorted(running, counted * 0.99)),
        longest=last,
    )
