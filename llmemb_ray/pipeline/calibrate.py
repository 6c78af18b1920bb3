"""The calibration of a run's codes: made once, by the first actor that has its model, and never changed.

Invariant: all shards of a run are written with the calibration that stands in OUT. Its sample is settled by
the plan, so that whoever makes it makes the same one, but for rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from llmemb_ray.corpus import sample
from llmemb_ray.embedders.embedder import Embedder
from llmemb_ray.errors import InputError, OutputError
from llmemb_ray.pipeline.prepare import Job, make_prompts
from llmemb_ray.shards.precision import Calibration, Precision

WAIT_SECONDS = 0.5
"""Between two looks at whether another actor's calibration is there."""


def settled(job: Job, embedder: Embedder, *, my_turn: Callable[[], bool], on_pack: Callable[[int, int], None] | None = None) -> Precision:
    """The run's precision with its calibration; makes that if it is not there and ``my_turn()`` says so, else waits for it."""
    if not job.calibrates:
        return job.precision
    while True:
        standing = Calibration.load(job.output)
        if standing is not None:
            if standing.space != job.space:
                raise OutputError(f"the calibration in {job.output.url} is of another vector space; delete the run with overwrite")
            return replace(job.precision, calibration=standing)
        if my_turn():
            measure(job, embedder, on_pack).save(job.output)
        else:
            time.sleep(WAIT_SECONDS)


def measure(job: Job, embedder: Embedder, on_pack: Callable[[int, int], None] | None = None) -> Calibration:
    """Embeds the sample. Raises InputError if none of its rows can be embedded."""
    table = sample.read(job.calibration_places, job.selection, job.access)
    texts, _ = job.selection.texts(table)
    embedded = embedder.embed_tokens(make_prompts(job, texts).rows, job.role, on_pack=on_pack)
    usable: npt.NDArray[np.bool_] = np.logical_and(np.isfinite(embedded.vectors).all(axis=1), embedded.vectors.any(axis=1))
    usable[list(embedded.failed)] = False
    if not usable.any():
        raise InputError(f"none of the {table.num_rows} rows sampled to calibrate {job.precision.dtype} codes can be embedded; look at them with dtype float32")
    return Calibration.measure(embedded.vectors[usable], job.space)
