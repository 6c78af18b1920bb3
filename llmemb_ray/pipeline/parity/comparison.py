"""How far vectors are from a reference, and whether that is too far. Knows matrices and bounds; no engine, no text.

Invariant: everything is measured on vectors divided by their L2 norm, in float64, on rows that both sides have. A row that
the reference has and the other side lacks is never within bounds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llmemb_ray.pipeline.parity.passes import Pass

FLOAT32_CPU = 1e-5
"""Largest difference of a coordinate that is promised for float32 on the CPU (docs/guarantees.md)."""

COSINE = 1e-3
"""1 − cosine that is promised for 16-bit floats; on a GPU, whose float32 depends on the attention kernel; and for quantised weights,
whose kernels round to 16 bits (bitsandbytes' NF4 with float32 on the CPU: rows in other batches differed by up to 1e-3 a coordinate)."""

NOISES = 3.0
"""… or so many times what the model itself loses from float32 to its compute dtype, where that is more."""

NEIGHBOURS = 10

TIE = 1e-6
"""Rows whose cosines differ by less are as near as each other: duplicates have no order among them."""

EXEMPT = {"llm.int8": "LLM.int8 chooses outlier columns a batch at a time: other rows, other rounding"}
"""Weight formats whose vectors depend on what goes with them, and why."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The most that a measure may be.

    measure: ``difference`` is the largest absolute difference of a coordinate, ``cosine`` the largest 1 − cosine of a row
    """

    measure: Literal["difference", "cosine"]
    value: float
    why: str

    def __str__(self) -> str:
        return f"{'1 − cosine' if self.measure == 'cosine' else 'difference'} ≤ {self.value:.2g}"

    @property
    def named(self) -> str:
        return "1 − cosine" if self.measure == "cosine" else "the largest difference"


def bound_of(compute_dtype: str, weights: str | None, device: str, noise: float | None) -> Bound | None:
    """The bound promised; None for a weight format that is exempt.

    weights: format in which they are quantised; noise: largest 1 − cosine of a row, from the dtype alone, where measured
    """
    if weights in EXEMPT:
        return None
    if compute_dtype == "float32" and device == "cpu" and weights is None:
        return Bound(measure="difference", value=FLOAT32_CPU, why="float32 on the CPU")
    if noise is not None and NOISES * noise > COSINE:
        return Bound(measure="cosine", value=NOISES * noise, why=f"{NOISES:g} × the model's noise in {compute_dtype}")
    why = f"{compute_dtype}, {weights} weights" if weights else f"{compute_dtype} on {device}"
    return Bound(measure="cosine", value=COSINE, why=why if noise is None else f"{why}; {NOISES:g} × noise is {NOISES * noise:.1e}")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One pass against a reference, over the rows that both have."""

    name: str
    rows: int
    difference: float
    """Largest absolute difference of a coordinate."""
    cosine: float
    """Largest 1 − cosine of a row."""
    mean_cosine: float
    agreement: float | None
    """Share of the ``neighbours`` nearest rows that are among the reference's, mean over rows; None of a single row."""
    neighbours: int
    furthest: int | None
    """The row whose cosine is the least."""
    missing: dict[int, str]
    """Row without a vector -> why."""
    shared: float
    """Share of the prompts' tokens that were taken from a shared prefix."""
    bound: Bound | None
    why_no_bound: str = ""

    @property
    def passed(self) -> bool:
        if self.bound is None:
            return not self.missing
        return not self.missing and (self.difference if self.bound.measure == "difference" else self.cosine) <= self.bound.value

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def without_vector(found: Pass) -> dict[int, str]:
    """Rows of a pass that have no vector to compare -> why."""
    missing = dict(found.failed)
    usable = np.isfinite(found.vectors).all(axis=1) & found.vectors.any(axis=1)
    for row in np.flatnonzero(~usable).tolist():
        missing.setdefault(row, "its vector is not finite, or zero")
    return missing


def compare(
    name: str, found: Pass, reference: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], *, bound: Bound | None = None, why_no_bound: str = ""
) -> Comparison:
    """Compares a pass with the reference, float32 [N, D], on the rows (int64 [M]) that have a vector there.

    bound: None states the distance and holds it to nothing.
    """
    missing = {row: why for row, why in without_vector(found).items() if row in rows}
    both = np.array([row for row in rows.tolist() if row not in missing], np.int64)
    a_ND, b_ND = (_unit(vectors[both]) for vectors in (found.vectors, reference))
    # Half the squared distance is 1 − cosine without the rounding of a number next to 1.
    apart = 0.5 * ((a_ND - b_ND) ** 2).sum(axis=1)
    neighbours = max(0, min(NEIGHBOURS, len(both) - 1))
    return Comparison(
        name=name,
        rows=len(both),
        difference=float(np.abs(a_ND - b_ND).max(initial=0.0)),
        cosine=float(apart.max(initial=0.0)),
        mean_cosine=float(1 - apart.mean()) if len(both) else 1.0,
        agreement=agreement(a_ND, b_ND, neighbours) if neighbours else None,
        neighbours=neighbours,
        furthest=int(both[np.argmax(apart)]) if len(both) else None,
        missing=missing,
        shared=found.shared / max(1, found.tokens),
        bound=bound,
        why_no_bound=why_no_bound,
    )


def agreement(a_ND: npt.NDArray[np.float64], b_ND: npt.NDArray[np.float64], neighbours: int) -> float:
    """Of each row's ``neighbours`` nearest rows by ``a`` the share that are as near by ``b`` as its ``neighbours`` nearest there; the mean over rows.

    a_ND, b_ND: unit vectors of the same rows; neighbours: 1 to N − 1
    """
    a_NN, b_NN = a_ND @ a_ND.T, b_ND @ b_ND.T
    np.fill_diagonal(a_NN, -np.inf)
    np.fill_diagonal(b_NN, -np.inf)
    nearest = np.argpartition(-a_NN, neighbours - 1, axis=1)[:, :neighbours]
    least = np.partition(b_NN, -neighbours, axis=1)[:, -neighbours]
    return float((np.take_along_axis(b_NN, nearest, axis=1) >= least[:, None] - TIE).mean())


def _unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    norms: npt.NDArray[np.float64] = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / norms
