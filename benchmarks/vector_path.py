"""Which way should vectors take from the actor to storage?

    python benchmarks/vector_path.py

``actor``  a thread of the actor encodes the shard and writes it, while the next unit is on the model; a record of one row leaves
``store``  the vectors leave the actor through Ray's object store, and a task of their own encodes and writes them

Both on the same Ray Data graph, rounds taken in turn, vectors of 4096 float32 (16 kB a row). A sleep stands in for the model, since
the question is what the host does beside it. Writes benchmarks/records/vector-path.json.
"""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.memory import write
from llmemb_ray.shards.schema import embedding_column, encode_shard
from llmemb_ray.storage import Storage

UNITS, ROWS, DIMENSION, ROUNDS = 40, 2000, 4096, 5
MODEL_SECONDS = 0.25
"""On the model for one unit; a GPU at 8,000 rows/s, faster than any 4096-dimensional model is."""


def shard(vectors: np.ndarray) -> bytes:
    table = pa.table({"source_row": np.arange(len(vectors)), "embedding": embedding_column(vectors, "float32")})
    return encode_shard(table, {}, vector_bytes=DIMENSION * 4)


class Actor:
    """Stands in for the embedder's actor. writes: whether it writes its shards itself."""

    def __init__(self, output: str, writes: bool) -> None:
        self._storage, self._writes, self._model = Storage(output), writes, threading.Lock()
        self._vectors = np.random.default_rng(0).standard_normal((ROWS, DIMENSION), dtype=np.float32)

    def __call__(self, batch: pa.Table) -> pa.Table:
        unit = batch["unit"][0].as_py()
        with self._model:
            time.sleep(MODEL_SECONDS)
        if not self._writes:
            return pa.table({"unit": [unit] * ROWS, "embedding": embedding_column(self._vectors, "float32")})
        self._storage.put(f"{unit}.parquet", shard(self._vectors))
        return pa.table({"unit": [unit]})


def write_unit(batch: pa.Table, output: str) -> pa.Table:
    column = batch["embedding"].combine_chunks()
    vectors = column.flatten().to_numpy().reshape(-1, DIMENSION)
    Storage(output).put(f"{batch['unit'][0].as_py()}.parquet", shard(vectors))
    return pa.table({"unit": [batch["unit"][0].as_py()]})


def run(way: str) -> float:
    """Seconds from the first unit done to the last."""
    output = tempfile.mkdtemp(prefix="llmemb-way-")
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1 if way == "actor" else ROWS * DIMENSION * 8
    source = ray.data.from_arrow([pa.table({"unit": [unit]}) for unit in range(UNITS)])
    dataset = source.map_batches(
        Actor,
        fn_constructor_kwargs={"output": output, "writes": way == "actor"},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0.5,
        compute=ray.data.ActorPoolStrategy(size=1, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True),
    )
    if way == "store":
        dataset = dataset.map_batches(write_unit, fn_kwargs={"output": output}, batch_size=ROWS, batch_format="pyarrow", num_cpus=0.25)
    started = 0.0
    for _ in dataset.iter_batches(batch_size=None, prefetch_batches=0):
        started = started or time.perf_counter()
    seconds = time.perf_counter() - started
    assert len(list(Path(output).glob("*.parquet"))) == UNITS
    shutil.rmtree(output)
    return seconds


def main() -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    seconds: dict[str, list[float]] = {"actor": [], "store": []}
    for _ in range(ROUNDS):
        for way, taken in seconds.items():
            taken.append(round(run(way), 2))
    medians = {way: statistics.median(taken) for way, taken in seconds.items()}
    floor = (UNITS - 1) * MODEL_SECONDS
    record = {"units": UNITS, "rows": ROWS, "dimension": DIMENSION, "model_seconds": floor, "seconds": seconds, "median": medians}
    print(json.dumps(record | {"store_to_actor": round(medians["store"] / medians["actor"], 2)}))
    write("vector-path", [record])


if __name__ == "__main__":
    main()
