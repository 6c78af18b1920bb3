"""What a sample of a corpus shows: its tokens before and after the template, its rejects, how much of it is shared.

Invariant: prompts are made by the code that makes those of the run. A figure of the sample stands for the corpus
in proportion to rows. Knows no model beyond its tokenizer, and no hardware.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmemb_ray.corpus import sample
from llmemb_ray.corpus.units import Unit
from llmemb_ray.embedders import capabilities
from llmemb_ray.pipeline.prepare import Job, prepare_unit
from llmemb_ray.representation import Pooling, Prompter, TokenRows
from llmemb_ray.shards import schema
from llmemb_ray.shards.plan import Plan
from llmemb_ray.shards.precision import Precision

Counts = npt.NDArray[np.int64]

ROWS = 2000
"""Rows sampled: the share of texts that are cut is then known to about a percent, and tokenising them takes well under a second."""

FILE_BYTES = 16 * 2**20
"""… but about so much of the files at most: of long documents fewer rows are read."""

ENCODED_BYTES = 4 * 2**20
"""Vectors made up to see how large a shard comes out."""

UNCUT = 2**40
"""A token limit that no text reaches."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """M prompts of R texts, from S rows of the corpus in P places.

    source_rows:  S, before the job's filter
    filtered:     rows of them that the filter leaves out
    reasons:      rejects among them, by reason
    text_tokens:  int64 [R]  tokens of each text alone, without template or special tokens
    uncut_tokens: int64 [M]  length of each prompt before it is cut
    prompts:      M rows of tokens, as the run embeds them
    vectors:      rows that a shard of them has
    truncated:    of those
    columns:      what stands beside the vectors in such a shard [vectors rows]
    place_tokens: int64 [P]  tokens of the prompts of each place
    place_rows:   int64 [P]  rows of each place
    """

    source_rows: int
    filtered: int
    reasons: dict[str, int]
    text_tokens: Counts
    uncut_tokens: Counts
    prompts: TokenRows
    vectors: int
    truncated: int
    columns: pa.Table
    place_tokens: Counts
    place_rows: Counts

    def margin(self, rows: int) -> float:
        """Two standard errors of the tokens of a corpus of ``rows`` rows, estimated from this sample; 0 where it is the corpus.

        Rows of one place are alike, so the places are what counts: the variance is that of a ratio estimator over clusters
        (Cochran, Sampling Techniques, section 9A.1).
        """
        seen, places = self.source_rows, len(self.place_rows)
        if seen >= rows:
            return 0.0
        if places < 2:
            return float(self.place_tokens.sum()) / max(1, seen) * rows
        rest = self.place_tokens - self.place_tokens.sum() / seen * self.place_rows
        variance = (1 - seen / rows) * places / (places - 1) * float(rest @ rest) / seen**2
        return float(2 * rows * np.sqrt(variance))

    def shared(self, prefix: npt.NDArray[np.int32], config: Any, pooling: Pooling, block: int) -> dict[str, Counts]:
        """int64 [M] by backend: leading tokens of each prompt that are not computed, because they stand in the shared prefix.

        hf shares to the token, where it packs; vllm, which caches prefixes only for last-token pooling, in whole blocks of
        ``block`` tokens.
        """
        none = np.zeros(len(self.prompts), np.int64)
        switch = capabilities.rope_switch(config)
        exact = self.prompts.shared(prefix[:switch]) if len(prefix) and capabilities.mode(config) == "packed" else none
        if switch is not None:
            exact = np.where(self.prompts.lengths > switch, 0, exact)
        blocks = self.prompts.shared(prefix) // block * block if len(prefix) and pooling == "last" else none
        return {"hf": exact, "vllm": blocks}

    def shard_bytes(self, dimension: int, precision: Precision, *, vectors: int, units: int) -> int:
        """Bytes of all shards, from one encoded with random vectors in place of real ones."""
        width = schema.vector_bytes(dimension, precision.dtype)
        if not self.vectors:
            return 0
        table = self.columns.slice(0, max(2, ENCODED_BYTES // width))
        generator = np.random.default_rng(0)
        values: npt.NDArray[Any] = generator.integers(0, 255, (table.num_rows, width), np.uint8)
        if precision.dtype == "int8":
            values = values.view(np.int8)
        elif precision.dtype != "ubinary":
            values = generator.standard_normal((table.num_rows, dimension), np.float32)
        table = table.append_column("embedding", schema.embedding_column(values, precision.dtype))
        ranges = "x" * (4 * 2 * 4 * dimension // 3) if Precision.calibrates(precision.dtype, precision.centre) else ""
        metadata = {"run_key": "x" * 64, "space": "x" * 64, "unit": "x" * 19, "attempt": "x" * 12, "calibration": "x" * 64, "ranges_float32": ranges}
        one, all_ = (len(schema.encode_shard(part, metadata, vector_bytes=width)) for part in (table.slice(0, 1), table))
        row = (all_ - one) / (table.num_rows - 1) if table.num_rows > 1 else width
        return round(row * vectors + (one - row) * min(units, vectors))


def take(job: Job, plan: Plan, rows: int | None = None) -> Sampled:
    """Reads and tokenises about ``rows`` rows; None takes ROWS, or fewer of a corpus of long documents. Raises InputError."""
    if rows is None:
        per_row = sum(file.size for file in plan.files if file.problem is None) / max(1, plan.rows)
        rows = max(sample.PLACES, min(ROWS, int(FILE_BYTES / max(per_row, 1.0))))
    chosen = sample.places(plan.files, rows)
    table = sample.read(chosen, job.selection, job.access)
    place_of_row = _place_of_rows(chosen, table)
    table = table.drop_columns([sample.SOURCE_FILE, sample.SOURCE_ROW])
    prepared = prepare_unit(replace(job, selection=replace(job.selection, filter=None)), Unit(0, 0, table.num_rows), table)
    texts, _ = job.selection.texts(table)
    prompter = job.spec.prompter(job.role)
    owner = prepared.accepted["source_row"].to_numpy()
    source_rows = sum(place.rows for place in chosen)
    tokens = prepared.tokens
    fit = [text for row in np.unique(owner) if (text := texts[row]) is not None]
    columns = prepared.accepted.drop_columns("token_ids")
    truncated = int(tokens.truncated.sum())
    if job.chunking and job.chunking.pool == "mean":
        columns = columns.drop_columns(list(schema.CHUNK_COLUMNS)).take(pa.array(np.unique(owner, return_index=True)[1]))
        truncated = len(np.unique(owner[tokens.truncated]))
    return Sampled(
        source_rows=source_rows,
        filtered=source_rows - table.num_rows,
        reasons=dict(Counter(prepared.rejected["reason"].to_pylist())),
        text_tokens=np.array([len(offsets) for offsets in prompter.text_offsets(fit)], np.int64),
        uncut_tokens=_uncut(job, texts, owner, prepared.accepted, tokens),
        prompts=tokens,
        vectors=columns.num_rows,
        truncated=truncated,
        columns=columns,
        place_tokens=np.bincount(place_of_row[owner], tokens.lengths, len(chosen)).astype(np.int64),
        place_rows=np.array([place.rows for place in chosen], np.int64),
    )


def _place_of_rows(chosen: list[sample.Place], table: pa.Table) -> Counts:
    """int64 [rows of the table]: the place that each row was taken from."""
    files, rows = (table[name].to_numpy() for name in (sample.SOURCE_FILE, sample.SOURCE_ROW))
    found = np.zeros(table.num_rows, np.int64)
    for number, place in enumerate(chosen):
        found[(files == place.file.index) & (rows >= place.start) & (rows < place.start + place.rows)] = number
    return found


def _uncut(job: Job, texts: list[str | None], owner: Counts, accepted: pa.Table, tokens: TokenRows) -> Counts:
    """int64 [M]: what the prompts' lengths would be without a limit."""
    lengths = tokens.lengths.copy()
    cut = np.flatnonzero(tokens.truncated)
    if not len(cut):
        return lengths
    spans = [accepted[name].to_numpy()[cut] for name in ("chunk_start", "chunk_end")] if job.chunking else []
    whole = [texts[row] or "" for row in owner[cut]]
    if spans:
        whole = [text[start:end] for text, start, end in zip(whole, *spans, strict=True)]
    unlimited = replace(job.spec.representation, max_tokens=UNCUT)
    prompter = Prompter(unlimited, job.role, tokenizer_json=job.spec.tokenizer.json, eos_id=job.spec.tokenizer.eos_id)
    lengths[cut] = prompter.tokenize(whole)[0].lengths
    return lengths
