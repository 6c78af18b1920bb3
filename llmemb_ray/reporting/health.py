"""The health of vectors, judged by a sample: norms, collapse, dead dimensions, values that are not finite.

Invariant: each finding names what was measured, says whether it is well, and if not what to do. Thresholds stand
here with their reasons. Knows no files and no page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmemb_ray.reporting.sample import Sample
from llmemb_ray.shards.plan import Plan
from llmemb_ray.shards.receipt import COLLAPSED
from llmemb_ray.shards.verify import NORM_TOLERANCE

Floats = npt.NDArray[np.float32]

LEAST = 30
"""Vectors from which on a sample says something of dimensions: of fewer, even sound bits are all alike by chance."""

DEAD_SHARE = 1e-3
"""A dimension is dead if its standard deviation is at most this share of the median dimension's: it tells no two texts apart."""

NORM_RATIO = 10.0
"""Longest over median norm, of vectors that are not normalised, from which on inner products mostly rank by length."""

SAME_SHARE = 0.01
"""Share of sampled vectors equal to that of another prompt, from which on texts are not told apart."""

FEW_DIRECTIONS = 3.0
"""Effective dimensions below which a handful of directions holds nearly all of the variance."""

CLIPPED_SHARE = 0.01
"""Share of values outside the calibration's ranges from which on the ranges do not fit; a sound sample leaves out about 2 in its number of rows."""

PAIRED = 400
"""Vectors whose pairs are drawn as a histogram of cosines: 79,800 pairs."""

BINS = 40


@dataclass(frozen=True, kw_only=True)
class Finding:
    name: str
    value: str
    well: bool | None
    """None where there are too few vectors to say."""
    says: str


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """counts [B] between edges [B + 1]."""

    edges: list[float]
    counts: list[int]

    @classmethod
    def of(cls, values: npt.NDArray[Any], bins: int = BINS) -> Histogram:
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        if high - low < 1e-5:  # Rounding alone: drawn as one bar, not as a landscape.
            low, high = low - 0.005, high + 0.005
        counts, edges = np.histogram(values, bins=bins, range=(low, high))
        return cls(edges=edges.tolist(), counts=counts.tolist())


@dataclass(frozen=True, kw_only=True)
class Health:
    """Figures are of the ``sampled`` vectors, but those of whole runs, which say so."""

    sampled: int
    of: int
    not_finite: int
    zero: int
    norm_least: float
    norm_median: float
    norm_largest: float
    mean_cosine: float
    """Of all pairs of different sampled vectors."""
    dead_dimensions: list[int]
    effective_dimensions: float
    """Participation ratio of the covariance: (sum of its eigenvalues)² / sum of their squares."""
    same_prompt: int
    """Vectors equal to the last bit to an earlier one of the same prompt."""
    same_vector: int
    """Vectors equal to the last bit to an earlier one of another prompt."""
    clipped_share: float | None
    """Of all values of the run; None where vectors are not calibrated."""
    findings: list[Finding]
    norms: Histogram
    cosines: Histogram
    deviations: list[float]
    """Standard deviation of each dimension, the largest first."""

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.well is False]


def measure(sample: Sample, plan: Plan, accounts: dict[str, Any]) -> Health:
    """accounts: the run's sums, named as in the receipt."""
    finite_N = np.isfinite(sample.vectors_ND).all(axis=1)
    norms_N = np.linalg.norm(np.where(np.expand_dims(finite_N, 1), sample.vectors_ND, 0), axis=1)
    good_N = finite_N & (norms_N > 0)
    units_ND: Floats = sample.vectors_ND[good_N] / np.expand_dims(norms_N[good_N], 1)
    norms = norms_N[good_N]
    deviations_D = sample.stored_NV[finite_N].std(axis=0, dtype=np.float64) if finite_N.any() else np.zeros(plan.dimension)
    same_prompt, same_vector = _same(sample)
    found = {
        "not_finite": int((~finite_N).sum()),
        "zero": int((finite_N & (norms_N == 0)).sum()),
        "norm_least": float(norms.min()) if len(norms) else 0.0,
        "norm_median": float(np.median(norms)) if len(norms) else 0.0,
        "norm_largest": float(norms.max()) if len(norms) else 0.0,
        "mean_cosine": mean_cosine(units_ND),
        "dead_dimensions": dead(deviations_D).tolist() if len(sample) > 1 else [],
        "effective_dimensions": effective_dimensions(units_ND),
        "same_prompt": same_prompt,
        "same_vector": same_vector,
        "clipped_share": accounts["clipped_share"] if plan.dtype == "int8" else None,
    }
    return Health(
        sampled=len(sample),
        of=sample.of,
        findings=_findings(found, sample, plan, accounts) if len(sample) else [],
        norms=Histogram.of(norms),
        cosines=Histogram.of(pair_cosines(units_ND)),
        deviations=np.sort(deviations_D)[::-1].tolist(),
        **found,
    )


def mean_cosine(units_ND: Floats) -> float:
    """Mean of ``u·v`` over all pairs of different rows of norm 1, from their sum; 0 for fewer than two."""
    count = len(units_ND)
    if count < 2:
        return 0.0
    total_D = units_ND.sum(axis=0, dtype=np.float64)
    squares = float(np.square(units_ND, dtype=np.float64).sum())
    return (float(total_D @ total_D) - squares) / (count * (count - 1))


def pair_cosines(units_ND: Floats) -> Floats:
    """``u·v`` of the pairs of at most PAIRED rows, evenly spaced."""
    some = units_ND[np.linspace(0, len(units_ND) - 1, min(len(units_ND), PAIRED)).astype(np.int64)]
    cosines: Floats = (some @ some.T)[np.triu_indices(len(some), 1)]
    return cosines


def dead(deviations_D: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The dimensions that hardly vary; all where none does."""
    varying = deviations_D[deviations_D > 0]
    limit = DEAD_SHARE * float(np.median(varying)) if len(varying) else 0.0
    return np.flatnonzero(deviations_D <= limit)


def effective_dimensions(units_ND: Floats) -> float:
    """Participation ratio of the rows' covariance; 0 where they do not vary."""
    if len(units_ND) < 2:
        return 0.0
    centred_ND = units_ND - units_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
    # The covariance and the matrix of inner products have the same eigenvalues but for zeros: take the smaller.
    product = centred_ND @ centred_ND.T if len(centred_ND) < centred_ND.shape[1] else centred_ND.T @ centred_ND
    trace, squares = float(np.trace(product, dtype=np.float64)), float(np.square(product, dtype=np.float64).sum())
    return trace**2 / squares if trace > len(units_ND) * 1e-12 else 0.0


def _same(sample: Sample) -> tuple[int, int]:
    """(vectors equal to an earlier one of the same prompt, equal to one of another prompt)."""
    prompts = sample.rows["prompt_hash"].to_pylist() if "prompt_hash" in sample.rows.column_names else [b""] * len(sample)
    vectors: set[bytes] = set()
    pairs: set[tuple[bytes, bytes]] = set()
    for stored_V, prompt in zip(sample.stored_NV, prompts, strict=True):
        vectors.add(stored_V.tobytes())
        pairs.add((stored_V.tobytes(), prompt))
    return len(sample) - len(pairs), len(pairs) - len(vectors)


def _findings(found: dict[str, Any], sample: Sample, plan: Plan, accounts: dict[str, Any]) -> list[Finding]:
    count = len(sample)
    enough = count >= LEAST
    rejected = accounts["rejects_by_reason"].get("not_finite", 0)
    other_dtype = "try another compute_dtype (bfloat16 or float32, not float16), and vectors a dtype other than float16"
    zeros = accounts["rejects_by_reason"].get("zero_vector", 0)
    findings = [
        Finding(
            name="Not finite",
            value=f"{rejected:,} rows rejected; {found['not_finite']:,} of {count:,} sampled",
            well=not (rejected or found["not_finite"]),
            says=f"The model gave NaN or infinity: {other_dtype}."
            if rejected and not found["not_finite"]
            else "Vectors in the shards hold NaN or infinity, which embed never writes: run verify."
            if found["not_finite"]
            else "No vector holds NaN or infinity; such rows would stand in the rejects.",
        ),
        Finding(
            name="Zero vectors",
            value=f"{zeros:,} rows rejected; {found['zero']:,} of {count:,} sampled",
            well=not (zeros or found["zero"]),
            says="A zero vector has no direction: look at these texts and the pooling." if zeros or found["zero"] else "Every vector has a direction.",
        ),
        _norms(found, plan),
        Finding(
            name="Mean cosine of pairs",
            value=f"{found['mean_cosine']:.4f} in the sample; {accounts['mean_cosine']:.4f} within units, all vectors",
            well=None if count < 2 else found["mean_cosine"] < COLLAPSED,
            says=f"Collapsed (from {COLLAPSED} on): unlike texts have nearly the same vector. Check the prompt, pooling and layer, "
            "and that the model's weights were loaded."
            if found["mean_cosine"] >= COLLAPSED
            else f"Not collapsed (that begins at {COLLAPSED}); a decoder's vectors share a direction, so a value well above 0 is usual, and only ranks count.",
        ),
        Finding(
            name="Vectors of different prompts that are equal",
            value=f"{found['same_vector']:,} of {count:,} sampled ({found['same_vector'] / count:.1%})",
            well=found["same_vector"] <= SAME_SHARE * count,
            says="Different prompts give the same vector to the last bit: they are not told apart. Check the prompt and pooling"
            + (", or write a finer dtype than bits." if plan.dtype == "ubinary" else ".")
            if found["same_vector"] > SAME_SHARE * count
            else f"Different prompts have different vectors (warned of above {SAME_SHARE:.0%}).",
        ),
        Finding(
            name="Vectors of the same prompt",
            value=f"{found['same_prompt']:,} of {count:,} sampled ({found['same_prompt'] / count:.1%})",
            well=True,
            says="Texts that come again have the same vector, as they should"
            + ("; --dedup exact would embed each once." if found["same_prompt"] and not (accounts["copied"] or accounts["reused"]) else "."),
        ),
        Finding(
            name="Dead dimensions",
            value=f"{len(found['dead_dimensions']):,} of {plan.dimension:,}",
            well=None if not enough else not found["dead_dimensions"],
            says=f"Dimensions {_some(found['dead_dimensions'])} are the same in every sampled vector: they cost space and tell nothing apart. "
            "Check the weights and the layer."
            if found["dead_dimensions"]
            else f"Every dimension varies (dead is one whose deviation is at most {DEAD_SHARE:g} of the median's).",
        ),
        Finding(
            name="Effective dimensions",
            value=f"{found['effective_dimensions']:.1f} of {plan.dimension:,}",
            well=None if not enough else found["effective_dimensions"] >= FEW_DIRECTIONS,
            says=f"Fewer than {FEW_DIRECTIONS:.0f}: a few directions hold nearly all of the variance. Check the layer and the prompt."
            if found["effective_dimensions"] < FEW_DIRECTIONS
            else "How many directions share the variance (participation ratio of the covariance); it cannot exceed the number of vectors sampled.",
        ),
    ]
    if found["clipped_share"] is not None:
        findings.append(
            Finding(
                name="Values clipped",
                value=f"{found['clipped_share']:.3%} of all values",
                well=found["clipped_share"] <= CLIPPED_SHARE,
                says=f"More than {CLIPPED_SHARE:.0%} lie outside the ranges of the calibration: it does not fit this corpus. Calibrate anew, or write float16."
                if found["clipped_share"] > CLIPPED_SHARE
                else "Values outside the calibration's ranges became the nearest code; so few do no harm.",
            )
        )
    if not enough:
        too_few = f"{count:,} vectors are too few to say (from {LEAST} on)."
        findings = [finding if finding.well is not None else Finding(name=finding.name, value=finding.value, well=None, says=too_few) for finding in findings]
    return findings


def _norms(found: dict[str, Any], plan: Plan) -> Finding:
    least, median, largest = found["norm_least"], found["norm_median"], found["norm_largest"]
    value = f"{least:.4g} to {largest:.4g}, median {median:.4g}"
    if plan.dtype in NORM_TOLERANCE and plan.representation.normalize:
        tolerance = NORM_TOLERANCE[plan.dtype]
        well = bool(median) and abs(least - 1) <= tolerance and abs(largest - 1) <= tolerance
        says = f"All are 1 within {tolerance:g}, as a normalised run writes them." if well else f"Not all are 1 within {tolerance:g}: run verify."
    elif plan.representation.normalize:
        well, says = True, f"Read back from {plan.dtype} codes, vectors are given norm 1 again; this says nothing of the codes."
    else:
        well = largest <= NORM_RATIO * median
        says = (
            "The run is not normalised; lengths are of one order, inner products and cosines rank much alike."
            if well
            else f"The longest vector has over {NORM_RATIO:.0f} times the median norm: inner products rank by length. Search by cosine, or normalise."
        )
    return Finding(name="Norms", value=value, well=well, says=says)


def _some(numbers: list[int], shown: int = 10) -> str:
    more = f" and {len(numbers) - shown:,} more" if len(numbers) > shown else ""
    return ", ".join(str(number) for number in numbers[:shown]) + more
