"""The job on a real local Ray: one call is one unit, tokenising is no part of the actor, a poison row costs only itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import llmemb_ray
from llmemb_ray.config import EmbedSettings
from llmemb_ray.errors import ModelError, RunFailed
from llmemb_ray.pipeline import graph, planning, stalls
from llmemb_ray.pipeline.ledger import Process
from llmemb_ray.pipeline.ledger_actor import LedgerActor
from llmemb_ray.pipeline.metrics import Meter
from llmemb_ray.pipeline.prepare import Job
from llmemb_ray.pipeline.shape import shape as shape_of
from llmemb_ray.shards.receipt import Receipt
from llmemb_ray.shards.run import Run
from llmemb_ray.shards.verify import verify
from llmemb_ray.storage import Storage
from tests.pipeline.poison import HANGS, POISON
from tests.small_jobs import vectors_of

pytestmark = [pytest.mark.usefixtures("ray_with_fake_gpus"), pytest.mark.timeout(240)]


def vectors(output: Path) -> dict[str, np.ndarray]:
    run = llmemb_ray.open_run(str(output))
    return {id_: vector for _, table in run.shards() for id_, vector in zip(table["id"].to_pylist(), vectors_of(table["embedding"]), strict=True)}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert max(float(np.abs(one[key] - other[key]).max()) for key in one) <= 1e-5


def test_ray_and_one_process_write_the_same(corpus: Path, model: Path, tmp_path: Path) -> None:
    plain = llmemb_ray.embed(str(corpus), str(tmp_path / "plain"), model=str(model), actors="0", quiet=True, rows_per_unit=7)
    on_ray = llmemb_ray.embed(
        str(corpus), str(tmp_path / "ray"), model=str(model), actors="2", gpus_per_actor=0.5, compute_dtype="float32", quiet=True, rows_per_unit=7
    )
    assert (on_ray.rows_read, on_ray.rows_embedded, on_ray.rejects_by_reason) == (120, 118, {"null": 1, "empty": 1})
    assert on_ray.tokens == plain.tokens
    assert verify(llmemb_ray.open_run(str(tmp_path / "ray")), against=[str(corpus)]).problems == []
    assert_same(vectors(tmp_path / "plain"), vectors(tmp_path / "ray"))


def test_one_call_is_one_unit_and_tokenising_stays_off_the_actor(corpus: Path, model: Path, tmp_path: Path) -> None:
    import ray

    settings = EmbedSettings.make(
        {"input": [str(corpus)], "output": str(tmp_path / "out"), "model": str(model), "actors": "1", "gpus_per_actor": 1, "rows_per_unit": 4}
    )
    spec = planning_spec(settings)
    found, selection = planning.find(settings)
    plan = planning.make_plan(settings, spec, found, selection, actors=1, gpu=True)
    output = Storage(settings.output)
    job = Job.of(plan, spec, output, settings.access)
    shape = shape_of(settings)
    assert shape.on_gpu
    execution = graph.Execution(job, settings, shape)
    from llmemb_ray.pipeline.job import windows

    tasks = next(windows(plan, set(), 1000))
    units = {unit.name for task in tasks for unit in task.piece.units}
    dataset = graph.build(tasks, ray.put(job), execution.ledger.handle, shape).materialize()
    records = dataset.take_all()
    # Each call yields one record; were units glued together or cut, from_envelope would refuse the batch.
    assert sorted(record["unit"] for record in records) == sorted(units)
    assert len(units) == 33
    operators = [line for line in dataset.stats().splitlines() if "MapBatches" in line and line.startswith("Operator")]
    assert len(operators) == 2
    assert "MapBatches(read_and_tokenize)" in operators[0]
    assert "EmbedUnits" not in operators[0]
    assert "MapBatches(EmbedUnits)" in operators[1]
    assert "read_and_tokenize" not in operators[1]


def planning_spec(settings: EmbedSettings) -> object:
    from llmemb_ray.embedders.embedder import settle

    return settle(settings)


def embed_by_one_actor(place: Path, model: Path, **settings: Any) -> Receipt:
    """corpus.parquet into out, both at this place."""
    shared = {"model": str(model), "actors": "1", "gpus_per_actor": 1, "compute_dtype": "float32", "quiet": True}
    return llmemb_ray.embed(str(place / "corpus.parquet"), str(place / "out"), **(shared | settings))


def test_a_row_that_kills_its_engine_is_found_and_rejected(model: Path, tmp_path: Path) -> None:
    texts = [f"sentence number {row}" for row in range(6)]
    texts[3] = POISON
    pq.write_table(pa.table({"id": [str(row) for row in range(6)], "text": texts}), tmp_path / "corpus.parquet")
    receipt = embed_by_one_actor(tmp_path, model, max_attempts=1, rows_per_unit=2)
    assert receipt.rejects_by_reason == {"kills_engine": 1}
    assert receipt.rows_embedded == 5
    run = Run(Storage(str(tmp_path / "out")))
    assert [table["source_row"].to_pylist() for table in run.rejects()] == [[3]]
    assert verify(run).problems == []


def test_a_row_that_hangs_its_engine_is_found_and_rejected(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit after it is waiting in the same actor, and is taken up by the next."""
    monkeypatch.setattr(stalls, "LOOK_SECONDS", 0.5)
    pq.write_table(pa.table({"id": ["0", "1"], "text": [HANGS, "a sentence"]}), tmp_path / "corpus.parquet")
    receipt = embed_by_one_actor(tmp_path, model, max_attempts=2, retry_wait=0, stall_timeout=5, rows_per_unit=1)
    assert (receipt.rows_embedded, receipt.rejects_by_reason) == (1, {"kills_engine": 1})
    (rejected,) = Run(Storage(str(tmp_path / "out"))).rejects()
    assert "no progress for" in rejected["detail"][0].as_py()


def test_an_actor_whose_node_is_gone_did_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, bool]] = []
    monkeypatch.setattr(stalls, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(LedgerActor, "ended", lambda self, stalled, *, killed: told.append((stalled.process.actor, killed)))
    ledger = LedgerActor(Meter("embed", "key"), 2, 0.0, 2.0)
    ledger.handle.computing.remote(Process("actor", "0" * 56, 1, 1), "unit")
    with stalls.ended(ledger):
        deadline = time.monotonic() + 150
        while not told and time.monotonic() < deadline:
            time.sleep(0.1)
    assert set(told) == {("actor", False)}


def test_a_file_that_changes_fails_its_units_by_name_and_the_rest_is_committed(
    corpus: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    whole = planning.make_plan

    def plan_then_change(*args: object, **kwargs: object) -> object:
        plan = whole(*args, **kwargs)  # type: ignore[arg-type]
        pq.write_table(pa.table({"id": ["new"], "text": ["another file now"]}), corpus / "part-1.parquet")
        return plan

    before = (corpus / "part-1.parquet").read_bytes()
    monkeypatch.setattr(planning, "make_plan", plan_then_change)
    with pytest.raises(RunFailed, match=r"(?s)part-1\.parquet changed after the run was planned.*run the same command again"):
        llmemb_ray.embed(str(corpus), str(output), model=str(model), actors="1", gpus_per_actor=1, compute_dtype="float32", quiet=True)
    assert {commit.file for commit in Run(Storage(str(output))).commits} == {0, 2}
    assert before != (corpus / "part-1.parquet").read_bytes()


def test_a_model_that_fails_on_the_cluster_is_reported_in_its_own_words(corpus: Path, model: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises((ModelError, RunFailed), match="broken"):
        llmemb_ray.embed(str(corpus), str(tmp_path / "out"), model=str(broken), actors="1", gpus_per_actor=1, quiet=True)


def test_the_stage_embeds_in_ones_own_pipeline(model: Path) -> None:
    import ray
    from ray.data import ActorPoolStrategy

    texts = ["one sentence", "", "another sentence", None]
    stage = llmemb_ray.EmbedStage(str(model), prompt="none", pooling="mean")
    wanted = llmemb_ray.Embedder.load(str(model), prompt="none", pooling="mean").encode(["one sentence", "another sentence"])
    source = ray.data.from_arrow(pa.table({"text": texts}))
    for mapped in (
        source.map_batches(stage, batch_format="pyarrow", batch_size=2),
        source.map_batches(stage.actor, batch_format="pyarrow", batch_size=2, num_gpus=1, compute=ActorPoolStrategy(size=1)),
    ):
        rows = mapped.take_all()
        found = [None if row["embedding"] is None else np.asarray(row["embedding"], np.float32) for row in rows]
        assert [vector is None for vector in found] == [False, True, False, True]
        np.testing.assert_allclose(np.stack([found[0], found[2]]), wanted, atol=1e-5)
