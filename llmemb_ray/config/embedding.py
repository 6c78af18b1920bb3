"""Settings of the embedding job, of its plan, and of the comparison of its engines."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from llmemb_ray.config.base import ClusterSettings, ModelSettings, setting
from llmemb_ray.storage import redact

MAX_TEXT_BYTES = 16 * 2**20
"""Bytes of a text at most, if not set: some ten books. To be cut into chunks, one of 16 MiB takes the tokenizer 2 GB of memory."""


class EmbedSettings(ClusterSettings):
    """The embedding job."""

    input: list[str] = setting(..., "Parquet file, directory or glob; local or URL; several of them.", panel="Corpus", argument=True)
    output: str = setting(..., "Directory or URL prefix of the run.", panel="Corpus", argument=True)
    text_column: str = setting("text", "Column of the text (a.b for a nested one), or a template such as '{title} {text}'.", panel="Corpus")
    id_column: str | None = setting(None, "Column of the id; default: 'id' where there is one.", panel="Corpus")
    keep_columns: list[str] = setting([], "Columns copied into the shards, separated by commas.", panel="Corpus", commas=True)
    filter: str | None = setting(None, "SQL condition on the columns; other rows are left out (needs duckdb).", panel="Corpus")
    limit_rows: int | None = setting(None, "Only the first N rows of the corpus.", panel="Corpus", ge=1)
    max_text_bytes: int = setting(
        MAX_TEXT_BYTES,
        "A row whose text, id or kept value (all of a list or struct) is larger is rejected (too_large) before it takes a worker's memory.",
        panel="Corpus",
        ge=1,
        le=2**30,
    )
    skip_bad_files: bool = setting(False, "Leave out files that cannot be read, and name them in the receipt.", panel="Corpus")
    chunk_tokens: int | None = setting(None, "Cut texts into chunks of at most N tokens, at sentence or word borders.", panel="Corpus", ge=1)
    chunk_overlap: int = setting(0, "Tokens that a chunk repeats from the one before; at most half of chunk_tokens.", panel="Corpus", ge=0)
    chunk_pool: Literal["none", "mean"] = setting("none", "One vector a chunk (none), or one a document: the mean of its chunks' vectors.", panel="Corpus")
    dedup: Literal["none", "exact"] = setting("none", "exact: embed identical prompts once and copy the vector.", panel="Corpus")
    append: bool = setting(False, "Add the files of INPUT that the finished run in OUTPUT does not have yet.", panel="Corpus")
    reuse: str | None = setting(None, "Earlier run in the same space: copy the vectors of prompts that it has already.", panel="Corpus")

    dtype: Literal["float32", "float16", "int8", "ubinary"] = setting("float32", "Precision of the vectors written.", panel="Output")
    centre: bool = setting(False, "ubinary: take the bits against the mean of a sample, not against zero.", panel="Output")
    calibration: str | None = setting(
        None, "int8, centred ubinary: take the ranges of this run, not of a sample of the corpus, so that both runs' codes mean the same.", panel="Output"
    )
    overwrite: bool = setting(False, "Delete the run that stands in OUTPUT first.", panel="Output")
    max_reject_rate: float = setting(0.01, "Largest share of rejected rows for exit code 0.", panel="Output", ge=0, le=1)
    reject_floor: int = setting(10, "So many rejected rows never fail a run, however small it is.", panel="Output", ge=0)
    max_nan: int = setting(0, "Largest number of rows whose vector is not finite for exit code 0.", panel="Output", ge=0)
    rows_per_unit: int | None = setting(None, "Rows in a unit; default: about a minute of one actor, at most 128 MB.", panel="Output", ge=1)

    window_units: int | None = setting(
        None, "Units in one Ray Data execution, which bounds what the driver holds; default: 4000, or 200 an actor if that is more.", panel="Cluster", ge=1
    )
    stall_timeout: float = setting(
        600.0, "Seconds without progress after which an actor that computes is ended and its unit tried again; loading does not count.", panel="Cluster", ge=5
    )
    stop_grace: float = setting(
        100.0, "Seconds that units which are begun may take to be committed after SIGTERM or Ctrl-C; then the job ends without them.", panel="Cluster", ge=0
    )
    deadline: str | None = setting(None, "Stop cleanly in time for this: 90m, 6h, 2d, or 2026-12-31T06:00 (local time unless it says).", panel="Cluster")
    max_cost: float | None = setting(None, "Stop cleanly before this command has cost so much; needs a price.", panel="Cluster", gt=0)
    price: float | None = setting(None, "Price of one GPU for an hour (of one actor, where there are no GPUs), in any currency.", panel="Cluster", gt=0)

    check_parity: int | None = setting(
        None, "Compare so many rows with plain float32 inference first, and stop if they differ beyond the bounds (docs/parity.md).", panel="Check", ge=2
    )
    accept_backend_change: bool = setting(
        False, "Continue a run on another backend than it was begun with, if its rows agree (needs check_parity).", panel="Check"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.input:
            raise ValueError("input: no file, directory or glob given")
        if self.chunk_tokens is None and (self.chunk_overlap or self.chunk_pool != "none"):
            raise ValueError("chunk_overlap and chunk_pool do nothing without chunk_tokens; give it")
        if self.chunk_tokens is not None and self.chunk_overlap > self.chunk_tokens // 2:
            raise ValueError(f"chunk_overlap: {self.chunk_overlap} is more than half of chunk_tokens={self.chunk_tokens}")
        if self.centre and self.dtype != "ubinary":
            raise ValueError(f"centre: is for dtype ubinary; with {self.dtype} it does nothing")
        if self.calibration and not (self.dtype == "int8" or self.centre):
            raise ValueError("calibration: is for dtype int8, or ubinary with centre; else nothing is calibrated")
        if self.accept_backend_change and (self.check_parity is None or self.append):
            raise ValueError("accept_backend_change: needs check_parity, the number of rows that both backends are compared on, and goes without append")
        if self.append and self.overwrite:
            raise ValueError("append and overwrite exclude each other")
        if self.append and self.limit_rows:
            raise ValueError("limit_rows: the first rows of a corpus that grows are not one set; leave it out with append")
        if self.max_cost is not None and self.price is None:
            raise ValueError("max_cost: needs the price of a GPU hour; give price")
        if self.deadline is not None:
            parse_deadline(self.deadline, now=0.0)
        return self

    def recorded(self) -> dict[str, Any]:
        """The settings as they may stand in a plan: without storage options, URLs redacted."""
        data = self.model_dump(mode="json", exclude={"storage_options"})
        data["input"] = [redact(url) for url in self.input]
        for name in ("output", "endpoint_url", "model", "adapter", "ray_address", "reuse", "calibration"):
            if data[name]:
                data[name] = redact(data[name])
        return data


class PlanSettings(EmbedSettings):
    """The embedding job, and what its cost is estimated with."""

    gpu: str | None = setting(None, "GPU to reckon with: L4, A10G, A100, H100, H200 or B200; default: a line for each.", panel="Estimate")
    throughput: float | None = setting(
        None, "Prompt tokens that one GPU embeds in a second (one actor, where there are no GPUs), measured; in place of a GPU's rate.", panel="Estimate", gt=0
    )
    utilization: str = setting("0.3:0.6", "Share of its dense bf16 rate that a GPU reaches: X, or LOW:HIGH.", panel="Estimate")
    sample_rows: int | None = setting(None, "Rows read to estimate tokens; default: 2000, fewer of long documents.", panel="Estimate", ge=1)

    @field_validator("utilization", mode="before")
    @classmethod
    def _utilization(cls, value: Any) -> Any:
        parse_utilization(str(value))
        return str(value)


class ParitySettings(ModelSettings):
    """The engines compared with one-by-one inference."""

    input: list[str] = setting([], "Parquet file, directory or glob to sample; default: texts that are built in.", panel="Corpus", argument=True)
    text_column: str = setting("text", "Column of the text (a.b for a nested one), or a template such as '{title} {text}'.", panel="Corpus")
    filter: str | None = setting(None, "SQL condition on the columns; other rows are left out (needs duckdb).", panel="Corpus")
    sample: int = setting(64, "Rows compared, from places spread evenly over INPUT; of the built-in texts the first ones.", panel="Check", ge=2)
    seed: int = setting(0, "Seed of the shuffled order.", panel="Check", ge=0)
    reference_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "Precision of the inference compared with; bfloat16 for a model too large for float32.", panel="Check"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.input and self.model_fields_set & {"text_column", "filter"}:
            raise ValueError("text_column and filter do nothing without INPUT; give it")
        return self


def parse_utilization(text: str) -> tuple[float, float]:
    """``(least, most)`` of ``X`` or ``LOW:HIGH``, shares of 1. Raises ValueError."""
    try:
        low, _, high = text.partition(":")
        least, most = float(low), float(high or low)
    except ValueError:
        raise ValueError(f"{text!r} is neither a share such as 0.4 nor a range such as 0.3:0.6") from None
    if not 0 < least <= most <= 1:
        raise ValueError(f"{text!r}: shares lie above 0 and up to 1, the lower first (0.3:0.6)")
    return least, most


_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smhd])+")
_DURATION_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def is_duration(text: str) -> bool:
    """Whether a deadline is so long from now, and not a time."""
    return _DURATION.fullmatch(text.strip()) is not None


def parse_deadline(text: str, *, now: float) -> float:
    """Unix time of a deadline: so long after ``now``, or a date and time. Raises ValueError."""
    if is_duration(text):
        parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
        return now + sum(float(number) * _DURATION_SECONDS[unit] for number, unit in parts)
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except ValueError:
        raise ValueError(f"deadline: {text!r} is neither a duration such as 90m, 6h or 1d12h nor a time such as 2026-12-31T06:00") from None
