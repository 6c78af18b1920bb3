"""The sample: spread evenly, the same each time, from few row groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from llmemb_ray.errors import OutputError
from llmemb_ray.reporting.sample import PLACES, draw
from llmemb_ray.shards import schema
from llmemb_ray.shards.run import Run
from tests.reporting.conftest import made_run
from tests.small_jobs import embed, opened, write

VECTORS = np.arange(55 * 4, dtype=np.float32).reshape(55, 4)


def places(run: Run, size: int) -> list[tuple[int, int]]:
    rows = draw(run, size).rows
    return list(zip(rows["source_file"].to_pylist(), rows["source_row"].to_pylist(), strict=True))


def test_a_small_run_is_taken_whole(tmp_path: Path) -> None:
    sample = draw(made_run(tmp_path, VECTORS), 55)
    np.testing.assert_array_equal(sample.vectors_ND, VECTORS)
    assert (len(sample), sample.of, sample.shards_read) == (55, 55, 7)
    assert sample.lengths_T.tolist() == [0] * 5 + [8] * 6 + [7], "lengths 5 to 11, in turn"


@pytest.mark.parametrize("size", [1, 7, 20, 54])
def test_a_sample_is_spread_over_the_units_and_is_the_same_again(tmp_path: Path, size: int) -> None:
    run = made_run(tmp_path, VECTORS)
    chosen = places(run, size)
    assert chosen == places(run, size) == sorted(set(chosen))
    assert len(chosen) == size
    numbers = [row + 30 * file for file, row in chosen]
    assert max(np.diff([-1, *numbers, 55])) <= 2 * -(-55 // size)


def test_each_vector_keeps_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "ROW_GROUP_BYTES", 3 * 16)
    run = made_run(tmp_path, VECTORS)
    assert pq.ParquetFile(tmp_path / str(run.commits[0].shard)).num_row_groups == 3
    sample = draw(run, 25)
    numbers = np.array(sample.rows["source_row"].to_pylist()) + 30 * np.array(sample.rows["source_file"].to_pylist())
    np.testing.assert_array_equal(sample.vectors_ND, VECTORS[numbers])


def test_of_many_shards_few_are_read(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [f"text {row}" for row in range(300)], row_group_size=300)
    embed(tmp_path / "in", tmp_path / "out", model, rows_per_unit=3, prompt="none")
    run = opened(tmp_path / "out")
    assert len(run.commits) == 100
    sample = draw(run, 5000)
    assert sample.shards_read == PLACES
    assert 0 < len(sample) <= 3 * PLACES
    rows = sample.rows["source_row"].to_pylist()
    assert min(rows) < 6
    assert max(rows) >= 294


def test_a_shard_that_is_gone_is_named(tmp_path: Path) -> None:
    run = made_run(tmp_path, VECTORS)
    shard = run.commits[2].shard
    (tmp_path / str(shard)).unlink()
    with pytest.raises(OutputError, match=f"{shard} is named by a commit but is not there; run verify"):
        draw(run, 55)
    (tmp_path / str(shard)).write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(OutputError, match=f"{shard} cannot be read"):
        draw(run, 55)
