"""Export: a run's vectors with their ids, streamed into a directory that another program loads.

Invariant: DEST appears whole, by a rename, or not at all; the order of its rows is that of the corpus. Replaced is
only what an export left, told by its mark. Which form the vectors take is the writers' business.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from llmemb_ray import destination
from llmemb_ray.errors import ConfigError, OutputError
from llmemb_ray.shards.export.rows import Rows
from llmemb_ray.shards.export.writers import Target, faiss_index, hf, lance, npy
from llmemb_ray.shards.run import Run

Form = Literal["npy", "faiss", "lance", "hf"]

WRITERS: dict[Form, Callable[[Rows, Target], str]] = {"npy": npy, "faiss": faiss_index, "lance": lance, "hf": hf}

MARK = "llmemb-export.json"
"""Stands in each exported directory: what it was made of, and that it may be replaced."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    run: str
    run_key: str
    space: str
    """Digest of the vector space: compare these vectors with those of the same space only."""
    model: str
    form: Form
    rows: int
    dimension: int
    dtype: str
    normalized: bool
    """Whether the vectors have norm 1, so that the inner product is the cosine."""
    finished: bool
    """False for what was committed of a run that was still going on."""
    dest: str
    bytes: int = 0
    how_to_load: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export(
    run: Run,
    dest: str,
    *,
    to: Form,
    dtype: Literal["float32", "float16"] | None = None,
    raw: bool = False,
    faiss_factory: str | None = None,
    overwrite: bool = False,
    allow_unfinished: bool = False,
    progress: bool = False,
) -> Exported:
    """Writes the vectors of a run with their ids into ``dest``, a local directory that is empty or not there.

    dtype:            precision of the vectors, default float32; codes and bits are turned back into vectors
    raw:              export values as they are stored instead
    faiss_factory:    index of ``faiss.index_factory``; default Flat, which is exact
    overwrite:        replace an earlier export in ``dest``
    allow_unfinished: export what is committed
    progress:         show a bar, if stderr is a terminal
    Raises ConfigError for what does not fit together or a library that is not installed, OutputError for a run
    that is not finished or a ``dest`` that is in the way.
    """
    if to not in WRITERS:
        raise ConfigError(f"to: {to!r} is none of {', '.join(WRITERS)}")
    if raw and dtype is not None:
        raise ConfigError("raw and dtype exclude each other: raw values keep the dtype of the run")
    if faiss_factory is not None and to != "faiss":
        raise ConfigError(f"faiss_factory: is for faiss; with {to} it does nothing")
    if run.receipt is None and not allow_unfinished:
        raise OutputError(f"{run.url} is not finished; run the embed command again to finish it, or export what is committed with allow_unfinished")
    final = destination.free(dest, mark=MARK, overwrite=overwrite)
    rows = Rows(run, dtype=None if raw else dtype or "float32")
    if not rows.count:
        raise OutputError(f"{run.url} holds no vectors, there is nothing to export")
    about = Exported(
        run=run.url,
        run_key=run.plan.run_key,
        space=run.plan.space_digest,
        model=run.plan.model_name,
        form=to,
        rows=rows.count,
        dimension=run.plan.dimension,
        dtype=rows.dtype,
        normalized=run.plan.representation.normalize and not (raw and run.precision.quantised),
        finished=run.receipt is not None,
        dest=str(final),
    )
    with destination.written(final) as temporary:
        with _bar(rows.count, progress) as written:
            rows.on_rows = written
            how = WRITERS[to](rows, Target(temporary, str(final), faiss_factory))
        rows.require_all()
        size = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        about = replace(about, bytes=size, how_to_load=how)
        calibration = run.precision.calibration.to_dict() if raw and run.precision.quantised and run.precision.calibration else None
        (temporary / MARK).write_text(json.dumps(about.to_dict() | {"calibration": calibration}, indent=1), encoding="utf-8")
    return about


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar of rows on a terminal; gives the function that is told of rows done."""
    console = Console(stderr=True)
    columns = (TextColumn("rows {task.completed:,.0f}/{task.total:,.0f}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task("export", total=total)
        yield lambda rows: progress.advance(task, rows)
