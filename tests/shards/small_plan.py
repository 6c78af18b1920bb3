"""Plans and commits made by hand, for tests that need no model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmemb_ray.corpus.columns import Selection
from llmemb_ray.corpus.units import PlannedFile, Unit
from llmemb_ray.representation.representation import Representation
from llmemb_ray.shards.commits import Commit
from llmemb_ray.shards.plan import Plan


def small_plan(**changes: Any) -> Plan:
    """Two files of 30 and 25 rows in units of at most 10, and one left out."""
    files = [
        PlannedFile(index=0, url="/in/a.parquet", size=100, version="mtime:1.5", group_rows=(15, 15), rows=30, rows_per_unit=10),
        PlannedFile(index=1, url="/in/year=2024/b.parquet", size=200, version="etag:x", group_rows=(25,), rows=25, rows_per_unit=10, partitions={"year": 2024}),
        PlannedFile(index=2, url="/in/c.parquet", size=0, version="etag:y", problem="is empty (0 bytes)"),
    ]
    from llmemb_ray.representation.representation import preset

    document, query, append_eos = preset("prompteol", demonstrations=(), instruction=None, role="document", clean="none")
    representation = Representation(document=document, query=query, append_eos=append_eos, max_tokens=64)
    plan = Plan(
        files=files,
        selection=Selection(text="{year} {text}", id="id", keep=("lang", "year"), filter="lang = 'en'"),
        space={"representation": representation.to_dict(), "model": "m" * 64, "adapter": None, "tokenizer": "t" * 64},
        engine={"backend": "hf", "compute_dtype": "float32", "quantization": "none", "dtype": "float32", "centre": False, "calibration": None},
        corpus={
            "files": "f" * 64,
            "text_column": "{year} {text}",
            "limit_rows": None,
            "role": "document",
            "chunk_tokens": None,
            "chunk_overlap": 0,
            "chunk_pool": "none",
        },
        role="document",
        dimension=4,
        dtype="float32",
        id_type="string",
        kept_types={"lang": "string", "year": "int64"},
        model_name="small",
        settings={"prompt": "prompteol"},
        versions={"torch": "2.13.0"},
        created=1234.5678,
    )
    return replace(plan, **changes)


def commit_of(unit: Unit, **changes: Any) -> Commit:
    """A commit that embeds all rows but one, which it rejects."""
    values: dict[str, Any] = {
        "unit": unit.name,
        "attempt": "a" * 12,
        "file": unit.file,
        "start": unit.start,
        "rows": unit.rows,
        "embedded": unit.rows - 1,
        "rejected": 1,
        "vectors": changes.get("embedded", unit.rows - 1),
        "shard": f"data/{unit.name}-{'a' * 12}.parquet",
        "shard_bytes": 100,
        "shard_sha256": "0" * 64,
        "rejects": f"rejects/{unit.name}-{'a' * 12}.parquet",
        "reasons": {"null": 1},
        "tokens": 7 * unit.rows,
        "token_budget": 512,
    }
    return Commit(**(values | changes))
