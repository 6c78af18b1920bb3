"""Small embedding jobs that tests run in this process, and what they wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

import llmemb_ray
from llmemb_ray.config import EmbedSettings
from llmemb_ray.embedders.embedder import Embedder, EmbedderSpec, settle
from llmemb_ray.pipeline import job, planning
from llmemb_ray.pipeline.making import Workshop
from llmemb_ray.pipeline.prepare import Job, Prepared, ReadTask, prepare
from llmemb_ray.shards.plan import Plan
from llmemb_ray.shards.receipt import Receipt
from llmemb_ray.shards.run import Run
from llmemb_ray.shards.schema import raw_values
from llmemb_ray.storage import Access, Storage


def write(path: Path, texts: Any, *, row_group_size: int = 10, **columns: Any) -> Path:
    """A Parquet file of texts and other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns | {"text": texts}), path, row_group_size=row_group_size)
    return path


def embed(corpus: Path | str, output: Path, model: Path, **settings: Any) -> Receipt:
    return llmemb_ray.embed(str(corpus), str(output), model=str(model), **({"actors": "0", "quiet": True} | settings))


def opened(output: Path) -> Run:
    """Opened anew, so that nothing of the run is remembered."""
    return Run(Storage(str(output)))


def decoded(output: Path) -> dict[Any, npt.NDArray[np.float32]]:
    """The run's vectors by id, whatever their dtype."""
    run = opened(output)
    return {id_: vector for _, table in run.shards() for id_, vector in zip(table["id"].to_pylist(), run.precision.decode(table["embedding"]), strict=True)}


def vectors_of(column: pa.ChunkedArray | pa.Array) -> npt.NDArray[np.float32]:
    """float32 [N, D] of an ``embedding`` column of floats."""
    return raw_values(column).astype(np.float32)


def rows_of(output: Path) -> pa.Table:
    """All rows of a run, unit by unit."""
    return pa.concat_tables([table for _, table in opened(output).shards()])


def rejects_of(output: Path) -> list[dict[str, Any]]:
    return [row for table in opened(output).rejects() for row in table.to_pylist()]


def vectors_by_text_id(output: Path, key: str = "id") -> dict[Any, npt.NDArray[np.float32]]:
    table = rows_of(output)
    return dict(zip(table[key].to_pylist(), vectors_of(table["embedding"]), strict=True))


def problems_of(output: Path, corpus: Path | None = None) -> list[Any]:
    return llmemb_ray.verify(opened(output), against=[str(corpus)] if corpus else []).problems


@dataclass(frozen=True)
class Settled:
    """A job up to its first unit, for tests that go on from there step by step."""

    settings: EmbedSettings
    spec: EmbedderSpec
    plan: Plan
    job: Job

    @property
    def tasks(self) -> list[ReadTask]:
        return [task for window in job.windows(self.plan, set(), 1000) for task in window]

    def prepared(self) -> list[Prepared]:
        return [prepared for task in self.tasks for prepared in prepare(self.job, task)]

    def workshop(self) -> Workshop:
        return Workshop(precision=self.job.precision)

    def embedder(self) -> Embedder:
        return Embedder(self.spec)


def settled(corpus: Path | str, output: Path, model: Path, *, actors: int = 1, gpu: bool = False, **settings: Any) -> Settled:
    """Plans a job and saves its plan."""
    made = EmbedSettings.make({"input": [str(corpus)], "output": str(output), "model": str(model)} | settings)
    spec = settle(made).on(gpu)
    found, selection = planning.find(made)
    plan = planning.make_plan(made, spec, found, selection, actors=actors, gpu=gpu)
    storage = Storage(str(output))
    plan.save(storage)
    return Settled(made, spec, plan, Job.of(plan, spec, storage, Access()))
