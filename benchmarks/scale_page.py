"""The page docs/scale.md, from what was measured (records/scale.json) and what is assumed (``ASSUMED`` below).

Invariant: a figure on the page is a measurement of the record, an assumption that the page names, or arithmetic of both with the functions that
``llmemb plan`` reckons with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from llmemb_ray.corpus.units import SHARD_BYTES, PlannedFile, rows_per_unit
from llmemb_ray.embedders import models
from llmemb_ray.pipeline import planning
from llmemb_ray.pipeline.estimates import costs, gpus, text
from llmemb_ray.pipeline.estimates.estimate import UTILIZATION
from llmemb_ray.shards.schema import vector_bytes

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
ROWS = (10**9, 10**11)
TOKENS = (100, 500)
DTYPES = ("float32", "float16", "int8")
DAYS = 30
KEEP: Any = {"break_long_words": False, "break_on_hyphens": False}
DRIVER, PLANNING, RESUME, BUSY = "driver-10000", "planning-100000", "resume-100000", "busy-8"
"""The parts that the page is reckoned from."""


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What is not measured here. Prices in USD, of AWS S3 standard in us-east-1 as everybody pays for the first tiers."""

    gpu: str = "H100"
    file_rows: int = 1_000_000
    group_rows: int = 100_000
    text_bytes_per_token: float = planning.BYTES_PER_TOKEN
    put_1000: float = 0.005
    """Also LIST."""
    get_1000: float = 0.0004
    """Also HEAD; DELETE costs nothing."""
    gb_month: float = 0.021
    load_seconds: float = 120.0
    """Of an actor, from its start to its first unit."""
    node_gpus: int = 8


ASSUMED = Assumed()


def configs() -> dict[str, Any]:
    """The shapes of Qwen3-0.6B, Mistral-7B and OPT-66B, from their published configurations."""
    from transformers import MistralConfig, OPTConfig, Qwen3Config

    small = {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072}
    large = {"hidden_size": 9216, "num_hidden_layers": 64, "num_attention_heads": 72, "ffn_dim": 36864, "word_embed_proj_dim": 9216, "vocab_size": 50272}
    return {"0.6B": Qwen3Config(vocab_size=151936, **small), "7B": MistralConfig(sliding_window=None), "66B": OPTConfig(**large)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A corpus, a model and a precision, and what follows. Fields ending in ``_s`` are of one actor."""

    name: str
    rows: int
    tokens: int
    dtype: str
    dimension: int
    flops: float
    gpus_per_actor: int
    gpu_hours: tuple[float, float]
    rows_per_unit: int
    units: int
    fewest_units: int
    """With ``rows_per_unit`` set to what fills a shard."""
    files: int
    groups: int
    vector_bytes: int

    @property
    def gpu_price(self) -> float:
        return gpus.find(ASSUMED.gpu).price

    def actors_in(self, days: float) -> float:
        """At the middle of the assumed shares of a GPU's rate."""
        return sum(self.gpu_hours) / 2 / (24 * days) / self.gpus_per_actor

    @property
    def unit_seconds(self) -> float:
        return sum(self.gpu_hours) / 2 * 3600 / self.gpus_per_actor / self.units


def case(name: str, config: Any, rows: int, tokens: int, dtype: str) -> Case:
    lengths, none = np.array([tokens], np.int64), np.zeros(1, np.int64)
    flops_row = models.flops_per_token(config) * tokens + costs.attention_flops(config, lengths, none)
    gpu = gpus.find(ASSUMED.gpu)
    weights = 2.0 * models.parameters(config)
    held = vector_bytes(config.hidden_size, dtype)
    per_unit = rows_per_unit(
        text_bytes=tokens * ASSUMED.text_bytes_per_token,
        vector_bytes=held + 64,
        flops_per_row=models.flops_per_token(config) * tokens,
        flops_per_second=planning.GPU_FLOPS * costs.gpus_needed(weights, gpu),  # As with --tensor-parallel.
    )
    groups = ASSUMED.file_rows // ASSUMED.group_rows
    one = PlannedFile(index=0, url="", size=0, version="", group_rows=(ASSUMED.group_rows,) * groups, rows=ASSUMED.file_rows, rows_per_unit=per_unit)
    full = replace(one, rows_per_unit=SHARD_BYTES // (held + 64))
    files = rows // ASSUMED.file_rows
    hours = [rows * flops_row / (gpu.bf16 * share) / 3600 for share in (UTILIZATION[1], UTILIZATION[0])]
    units = sum(1 for _ in one.units()) * files
    return Case(
        name=name,
        rows=rows,
        tokens=tokens,
        dtype=dtype,
        dimension=config.hidden_size,
        flops=rows * flops_row,
        gpus_per_actor=costs.gpus_needed(weights, gpu),
        gpu_hours=(hours[0], hours[1]),
        rows_per_unit=rows // units,
        units=units,
        fewest_units=sum(1 for _ in full.units()) * files,
        files=files,
        groups=files * sum(1 for _ in one.pieces()),
        vector_bytes=rows * held,
    )


@dataclass(frozen=True, kw_only=True)
class Head:
    """What the head takes, from the record: per unit, row group, file."""

    driver_ms_per_unit: float
    gcs_raylet_ms_per_unit: float
    ledger_ms_per_unit: float
    window_kb_per_unit: float
    kept_kb_per_unit: float
    """From one window to the next."""
    base_mb: float
    plan_kb_per_file: float
    plan_ms_per_file: float
    resume_kb_per_commit: float
    resume_ms_per_commit: float
    finish_kb_per_commit: float
    finish_ms_per_commit: float

    @classmethod
    def of(cls, parts: dict[str, Any]) -> Head:
        run, plan, resumed = (parts[name] for name in (DRIVER, PLANNING, RESUME))
        tops = run["driver_mb_most_by_window"]
        cpu, commits, new = run["cpu_ms_per_unit"], resumed["commits"], resumed["of_a_new_run"]
        return cls(
            driver_ms_per_unit=cpu["driver"],
            gcs_raylet_ms_per_unit=cpu["gcs"] + cpu["raylet"],
            ledger_ms_per_unit=cpu["ledger"],
            window_kb_per_unit=max(0.0, *run["driver_kb_per_unit_by_window"]),
            kept_kb_per_unit=max(0.0, 1024 * (tops[-1] - tops[0]) / ((len(tops) - 1) * run["window_units"])),
            base_mb=run["driver_mb_first"],
            plan_kb_per_file=max(plan["mb_more_at_the_peak"].values()) * 1024 / plan["files"],
            plan_ms_per_file=1000 * sum(plan["cpu_seconds"].values()) / plan["files"],
            resume_kb_per_commit=max(0.0, 1024 * (resumed["driver_mb_to_the_first_unit"] - new["driver_mb_to_the_first_unit"]) / commits),
            resume_ms_per_commit=1000 * (resumed["driver_cpu_seconds_to_the_first_unit"] - new["driver_cpu_seconds_to_the_first_unit"]) / commits,
            finish_kb_per_commit=max(0.0, 1024 * (resumed["finish_driver_mb"] - new["driver_mb_to_the_first_unit"]) / commits),
            finish_ms_per_commit=1000 * resumed["finish_driver_cpu_seconds"] / commits,
        )

    def units_per_second(self, share: float = 0.95) -> float:
        """That one core of the driver schedules."""
        return share * 1000 / self.driver_ms_per_unit

    def memory_gb(self, case: Case, units: int) -> tuple[float, float]:
        """(while it works, when it finishes)"""
        base = self.base_mb / 1024 + case.files * self.plan_kb_per_file / 2**20
        return base + (4000 * self.window_kb_per_unit + units * self.kept_kb_per_unit) / 2**20, base + units * self.finish_kb_per_commit / 2**20


def per_request(parts: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Billed requests (PUT with LIST, GET with HEAD) of a unit and of a row group, by difference of three runs; heartbeats of the lease left out."""
    runs = parts["requests"]["runs"]

    def billed(run: dict[str, Any]) -> dict[str, int]:
        found = {"put": 0, "get": 0}
        for name, count in run["requests"].items():
            operation, about = name.split(" ", 1)
            if "lease" not in about and not operation.startswith("Delete"):
                found["put" if operation.startswith(("Put", "List")) else "get"] += count
        return found

    base, more_units, more_groups = (billed(run) for run in runs)
    units = {kind: (more_units[kind] - base[kind]) / (runs[1]["units"] - runs[0]["units"]) for kind in base}
    groups = {
        kind: (more_groups[kind] - base[kind] - units[kind] * (runs[2]["units"] - runs[0]["units"])) / (runs[2]["row_groups"] - runs[0]["row_groups"])
        for kind in base
    }
    return units, groups


def table(header: str, rows: list[str]) -> str:
    """Cells stand between `` | ``."""
    return "".join(f"| {line} |\n" for line in (header, " | ".join(["---"] * len(header.split(" | "))), *rows))


def count(value: float) -> str:
    return text.quantity(value).replace(" ", " ")


def near(value: float) -> str:
    """Two digits that say something."""
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 10 else f"{value:.2g}"


def span(values: tuple[float, float], factor: float = 1.0) -> str:
    return f"{near(values[0] * factor)} to {near(values[1] * factor)}"


def money(value: float) -> str:
    return near(value) if value >= 1 else f"{value:.2f}"


def wrapped(markdown: str) -> str:
    """Paragraphs and list items on lines of one width; tables and headings as they are."""
    blocks = []
    for block in filter(None, (part.strip("\n") for part in markdown.split("\n\n"))):
        if block.startswith(("|", "#")):
            blocks.append(block)
        else:
            items = re.split(r"\n(?=- )", block)
            blocks.append("\n".join(fill(" ".join(item.split()), 170, subsequent_indent="  " * item.startswith("- "), **KEEP) for item in items))
    return "\n\n".join(blocks) + "\n"


def assumptions() -> str:
    """The last section."""
    gpu = gpus.find(ASSUMED.gpu)
    rows = [
        f"GPU | {gpu.name}: {gpu.bf16 / 1e12:,.0f} TFLOP/s dense bf16, {gpu.memory / 1e9:.0f} GB, {gpu.price:.2f} USD an hour | "
        f"{gpu.rate_from}; {gpu.price_from}, {gpus.PRICED}",
        f"share of its rate | {UTILIZATION[0]:.0%} to {UTILIZATION[1]:.0%} | as `llmemb plan`; not measured for this package",
        "models | shapes of Qwen3-0.6B, Mistral-7B, OPT-66B | their published configurations",
        f"tokens a row | {' and '.join(map(str, TOKENS))} | some sentences, and a page; all rows alike",
        f"bytes a token of text | {ASSUMED.text_bytes_per_token:g} | as `llmemb plan`",
        f"files | {ASSUMED.file_rows:,} rows, row groups of {ASSUMED.group_rows:,} | a guess at what such corpora have",
        f"requests, USD a thousand | PUT and LIST {ASSUMED.put_1000}, GET and HEAD {ASSUMED.get_1000} | S3 standard, us-east-1, from memory: check",
        f"storage, USD a GB and month | {ASSUMED.gb_month} | the same, beyond 500 TB",
        f"loading a model | {ASSUMED.load_seconds:.0f} s | a guess; weights on the node's disk",
    ]
    return f"""## What is assumed

Change them in `benchmarks/scale_page.py` and write the page again.

{table("what | value | from", rows)}
Not in any figure: traffic between regions, machines that start, work repeated after a spot machine is lost (at most what its actors were at),
reading the vectors afterwards, a network slower than
the vectors come (last table above).
"""


def write(record: dict[str, Any]) -> None:
    from benchmarks.scale_text import page

    lacking = [name for name in (DRIVER, PLANNING, RESUME, "requests", BUSY) if name not in record["parts"]]
    if lacking:
        raise SystemExit(f"the record lacks parts that the page rests on; first: python benchmarks/scale.py --only {' '.join(lacking)}")
    PAGE.write_text(page(record["parts"]), encoding="utf-8")
