"""The plan in figures: the same as what the run then does, with nothing written and no weights loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmemb_ray.config import EmbedSettings
from llmemb_ray.errors import InputError
from llmemb_ray.pipeline.preview import preview
from llmemb_ray.storage import Storage
from tests.small_jobs import embed, opened, rows_of, write


def settings_of(corpus: Path, output: Path, model: Path, **settings: Any) -> EmbedSettings:
    return EmbedSettings.make({"input": [str(corpus)], "output": str(output), "model": str(model), "actors": "0"} | settings)


@pytest.mark.parametrize("settings", [{}, {"dtype": "float16", "dimensions": 8, "rows_per_unit": 7}, {"limit_rows": 50, "pooling": "mean"}])
def test_the_preview_says_what_the_run_then_does(tmp_path: Path, model: Path, corpus: Path, settings: dict[str, Any]) -> None:
    seen = preview(settings_of(corpus, tmp_path / "out", model, **settings))
    assert not (tmp_path / "out").exists()
    receipt = embed(corpus, tmp_path / "out", model, **settings)
    plan = opened(tmp_path / "out").plan
    assert (seen["rows"], seen["units"], seen["space"]) == (receipt.rows_read, receipt.units, receipt.space)
    assert (seen["files"], seen["bad_files"], seen["id_column"]) == (3, 0, "id")
    assert seen["bytes"] == sum(path.stat().st_size for path in corpus.iterdir())
    embedding = rows_of(tmp_path / "out")["embedding"].type
    assert seen["dimensions"] == embedding.list_size
    assert seen["vector_bytes"] == seen["rows"] * embedding.list_size * embedding.value_type.bit_width // 8
    assert seen["max_tokens"] == plan.representation.max_tokens == 256
    assert json.loads(json.dumps(seen)) == seen


def test_the_preview_needs_no_weights_and_shows_the_template(tmp_path: Path, model: Path, corpus: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in model.iterdir():
        if path.suffix == ".json":
            (bare / path.name).write_bytes(path.read_bytes())
    seen = preview(settings_of(corpus, tmp_path / "out", bare, prompt="e5", instruction="Find it", role="query"))
    assert seen["template"] == "Instruct: Find it\nQuery: {text}"
    assert seen["shared_prefix_tokens"] > 4
    assert Storage(str(tmp_path / "out")).list() == []


def test_the_preview_refuses_what_the_run_would_refuse(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "a.parquet", ["x"])
    (tmp_path / "in" / "b.parquet").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"b\.parquet"):
        preview(settings_of(tmp_path / "in", tmp_path / "out", model))
    assert preview(settings_of(tmp_path / "in", tmp_path / "out", model, skip_bad_files=True))["bad_files"] == 1
