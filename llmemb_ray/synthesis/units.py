"""Units of requests, and the attempt at one: answers in, examples checked, shard, rejects and commit out.

Invariant: an attempt writes under names of its own and commits last. Each request of a unit ends as one example or one reject.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from llmemb_ray import parquet
from llmemb_ray.evaluation.contamination import normal
from llmemb_ray.generation.generator import Answer, Prompt
from llmemb_ray.shards.schema import METADATA_KEY
from llmemb_ray.storage import Storage
from llmemb_ray.synthesis import checks, families
from llmemb_ray.synthesis.checks import Example, Problem
from llmemb_ray.synthesis.commits import RECORDS, Made
from llmemb_ray.synthesis.drawing import Draw, Request

DATA, REJECTS = "data", "rejects"

CONTAMINATED = "contaminated"

WRITTEN = re.compile(rf"({DATA}|{REJECTS})/\d{{12}}-[0-9a-f]{{12}}\.parquet")
"""Paths of shards and rejects below OUT."""

_TEXT = pa.string()

_OF_REQUEST = [("family", _TEXT), ("language", _TEXT), ("task", _TEXT), ("placeholders", _TEXT), ("generator", _TEXT), ("seed", pa.int64())]

EXAMPLES = pa.schema(
    [("row", pa.int64()), *((name, _TEXT) for name in ("instruction", "query", "positive", "negative")), *_OF_REQUEST, ("notes", pa.list_(_TEXT))]
)
"""row: of the request; negative: null where the family has none; placeholders: a JSON object; notes: length rules that it breaks."""

REJECT_ROWS = pa.schema([("row", pa.int64()), *_OF_REQUEST, ("raw", _TEXT), ("reason", _TEXT), ("detail", _TEXT)])
"""raw: the answer as it came; of a duplicate the example as JSON."""


@dataclass(frozen=True)
class Unit:
    """Requests ``start`` to ``start + rows``."""

    start: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.start:012d}"


def units(segments: Sequence[int], size: int) -> Iterator[Unit]:
    """segments: counts that the run was asked for one after the other, growing; a unit never spans two."""
    first = 0
    for count in segments:
        for start in range(first, count, size):
            yield Unit(start, min(size, count - start))
        first = max(first, count)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every worker needs to know of the run; plain data, the same for all."""

    draw: Draw
    output: Storage
    run_key: str
    generator: str
    max_characters: int
    """Of one text of an example."""
    strict: bool = False
    check_language: bool = True
    keep_raw: bool = False
    contaminated: frozenset[str] = field(default=frozenset(), repr=False)
    """Texts of evaluation sets, without case and white space."""

    def requests(self, unit: Unit) -> list[Request]:
        return [self.draw.request(row) for row in range(unit.start, unit.start + unit.rows)]

    def prompt(self, request: Request) -> Prompt:
        schema = families.schema(families.FAMILIES[request.family], self.max_characters, request.placeholders)
        return Prompt(text=request.prompt, schema=schema, seed=request.seed)

    def read(self, request: Request, answer: Answer) -> Example | Problem:
        found = checks.read(request, answer, strict=self.strict, check_language=self.check_language)
        if isinstance(found, Example) and self.contaminated:
            labels = request.family == "long-short"  # Labels stand in every classification set.
            for text in (found.query,) if labels else (found.query, found.positive, found.negative):
                if text is not None and normal(text) in self.contaminated:
                    return Problem(CONTAMINATED, f"stands in an evaluation set: {text[:200]!r}")
        return found


def write(work: Work, unit: Unit, requests: Sequence[Request], answers: Sequence[Answer], *, began: float) -> Made:
    """Checks the answers, writes what they give and commits the unit. began: Unix time. Raises StorageError."""
    attempt = uuid.uuid4().hex[:12]
    examples: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    for request, answer in zip(requests, answers, strict=True):
        of_request = {
            "row": request.row,
            "family": request.family,
            "language": request.language,
            "task": request.task,
            "placeholders": json.dumps(request.placeholders, ensure_ascii=False),
            "generator": work.generator,
            "seed": request.seed,
        }
        found = work.read(request, answer)
        if isinstance(found, Problem):
            rejects.append(of_request | {"raw": _storable(answer.text), "reason": found.reason, "detail": _storable(found.detail)})
            continue
        texts = {name: getattr(found, name) for name in ("instruction", "query", "positive", "negative")}
        examples.append(of_request | texts | {"notes": list(found.notes)} | ({"raw": _storable(answer.text)} if work.keep_raw else {}))
    shard = put_examples(
        work.output, work.run_key, unit.name, attempt, _table(examples, EXAMPLES.append(pa.field("raw", _TEXT)) if work.keep_raw else EXAMPLES)
    )
    reject_file = put_rejects(work.output, work.run_key, unit.name, attempt, _table(rejects, REJECT_ROWS))
    now = time.time()
    made = Made(
        unit=unit.name,
        attempt=attempt,
        start=unit.start,
        rows=unit.rows,
        accepted=len(examples),
        rejected=len(rejects),
        reasons=dict(Counter(row["reason"] for row in rejects)),
        notes=dict(Counter(note for row in examples for note in row["notes"])),
        families=dict(Counter(row["family"] for row in examples)),
        languages=dict(Counter(row["language"] for row in examples)),
        **shard,
        **reject_file,
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        completion_tokens=sum(answer.completion_tokens for answer in answers),
        retries=sum(answer.retries for answer in answers),
        seconds=round(now - began, 3),
        finished=now,
        host=socket.gethostname(),
    )
    RECORDS.write(work.output, made)
    return made


def put_examples(output: Storage, run_key: str, unit: str, attempt: str, table: pa.Table) -> dict[str, Any]:
    """Writes a shard, if it has rows; what the commit says of it."""
    return _put(output, DATA, "shard", run_key, unit, attempt, table)


def put_rejects(output: Storage, run_key: str, unit: str, attempt: str, table: pa.Table) -> dict[str, Any]:
    """The same for rejects."""
    return _put(output, REJECTS, "rejects", run_key, unit, attempt, table)


def _put(output: Storage, directory: str, name: str, run_key: str, unit: str, attempt: str, table: pa.Table) -> dict[str, Any]:
    if not table.num_rows:
        return {name: None, f"{name}_bytes": 0, f"{name}_sha256": ""}
    metadata = json.dumps({"run_key": run_key, "unit": unit, "attempt": attempt}, sort_keys=True).encode()
    data = parquet.to_bytes(table.replace_schema_metadata({METADATA_KEY: metadata}))
    path = f"{directory}/{unit}-{attempt}.parquet"
    output.put(path, data)
    return {name: path, f"{name}_bytes": len(data), f"{name}_sha256": hashlib.sha256(data).hexdigest()}


def _storable(text: str | None) -> str | None:
    """Half a surrogate pair, which no file holds, as its escape."""
    return None if text is None else text.encode(errors="backslashreplace").decode()


def _table(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=schema)
