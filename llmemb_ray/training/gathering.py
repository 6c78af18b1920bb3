"""The Ray Data operators that prepare batches: reading a file, giving each row its steps, writing what came together as a shard.

Invariant: an operator's outcome depends on its input and the plan alone, so that Ray may run it twice. Each holds one part or one shard.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from llmemb_ray import parquet
from llmemb_ray.errors import LlmembError
from llmemb_ray.storage import Storage
from llmemb_ray.training import order, reading
from llmemb_ray.training.batches import HELDOUT, SCHEMA, SHARD
from llmemb_ray.training.order import Group, Ints, Steps

PLACED_ROWS = 65_536

PLACED = pa.schema([*SCHEMA, ("shard", pa.int64()), ("step", pa.int64()), ("place", pa.int64())])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where rows go. rows_sorted: int64 [P], the steps' rows by number; by_row: int64 [P], their positions in the steps; of each step,
    epochs: int64 [S], from 1, 0 for what is held out; shards: int64 [S], number of the file, -1 for what is held out.
    """

    steps: Steps
    rows_sorted: Ints
    by_row: Ints
    epochs: Ints
    shards: Ints
    groups: list[Group]
    told: list[tuple[str, ...]]
    """Of each source, the instructions that each of its rows draws from by itself (mix_tasks); none where a step draws for all its rows."""
    seed: int


def read_file(batch: pa.Table, tasks: Any, storage: Storage) -> pa.Table:
    """A file's accounts for its number. tasks: reference to the FileTasks. An error of ours is told, not raised, so that it comes whole to the driver."""
    number = batch["number"][0].as_py()
    try:
        made, error = reading.read_file(ray.get(tasks)[number], storage), None
    except LlmembError as caught:
        made, error = reading.FileRows(), (type(caught).__name__, str(caught))
    names = ("read", "parts", "groups", "reasons", "examples", "characters", "teacher_length")
    told = {name: getattr(made, name) for name in names} | {"error": error}
    arrays = {name: pa.array([values.tobytes()], pa.large_binary()) for name, values in (("groups", made.group_of), ("anchors", made.anchors))}
    return pa.table({"number": [number], "told": [json.dumps(told)]} | arrays)


def place_rows(batch: pa.Table, plan: Any, storage: Storage) -> Iterator[pa.Table]:
    """The rows of a part that the plan takes, as often as it does, each with its shard, step and place. plan: reference to a Plan.

    They come in tables of at most ``PLACED_ROWS`` rows and about ``PART_CHARACTERS`` of text, whatever the number of epochs; at least one.
    """
    settled: Plan = ray.get(plan)
    first, instructions = batch["first"][0].as_py(), settled.told[batch["source"][0].as_py()]
    with storage.open(batch["part"][0].as_py()) as reader:
        rows = parquet.read(reader)
    start, end = np.searchsorted(settled.rows_sorted, [first, first + rows.num_rows])
    numbers, positions = settled.rows_sorted[start:end], settled.by_row[start:end]
    steps = np.searchsorted(settled.steps.starts, positions, side="right") - 1
    columns = {name: rows[name].to_pylist() for name in rows.column_names}
    made: list[dict[str, Any]] = []
    bulk = 0
    for number, position, step in zip(map(int, numbers), map(int, positions), map(int, steps), strict=True):
        place, epoch = number - first, int(settled.epochs[step])
        group = settled.groups[settled.steps.groups[step]]
        instruction = columns["instruction"][place]
        if instruction is None and instructions:
            instruction = instructions[order.draw_instruction(len(instructions), seed=settled.seed, epoch=epoch, row=number)]
        elif instruction is None and (told := int(settled.steps.instructions[step])) >= 0:
            instruction = group.instructions[told]
        positives, negatives, scores = columns["positives"][place], columns["negatives"][place], columns["scores"][place]
        chosen, drawn = order.draw(len(positives), len(negatives), group.negatives, seed=settled.seed, epoch=epoch, row=number)
        made.append(
            {
                "task": group.task,
                "instruction": instruction,
                "symmetric": group.symmetric,
                "anchor": columns["anchor"][place],
                "positive": positives[chosen] if positives else None,
                "negatives": [negatives[one] for one in drawn],
                "teacher": columns["teacher"][place],
                "scores": None if scores is None else [scores[chosen], *(scores[len(positives) + one] for one in drawn)],
                "source": columns["source"][place],
                "shard": int(settled.shards[step]),
                "step": step,
                "place": position - int(settled.steps.starts[step]),
            }
        )
        last = made[-1]
        bulk += len(last["anchor"]) + len(last["positive"] or "") + sum(map(len, last["negatives"])) + 4 * len(last["teacher"] or ())
        if len(made) == PLACED_ROWS or bulk >= reading.PART_CHARACTERS:
            yield pa.Table.from_pylist(made, schema=PLACED)
            made, bulk = [], 0
    if made or not len(numbers):
        yield pa.Table.from_pylist(made, schema=PLACED)


def write_shard(group: pa.Table, storage: Storage) -> pa.Table:
    """Writes the rows of a shard, a row group a step, and says how many."""
    shard = group["shard"][0].as_py()
    rows = group.sort_by([("step", "ascending"), ("place", "ascending")])
    steps = rows["step"].to_numpy()
    rows = rows.select(SCHEMA.names).cast(SCHEMA)
    edges = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(steps)]
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, SCHEMA, compression="ZSTD") as writer:
        for start, end in itertools.pairwise(edges):
            writer.write_table(rows.slice(start, end - start), row_group_size=end - start)
    storage.put(HELDOUT if shard < 0 else SHARD.format(shard), memoryview(sink.getvalue()))
    return pa.table({"shard": [shard], "rows": [rows.num_rows]})
