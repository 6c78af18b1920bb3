"""The calibration of a run's codes: made once, by the first actor that has its model, and never changed.

Invariant: all shards of a run are written with the calibration that stands in OUT. Its sample is settled by
the plan, so that whoever makes it makes the same one, but for rounding.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llmemb_ray.corpus import sample
from llmemb_ray.embedders.embedder import Embedder
from llmemb_ray.errors import InputError, OutputError
from llmemb_ray.pipeline.making import Computing, OnPack, mean_by
from llmemb_ray.pipeline.prepare import CALIBRATION_ROWS, Job, make_prompts
from llmemb_ray.representation import TokenRows
from llmemb_ray.shards.precision import Calibration, Precision

WAIT_SECONDS = 0.5
"""Between two looks at whether another actor's calibration is there."""

STRIDE_TEXTS = 64
"""Texts made into prompts at a time: of long texts in chunks a few are enough."""

LEAST_VECTORS = 256
"""Fewer vectors than this are no sample of a larger corpus: values outside their ranges would be common."""


def settled(job: Job, embedder: Embedder, turns: Turns, *, on_pack: OnPack | None = None, computing: Computing = nullcontext) -> Precision:
    """The run's precision with its calibration; makes that if it is not there and it is this process's turn, else waits for it."""
    if not job.calibrates:
        return job.precision
    while True:
        standing = Calibration.load(job.output)
        if standing is not None:
            if standing.space != job.space:
                raise OutputError(f"the calibration in {job.output.url} is of another vector space; delete the run with overwrite")
            return replace(job.precision, calibration=standing)
        if turns.mine():
            made = turns.agreed(measure(job, embedder, on_pack, computing).to_json())
            Calibration.from_json(made, "the calibration agreed upon").save(job.output)
        else:
            time.sleep(WAIT_SECONDS)


class Turns(Protocol):
    """How processes agree on one calibration."""

    def mine(self) -> bool:
        """Whether this process is to make it."""

    def agreed(self, made: str) -> str:
        """The calibration that was made first, which may be another process's that was thought dead or slow."""


class Alone:
    """One process: its turn, its calibration."""

    def mine(self) -> bool:
        return True

    def agreed(self, made: str) -> str:
        return made


def measure(job: Job, embedder: Embedder, on_pack: OnPack | None = None, computing: Computing = nullcontext) -> Calibration:
    """Embeds the sample. Raises InputError if too few of its rows can be embedded."""
    table = sample.read(job.calibration_places, job.selection, job.access)
    texts, _ = job.selection.texts(table)
    prompts, owner = _prompts(job, texts)
    with computing():
        embedded = embedder.embed_tokens(prompts, job.role, on_pack=on_pack)
    vectors = embedded.vectors
    usable: npt.NDArray[np.bool_] = np.logical_and(np.isfinite(vectors).all(axis=1), vectors.any(axis=1))
    usable[list(embedded.failed)] = False
    if job.chunking and job.chunking.pool == "mean":
        whole = np.bincount(owner, usable) == np.bincount(owner)
        vectors, usable = mean_by(vectors, owner, len(whole), job.precision.normalized), whole
    count, sampled = int(usable.sum()), sum(place.rows for place in job.calibration_places)
    if count == 0 or (count < LEAST_VECTORS and sampled < job.rows):
        raise InputError(
            f"of {sampled} rows sampled to calibrate {job.precision.dtype} codes {count} can be embedded, which tells too little of the corpus; "
            "take the ranges of another run (calibration), or write float16"
        )
    return Calibration.measure(vectors[usable], job.space)


def _prompts(job: Job, texts: list[str | None]) -> tuple[TokenRows, npt.NDArray[np.int64]]:
    """About CALIBRATION_ROWS prompts of the texts, from all over them, and the number of each prompt's text."""
    rows: list[npt.NDArray[np.int32]] = []
    owner: list[int] = []
    strides = max(1, len(texts) // STRIDE_TEXTS)
    count = 0
    for offset in range(strides):
        made = make_prompts(job, texts[offset::strides])
        rows += [made.rows[row] for row in range(len(made.rows))]
        names, numbers = np.unique(made.owner, return_inverse=True)
        owner += (numbers + count).tolist()
        count += len(names)
        if len(rows) >= CALIBRATION_ROWS:
            break
    return TokenRows.from_lists(rows), np.asarray(owner, np.int64)
