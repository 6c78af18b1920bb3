"""One file of a source, read, checked and written as training rows in parts: the work of one task.

Invariant: parts and their rows depend on the file alone, so that a task done twice writes the same. Memory holds one part.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmemb_ray import parquet
from llmemb_ray.corpus import rows as corpus_rows
from llmemb_ray.mining.equality import key as text_key
from llmemb_ray.storage import Access, Storage, redact
from llmemb_ray.training import sources
from llmemb_ray.training.batches import DIRECTORY
from llmemb_ray.training.sources import Bad, Columns, Distill, Origin, Row

PART_CHARACTERS = 16 * 2**20
"""Of the texts in a part: what a task of the second pass holds."""

PART_ROWS = 65_536

ROWS = pa.schema(
    [
        ("anchor", pa.string()),
        ("positives", pa.list_(pa.string())),
        ("negatives", pa.list_(pa.string())),
        ("teacher", pa.list_(pa.float32())),
        ("scores", pa.list_(pa.float32())),
        ("instruction", pa.string()),
        ("source", pa.string()),
    ]
)
"""instruction: the row's own."""

REJECTS = pa.schema([("source", pa.string()), ("file", pa.string()), *((name, pa.string()) for name in ("column", "reason", "detail")), ("row", pa.int64())])
"""row: in its file, from 0."""


@dataclass(frozen=True, kw_only=True)
class FileTask:
    """number: of the file among all; source: of its source."""

    number: int
    source: int
    origin: Origin
    url: str
    access: Access
    distill: Distill
    hard_negatives: int
    mix_tasks: bool
    keep_anchors: bool
    """Tell the keys of the anchors, which hold-out goes by."""


@dataclass(kw_only=True)
class FileRows:
    """What a file gave. groups: (task, instructions, symmetric, negatives, positive, teacher, scores) by number; group_of: int32, of each row;
    anchors: int64, the key of each row's anchor (mining.equality), or none; parts: (path, rows) of what was written; examples: of rejects by reason.
    """

    read: int = 0
    parts: list[tuple[str, int]] = field(default_factory=list)
    groups: list[tuple[Any, ...]] = field(default_factory=list)
    group_of: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    anchors: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    characters: float = 0.0
    teacher_length: int | None = None


def read_file(task: FileTask, storage: Storage) -> FileRows:
    """Reads a file and writes its rows and rejects. Raises ConfigError, InputError."""
    made, shown = FileRows(), redact(task.url)
    numbers: dict[tuple[Any, ...], int] = {}
    group_of: list[npt.NDArray[np.int32]] = []
    anchors: list[npt.NDArray[np.int64]] = []
    held: list[dict[str, Any]] = []
    own: list[int] = []
    bad: list[dict[str, Any]] = []
    bulk = 0
    columns: Columns
    kind = corpus_rows.kind_of(task.url)

    def choose(names: Any) -> list[str]:
        nonlocal columns
        columns = sources.columns(task.origin, names, task.url, task.distill)
        return columns.names

    @functools.lru_cache(1024)
    def of_row(names: tuple[str, ...]) -> Columns:
        return sources.columns_of_row(task.origin, columns, names, task.distill)

    def flush() -> None:
        nonlocal held, own, bulk
        path = f"{DIRECTORY}/rows/{task.number:06d}-{len(made.parts):06d}.parquet"
        if held:
            storage.put(path, parquet.to_bytes(pa.Table.from_pylist(held, schema=ROWS)))
            made.parts.append((path, len(held)))
            group_of.append(np.array(own, np.int32))
            if task.keep_anchors:
                anchors.append(np.fromiter((text_key(row["anchor"]) for row in held), np.int64, len(held)))
        held, own, bulk = [], [], 0

    def flush_rejects() -> None:
        nonlocal bad
        if bad:
            number = made.reasons.total() - len(bad)
            storage.put(f"{DIRECTORY}/rejects/{task.number:06d}-{number:09d}.parquet", parquet.to_bytes(pa.Table.from_pylist(bad, schema=REJECTS)))
        bad = []

    for number, values in enumerate(corpus_rows.read(task.url, task.access, choose, setting=f"{task.origin.place}.path")):
        made.read += 1
        taken = of_row(tuple(values)) if kind == "JSON lines" else columns
        row = sources.check(values, taken, teacher_length=made.teacher_length, blanks=kind in ("CSV", "TSV"))
        if isinstance(row, Bad):
            bad.append({"source": task.origin.name, "file": shown, "row": number} | vars(row))
            made.reasons[row.reason] += 1
            made.examples.setdefault(row.reason, f"file {shown} row {number}: {row.detail}")
            if len(bad) == PART_ROWS:
                flush_rejects()
            continue
        if row.teacher is not None:
            made.teacher_length = len(row.teacher)
        key = group_key(row, task)
        own.append(numbers.setdefault(key, len(numbers)))
        held.append({name: getattr(row, name) for name in ROWS.names if name != "source"} | {"source": f"{shown} row {number}"})
        made.characters += row.characters
        bulk += len(row.anchor) + sum(map(len, row.positives)) + sum(map(len, row.negatives)) + 4 * len(row.teacher or ())
        if bulk >= PART_CHARACTERS or len(held) == PART_ROWS:
            flush()
    flush()
    flush_rejects()
    made.groups = list(numbers)
    made.group_of = np.concatenate([made.group_of, *group_of])
    made.anchors = np.concatenate([made.anchors, *anchors])
    return made


def group_key(row: Row, task: FileTask) -> tuple[Any, ...]:
    """The values of a Group: rows that have them in common may share a batch.

    With mix_tasks the task is the same for all, and instructions are none of them: each row draws its own. Whether the instruction goes to both
    sides (symmetric), the number of negatives and what a row has beside its anchor still part rows, since a batch has one of each.
    """
    used = min(len(row.negatives), task.hard_negatives) if row.positives else 0
    drawn_together = row.instruction is None and not task.mix_tasks  # A row's own goes with the row.
    instructions = task.origin.instructions if drawn_together else ()
    name = "mixed" if task.mix_tasks else task.origin.name
    return name, instructions, task.origin.symmetric, used, bool(row.positives), row.teacher is not None, row.scores is not None
