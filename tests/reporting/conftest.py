"""Runs that a report must tell apart, and runs whose vectors are given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from llmemb_ray.reporting.facts import Facts, collect
from llmemb_ray.representation.representation import Representation
from llmemb_ray.shards import commits, schema
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Storage
from tests.shards.small_plan import commit_of, small_plan
from tests.small_jobs import embed, write
from tests.small_models import SENTENCES

HOSTILE = [
    "<script>alert(1)</script> in a text",
    "</script><script>document.title='taken'</script>",
    "<img src=x onerror=\"document.title='taken'\"> \"quoted\" 'single' `back`",
    "emoji 😀👩‍👩‍👧‍👦 and 数据科学",
    "שלום עולם, text from right to left",
    "many\nlines\r\nand\ttabs\u2028here",
    "&lt;b&gt;entities&amp;all&lt;/b&gt; <b>bold</b> <a href='https://example.com'>link</a>",
    "%{x} {{ 7 * 7 }} {% raw %} ${1+1} $\\frac{1}{2}$",
    "very long " * 400,
]


def made_run(directory: Path, vectors_ND: np.ndarray, *, normalize: bool = False, prompts: list[int] | None = None, **changes: Any) -> Run:
    """A run of the small plan whose 55 vectors are given; of its seven units each has a host, a time and tokens of its own."""
    dimension = changes.pop("dimension", vectors_ND.shape[1])
    storage = Storage(str(directory))
    representation = Representation(normalize=normalize)
    plan = small_plan(dimension=dimension, **changes)
    plan = replace(plan, space=plan.space | {"representation": representation.to_dict()}, engine=plan.engine | {"centre": False})
    plan = replace(plan, corpus=plan.corpus | {"chunk_tokens": None, "chunk_pool": "none"})
    plan.save(storage)
    done = 0
    for number, unit in enumerate(plan.units()):
        rows = np.arange(unit.start, unit.start + unit.rows)
        places = list(range(done, done + unit.rows))
        hashes = [(places if prompts is None else prompts[done : done + unit.rows])[i].to_bytes(16, "little") for i in range(unit.rows)]
        table = pa.table(
            {
                "id": [f"{unit.file}-{row}" for row in rows],
                "source_file": pa.array([unit.file] * unit.rows, pa.int32()),
                "source_row": pa.array(rows, pa.int64()),
                "embedding": schema.embedding_column(vectors_ND[done : done + unit.rows], plan.dtype),
                "n_tokens": pa.array([5 + place % 7 for place in places], pa.int32()),
                "prompt_hash": pa.array(hashes, pa.binary(16)),
            }
        )
        values = {"embedded": unit.rows, "rejected": 0, "vectors": unit.rows, "reasons": {}, "rejects": None, "host": f"host-{number % 2}"}
        times = {"seconds_model": 10.0 * (number + 1), "seconds_write": 0.0, "finished": 1000.0 + 100 * number}
        commit = commit_of(unit, **(values | times))
        assert commit.shard is not None
        storage.put(commit.shard, schema.encode_shard(table, {}, vector_bytes=schema.vector_bytes(dimension, plan.dtype)))
        commits.write(storage, commit)
        done += unit.rows
    return Run(storage)


def facts_of(output: Path | Run, *, sample_size: int = 2000, with_text: bool = True) -> Facts:
    return collect(output if isinstance(output, Run) else Run(Storage(str(output))), sample_size=sample_size, with_text=with_text)


@pytest.fixture(scope="session")
def hostile_once(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A corpus of texts that attack a page, rejects of three reasons, and ids that attack too; 80 rows in two files."""
    root = tmp_path_factory.mktemp("hostile")
    texts: list[Any] = [*HOSTILE, *(f"{SENTENCES[row % len(SENTENCES)]} {row}" for row in range(51))]
    texts[20], texts[21], texts[22] = None, " ", ""
    write(root / "in" / "a.parquet", texts, id=[f"<i>{row}</i>" for row in range(60)])
    bad = pa.array([b"fine text", b"\xff\xfe<script>alert(2)</script>", *[b"word %d" % row for row in range(18)]], pa.binary())
    write(root / "in" / "b.parquet", bad, id=[f"b{row}" for row in range(20)])
    embed(root / "in", root / "out", model, rows_per_unit=20, max_tokens=64)
    return root
