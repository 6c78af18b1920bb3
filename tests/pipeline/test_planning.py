"""Plans: how big units are, what makes a run the same run, and what a plan never holds."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmemb_ray.config import EmbedSettings
from llmemb_ray.corpus.units import MAX_ROWS, SHARD_BYTES
from llmemb_ray.embedders.embedder import settle
from llmemb_ray.errors import ConfigError, InputError, ModelError
from llmemb_ray.pipeline import planning
from llmemb_ray.representation import Representation
from llmemb_ray.representation.space import digest
from llmemb_ray.shards.plan import Plan
from llmemb_ray.shards.precision import Calibration
from llmemb_ray.storage import Storage
from tests.small_jobs import Settled, settled, write
from tests.small_models import make_model

# -- units -------------------------------------------------------------------------------------------


def test_units_hold_at_most_the_rows_asked_for_and_each_row_once(tmp_path: Path, model: Path) -> None:
    for number, rows in enumerate((1, 40, 7)):
        write(tmp_path / "in" / f"{number}.parquet", ["x"] * rows, row_group_size=15)
    plan = settled(tmp_path / "in", tmp_path / "out", model, rows_per_unit=10).plan
    seen = [(unit.file, row) for unit in plan.units() for row in range(unit.start, unit.start + unit.rows)]
    assert seen == [(file, row) for file, rows in enumerate((1, 40, 7)) for row in range(rows)]
    assert max(unit.rows for unit in plan.units()) <= 10
    assert plan.rows == 48


def planned(tmp_path: Path, spec_of: Settled, rows: int, *, actors: int = 1, gpu: bool = False, **spec: Any) -> Plan:
    """A plan for a corpus of one-letter texts, with the model made larger on paper."""
    path = tmp_path / f"{rows}.parquet"
    if not path.exists():
        pq.write_table(pa.table({"text": pa.repeat(pa.scalar("x"), rows)}), path, row_group_size=rows)
    settings = spec_of.settings.model_copy(update={"input": [str(path)]})
    found, selection = planning.find(settings)
    return planning.make_plan(settings, replace(spec_of.spec, **spec), found, selection, actors=actors, gpu=gpu)


@pytest.fixture
def ready(tmp_path: Path, model: Path) -> Settled:
    return settled(write(tmp_path / "tiny" / "a.parquet", ["x"]).parent, tmp_path / "tiny-out", model, prompt="none")


def test_large_vectors_limit_units_by_the_bytes_of_a_shard(tmp_path: Path, ready: Settled) -> None:
    plan = planned(tmp_path, ready, 100_000, dimension=8192, model_flops=1.0)
    largest = max(unit.rows for unit in plan.units())
    assert 0.9 * SHARD_BYTES < largest * 8192 * 4 <= SHARD_BYTES


def test_large_models_limit_units_to_about_a_minute(tmp_path: Path, ready: Settled) -> None:
    """A model of 7e9 parameters needs 1.4e10 operations a token; texts here are a token or two."""
    on_gpu = planned(tmp_path, ready, 1_200_000, gpu=True, model_flops=1.4e10)
    on_cpu = planned(tmp_path, ready, 1_200_000, gpu=False, model_flops=1.4e10)
    rows_gpu, rows_cpu = (max(unit.rows for unit in plan.units()) for plan in (on_gpu, on_cpu))
    for rows, speed in ((rows_gpu, planning.GPU_FLOPS), (rows_cpu, planning.CPU_FLOPS)):
        tokens = (len("{text}") + 5) / planning.BYTES_PER_TOKEN
        assert rows * tokens * 1.4e10 / speed < 120
    assert rows_gpu > rows_cpu
    assert rows_gpu <= MAX_ROWS


def test_an_actor_of_several_gpus_gets_larger_units(tmp_path: Path, ready: Settled) -> None:
    one, four = (replace(ready, settings=ready.settings.model_copy(update={"backend": "vllm", "tensor_parallel": gpus})) for gpus in (1, 4))
    rows_one, rows_four = (max(unit.rows for unit in planned(tmp_path, of, 1_200_000, gpu=True, model_flops=1.4e12).units()) for of in (one, four))
    assert 3.9 * rows_one < rows_four < 4.1 * rows_one


def test_small_corpora_are_cut_so_that_every_actor_has_work_to_the_end(tmp_path: Path, ready: Settled) -> None:
    assert sum(1 for _ in planned(tmp_path, ready, 40_000, actors=5).units()) == 5 * planning.UNITS_PER_ACTOR
    assert sum(1 for _ in planned(tmp_path, ready, 200, actors=50).units()) == 1, "not below the least rows worth a unit"
    assert sum(1 for _ in planned(tmp_path, ready, 2560, actors=1000).units()) == 2560 // planning.LEAST_ROWS


def test_the_same_corpus_gives_the_same_plan(tmp_path: Path, model: Path, corpus: Path) -> None:
    one, other = (settled(corpus, tmp_path / name, model, limit_rows=70).plan for name in ("one", "other"))
    assert one.files == other.files
    assert one.run_key == other.run_key
    assert list(one.units()) == list(other.units())
    loaded = Plan.load(Storage(str(tmp_path / "one")))
    assert loaded is not None
    assert list(loaded.units()) == list(one.units())


@pytest.mark.parametrize("limit", [1, 15, 16, 40, 41, 95, 120, 1000])
def test_a_row_limit_takes_the_first_rows_of_the_corpus(tmp_path: Path, model: Path, corpus: Path, limit: int) -> None:
    plan = settled(corpus, tmp_path / "out", model, limit_rows=limit, rows_per_unit=10).plan
    seen = [(unit.file, row) for unit in plan.units() for row in range(unit.start, unit.start + unit.rows)]
    assert seen == [(file, row) for file in range(3) for row in range(40)][:limit]


# -- what makes a run the same run -------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, str]:
    root = tmp_path_factory.mktemp("identity")
    columns: dict[str, Any] = {"id": [1, 2], "other": ["a", "b"]}
    write(root / "in" / "a.parquet", ["x", "y"], **columns)
    write(root / "more" / "a.parquet", ["x", "z"], **columns)
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text("{}")
    Representation(pooling="mean").save(root)
    other = make_model(root / "other-weights", seed=1)
    return {
        "in": str(root / "in"),
        "more": str(root / "more"),
        "adapter": str(root / "adapter"),
        "llmemb.json": str(root),
        "other": str(other),
        "windowed": str(make_model(root / "windowed", "mistral")),
        "model": str(model),
    }


MATTERS: dict[str, dict[str, Any]] = {
    "model": {"model": "other"},
    "adapter": {"adapter": "adapter"},
    "compute_dtype": {"compute_dtype": "bfloat16"},
    "quantization": {"quantization": "nf4"},
    "representation": {"representation": "llmemb.json"},
    "prompt": {"prompt": "say {text}"},
    "demo": {"prompt": "prompteol-icl", "demo": ["A man is running.=>Sport"]},
    "instruction": {"prompt": "e5", "instruction": "Find it"},
    "clean": {"clean": "senteval"},
    "pooling": {"pooling": "mean"},
    "layer": {"layer": -2},
    "normalize": {"normalize": False},
    "dimensions": {"dimensions": 8},
    "max_tokens": {"max_tokens": 50},
    "rope_theta": {"rope_theta": 1e5},
    "sliding_window": {"model": "windowed", "sliding_window": 0},
    "append_eos": {"append_eos": True},
    "role": {"role": "query"},
    "input": {"input": ["more"]},
    "text_column": {"text_column": "{other} {text}"},
    "id_column": {"id_column": "other"},
    "keep_columns": {"keep_columns": ["other"]},
    "filter": {"filter": "other = 'a'"},
    "limit_rows": {"limit_rows": 1},
    "max_text_bytes": {"max_text_bytes": 1000},
    "dtype": {"dtype": "float16"},
    "backend": {"backend": "vllm"},
    "engine_arg": {"backend": "vllm", "engine_arg": ["kv_cache_dtype=fp8"]},
    "centre": {"dtype": "ubinary", "centre": True},
    "calibration": {"dtype": "int8", "calibration": "calibrated"},
    "chunk_tokens": {"chunk_tokens": 8},
    "chunk_overlap": {"chunk_tokens": 8, "chunk_overlap": 2},
    "chunk_pool": {"chunk_tokens": 8, "chunk_pool": "mean"},
    "rows_per_unit": {"rows_per_unit": 1},
}
"""Settings that decide which vectors are written, or how rows are cut: another value is another run."""

BASES: dict[str, dict[str, Any]] = {
    "demo": {"prompt": "prompteol-icl", "demo": ["A man is running.=>Run"]},
    "instruction": {"prompt": "e5", "instruction": "Find them"},
    "backend": {"backend": "hf"},
    "engine_arg": {"backend": "vllm", "engine_arg": ["max_num_seqs=8"]},
    "sliding_window": {"model": "windowed"},
    "centre": {"dtype": "ubinary"},
    "calibration": {"dtype": "int8"},
    "chunk_overlap": {"chunk_tokens": 8},
    "chunk_pool": {"chunk_tokens": 8},
}
"""What to compare with where a setting only works beside another."""

DOES_NOT: dict[str, Any] = {
    "endpoint_url": "http://127.0.0.1:1",
    "storage_options": {"auto_mkdir": True},
    "storage_retry_seconds": 7.0,
    "tensor_parallel": 2,
    "token_budget": 64,
    "trust_remote_code": True,
    "allow_pickle": True,
    "output": "elsewhere",
    "overwrite": True,
    "skip_bad_files": True,
    "append": True,
    "dedup": "exact",
    "reuse": "somewhere",
    "max_nan": 3,
    "deadline": "6h",
    "max_cost": 10.0,
    "price": 2.0,
    "max_reject_rate": 0.5,
    "reject_floor": 0,
    "actors": "0",
    "gpus_per_actor": 0.5,
    "cpus_per_actor": 2.0,
    "max_attempts": 9,
    "retry_wait": 5.0,
    "stall_timeout": 30.0,
    "stop_grace": 5.0,
    "ray_address": "ray://head:10001",
    "window_units": 17,
    "check_parity": 8,
    "accept_backend_change": True,
}
"""Settings that say where and how fast: changing them between two attempts must not cost what is done."""

ONLY_BESIDE: dict[str, dict[str, Any]] = {"max_cost": {"price": 1.0}, "accept_backend_change": {"check_parity": 8}, "tensor_parallel": {"backend": "vllm"}}
"""What such a setting needs beside it."""

REFUSED = {"revision"}
"""Of a local directory; of a hub model it becomes the commit, which is in the space."""


def run_key(places: dict[str, str], changes: dict[str, Any]) -> str:
    values: dict[str, Any] = {"input": ["in"], "output": "out", "model": "model", "actors": "3"} | changes
    for name in ("model", "adapter", "representation"):
        values |= {name: places[values[name]]} if values.get(name) else {}
    values["input"] = [places[name] for name in values["input"]]
    settings = EmbedSettings.make(values)
    spec = settle(settings).on(gpu=False)
    found, selection = planning.find(settings)
    vectors = np.eye(4, dtype=np.float32)
    calibration = Calibration.measure(vectors, "space") if settings.calibration else None
    return digest(planning.identity(settings, spec, found, selection, calibration))


def test_every_setting_is_classified() -> None:
    assert sorted([*MATTERS, *DOES_NOT, *REFUSED]) == sorted(EmbedSettings.model_fields), "say whether a new setting makes another run"


@pytest.mark.parametrize("name", MATTERS)
def test_a_setting_that_matters_makes_another_run(places: dict[str, str], name: str) -> None:
    assert run_key(places, MATTERS[name]) != run_key(places, BASES.get(name, {}))


@pytest.mark.parametrize("name", DOES_NOT)
def test_a_setting_that_does_not_matter_keeps_the_run(places: dict[str, str], name: str) -> None:
    beside = ONLY_BESIDE.get(name, {})
    assert run_key(places, {name: DOES_NOT[name]} | beside) == run_key(places, beside)


def test_a_revision_of_a_directory_is_refused(places: dict[str, str]) -> None:
    with pytest.raises(ModelError, match="revision"):
        run_key(places, {"revision": "main"})


def test_the_same_model_elsewhere_is_the_same_run(places: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(places["model"], tmp_path / "moved")
    assert run_key(places | {"model": str(tmp_path / "moved")}, {}) == run_key(places, {})


# -- changes, refusals -------------------------------------------------------------------------------


def test_changes_of_a_corpus_are_told_file_by_file(tmp_path: Path, model: Path, corpus: Path) -> None:
    ready = settled(corpus, tmp_path / "out", model)
    assert planning.file_changes(ready.plan, planning.find(ready.settings)[0]) == []
    (corpus / "part-0.parquet").unlink()
    write(corpus / "part-1.parquet", ["changed"], id=["x"])
    write(corpus / "part-9.parquet", ["new"], id=["y"])
    changes = planning.file_changes(ready.plan, planning.find(ready.settings)[0])
    assert [change.rsplit("/", 1)[1] for change in changes] == ["part-0.parquet is gone", "part-9.parquet is new", "part-1.parquet changed"]


def test_a_corpus_of_files_without_rows_is_refused(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "a.parquet", pa.array([], pa.string()))
    with pytest.raises(InputError, match="no rows"):
        settled(tmp_path / "in", tmp_path / "out", model)


def test_many_bad_files_are_counted_and_the_first_named(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "good.parquet", ["x"])
    for number in range(planning.BAD_FILES_SHOWN + 5):
        (tmp_path / "in" / f"bad-{number:02d}.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError) as raised:
        settled(tmp_path / "in", tmp_path / "out", model)
    message = str(raised.value)
    assert message.startswith("25 of 26 files cannot be used:")
    assert message.count("is not a whole Parquet file") == planning.BAD_FILES_SHOWN
    assert "and 5 more" in message
    assert "skip_bad_files" in message
    plan = settled(tmp_path / "in", tmp_path / "out", model, skip_bad_files=True).plan
    assert (len(plan.bad_files), plan.rows) == (25, 1)


def test_a_filter_that_cannot_work_is_refused_before_anything_runs(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "year=2024" / "a.parquet", ["x"])
    for condition in ("nothing = 3", "text = "):
        with pytest.raises(ConfigError, match="filter"):
            settled(tmp_path, tmp_path / "out", model, filter=condition)
    assert settled(tmp_path, tmp_path / "out", model, filter="year >= 2024 AND text <> 'y'").plan.rows == 1


def test_vectors_differ_in_type_but_sizes_follow_the_output_precision(tmp_path: Path, model: Path) -> None:
    """Half the bytes a number, so twice the rows of a shard."""
    corpus = write(tmp_path / "a.parquet", ["x"])
    made = {}
    for dtype in ("float32", "float16"):
        ready = settled(corpus, tmp_path / "out", model, dtype=dtype)
        plan = planned(tmp_path, ready, 100_000, dimension=8192, model_flops=1.0)
        made[dtype] = max(file.rows_per_unit for file in plan.files)
    assert math.isclose(made["float16"], 2 * made["float32"], rel_tol=0.01)
