"""From a reading task to prepared units: rows read, texts made, prompts tokenised, bad rows set aside.

Invariant: each row of a unit is in exactly one of ``accepted``, ``rejected`` and the filtered count. This runs
on CPU workers while the model runs elsewhere; it needs neither torch nor the model's weights.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmemb_ray.corpus.chunking import Chunking, chunks
from llmemb_ray.corpus.columns import Selection, column, filtered, id_values
from llmemb_ray.corpus.reading import read_units
from llmemb_ray.corpus.sample import Place, places
from llmemb_ray.corpus.units import Piece, PlannedFile, Unit
from llmemb_ray.embedders.embedder import EmbedderSpec
from llmemb_ray.errors import InputError, LlmembError
from llmemb_ray.pipeline import metrics
from llmemb_ray.representation import Prompter, Role, TokenRows
from llmemb_ray.shards.plan import Plan
from llmemb_ray.shards.precision import Precision
from llmemb_ray.shards.reuse import Reuse
from llmemb_ray.shards.schema import CHUNK_COLUMNS, REJECTS
from llmemb_ray.storage import RETRIES, Access, Storage, redact

CALIBRATION_ROWS = 2048
"""Rows of the sample that codes are calibrated with: of values like it, one in a thousand then lies outside the ranges."""


FILTERED_TIMES = 16
"""So many times more rows are read for it where a filter leaves some out."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker needs to know of the run; plain data, the same for all."""

    spec: EmbedderSpec
    selection: Selection
    role: Role
    precision: Precision
    """Without the calibration that the first actor makes."""
    calibrates: bool
    calibration_places: list[Place] = field(repr=False)
    """Rows that a calibration is made of."""
    rows: int
    """Of the corpus."""
    chunking: Chunking | None
    dedup: bool
    reuse: Reuse | None
    run_key: str
    space: str
    output: Storage
    access: Access = field(repr=False)
    """To the corpus."""

    @classmethod
    def of(cls, plan: Plan, spec: EmbedderSpec, output: Storage, access: Access, *, dedup: bool = False, reuse: Reuse | None = None) -> Job:
        role: Role = "query" if plan.role == "query" else "document"
        tokens = plan.corpus["chunk_tokens"]
        return cls(
            spec=spec,
            selection=plan.selection,
            role=role,
            precision=plan.precision(None),
            calibrates=plan.calibrates,
            calibration_places=places(plan.files, CALIBRATION_ROWS * (FILTERED_TIMES if plan.selection.filter else 1), passed_over=plan.rows)
            if plan.calibrates
            else [],
            rows=plan.rows,
            chunking=Chunking(tokens=tokens, overlap=plan.corpus["chunk_overlap"], pool=plan.corpus["chunk_pool"]) if tokens else None,
            dedup=dedup,
            reuse=reuse,
            run_key=plan.run_key,
            space=plan.space_digest,
            output=output,
            access=access,
        )


@dataclass(frozen=True)
class ReadTask:
    """One piece of one file, and which of its units are still to be done."""

    file: PlannedFile
    piece: Piece
    wanted: frozenset[str]

    def to_json(self) -> str:
        file = {name: getattr(self.file, name) for name in ("index", "url", "size", "version", "partitions")}
        units = [[unit.start, unit.rows] for unit in self.piece.units]
        return json.dumps({"file": file, "groups": self.piece.groups, "start": self.piece.start, "units": units, "wanted": sorted(self.wanted)})

    @classmethod
    def from_json(cls, text: str) -> ReadTask:
        data = json.loads(text)
        index = data["file"]["index"]
        units = tuple(Unit(index, start, rows) for start, rows in data["units"])
        return cls(PlannedFile(**data["file"]), Piece(index, tuple(data["groups"]), data["start"], units), frozenset(data["wanted"]))


@dataclass(frozen=True)
class Prepared:
    """One unit, ready for the model.

    accepted: a row for each prompt: source_file, source_row, [id], kept columns, n_tokens, truncated, prompt_hash,
              [chunk, chunk_start, chunk_end], token_ids (list<int32>); the chunks of a text stand one after the other
    rejected: as ``shards.schema.REJECTS``
    error:    why the unit cannot be done at all; then both tables are empty
    """

    unit: Unit
    accepted: pa.Table
    rejected: pa.Table
    filtered: int = 0
    storage_retries: int = 0
    error: str | None = None

    def to_envelope(self) -> pa.Table:
        """One Arrow row, so that Ray can neither glue units together nor cut one."""
        return pa.table(
            {
                "unit": [json.dumps(asdict(self.unit))],
                "accepted": _to_ipc(self.accepted),
                "rejected": _to_ipc(self.rejected),
                "filtered": [self.filtered],
                "storage_retries": [self.storage_retries],
                "error": pa.array([self.error], pa.string()),
            }
        )

    @classmethod
    def from_envelope(cls, envelope: pa.Table) -> Prepared:
        assert envelope.num_rows == 1, f"an envelope holds one unit, not {envelope.num_rows}"
        row = {name: envelope.column(name)[0] for name in envelope.column_names}
        accepted, rejected = (pa.ipc.open_stream(row[name].as_buffer()).read_all() for name in ("accepted", "rejected"))
        return cls(Unit(**json.loads(row["unit"].as_py())), accepted, rejected, row["filtered"].as_py(), row["storage_retries"].as_py(), row["error"].as_py())

    @property
    def tokens(self) -> TokenRows:
        """The accepted rows' token sequences, without a copy."""
        lists = self.accepted.column("token_ids").combine_chunks()
        if isinstance(lists, pa.ChunkedArray):
            lists = pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], lists.type)
        offsets = lists.offsets.to_numpy().astype(np.int64)
        ids = lists.values.to_numpy()[offsets[0] : offsets[-1]] if len(lists) else np.zeros(0, np.int32)
        return TokenRows(ids, offsets - offsets[0], self.accepted.column("truncated").to_numpy())


def _to_ipc(table: pa.Table) -> pa.LargeBinaryArray:
    """A table as the one value of a binary array, without a copy through Python bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue()
    offsets = pa.array([0, data.size], pa.int64()).buffers()[1]
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


_PROMPTERS: dict[tuple[str, Role], Prompter] = {}


def _prompter(job: Job) -> Prompter:
    """The job's prompter, made once a process: parsing a tokenizer takes a good part of a second."""
    key = (job.space, job.role)
    if key not in _PROMPTERS:
        _PROMPTERS[key] = job.spec.prompter(job.role)
    return _PROMPTERS[key]


def prepare(job: Job, task: ReadTask) -> Iterator[Prepared]:
    """The wanted units of a piece. What goes wrong with the file becomes the error of each unit still to come, what goes
    wrong with a unit's own rows (a filter that fails on one, more than fits in memory) the error of that unit alone."""
    RETRIES.take()
    meter = metrics.Meter("embed", job.run_key)
    left = {unit.name: unit for unit in task.piece.units if unit.name in task.wanted}
    try:
        for unit, table in meter.reading(read_units(task.file, task.piece, job.selection, job.access, task.wanted)):
            del left[unit.name]
            if isinstance(table, InputError):
                yield _impossible(unit, table)
                continue
            try:
                with meter.tokenizing():
                    prepared = prepare_unit(job, unit, table)
            except LlmembError as error:
                prepared = _impossible(unit, error)
            except pa.ArrowException as error:
                rows = f"rows {unit.start} to {unit.start + unit.rows} of {redact(task.file.url)}"
                prepared = _impossible(unit, InputError(f"{rows}: {error}; try fewer rows_per_unit"))
            yield prepared
    except LlmembError as error:
        for unit in left.values():
            yield _impossible(unit, error)


def _impossible(unit: Unit, error: LlmembError) -> Prepared:
    return Prepared(unit, pa.table({}), REJECTS.empty_table(), storage_retries=RETRIES.take(), error=str(error))


def prepare_unit(job: Job, unit: Unit, table: pa.Table) -> Prepared:
    """Tokenises the rows of one unit."""
    numbered = table.append_column("__source_row", pa.array(np.arange(unit.start, unit.start + unit.rows)))
    if job.selection.filter:
        numbered = filtered(numbered, job.selection.filter)
    texts, problems = job.selection.texts(numbered)
    prompts = make_prompts(job, texts)
    problems |= prompts.problems
    columns = _row_columns(job.selection, unit, numbered, prompts.owner)
    rows = prompts.rows
    columns["n_tokens"] = pa.array(rows.lengths.astype(np.int32))
    columns["truncated"] = pa.array(rows.truncated)
    columns["prompt_hash"] = prompt_hashes(rows)
    if job.chunking:
        columns |= prompts.chunk_columns
    columns["token_ids"] = pa.LargeListArray.from_arrays(pa.array(rows.offsets), pa.array(rows.ids))
    return Prepared(
        unit,
        pa.table(columns),
        reject_table(unit.file, numbered["__source_row"].to_pylist(), _id_texts(job.selection, numbered), problems),
        filtered=unit.rows - numbered.num_rows,
        storage_retries=RETRIES.take(),
    )


@dataclass(frozen=True)
class Prompts:
    """The prompts of some texts.

    rows:     their tokens
    owner:    int64 [M]  position of each prompt's text
    chunks:   int64 [M, 3]  number of the chunk in its text, first and last+1 character
    problems: position of a text without prompts -> (reason, detail)
    """

    rows: TokenRows
    owner: npt.NDArray[np.int64]
    chunks: npt.NDArray[np.int64]
    problems: dict[int, tuple[str, str]]

    @property
    def chunk_columns(self) -> dict[str, pa.Array]:
        number, start, end = self.chunks.T
        return dict(zip(CHUNK_COLUMNS, (pa.array(number.astype(np.int32)), pa.array(start), pa.array(end)), strict=True))


def make_prompts(job: Job, texts: list[str | None]) -> Prompts:
    """Prompts of the texts that are not None, or of their chunks; a text is left out whole if one of its chunks is unfit."""
    prompter = _prompter(job)
    good = [position for position, text in enumerate(texts) if text is not None]
    whole = [text for text in texts if text is not None]
    if job.chunking:
        spans = [chunks(text, offsets, job.chunking) for text, offsets in zip(whole, prompter.text_offsets(whole), strict=True)]
    else:
        spans = [[(0, len(text))] for text in whole]
    owner = [position for position, cut in zip(good, spans, strict=True) for _ in cut]
    rows, unfit = prompter.tokenize([text[start:end] for text, cut in zip(whole, spans, strict=True) for start, end in cut])
    numbers = np.array([(number, start, end) for cut in spans for number, (start, end) in enumerate(cut)], np.int64).reshape(-1, 3)
    problems: dict[int, tuple[str, str]] = {}
    for prompt, problem in enumerate(unfit):
        if problem is not None:
            detail = f"chunk {numbers[prompt, 0]}: {problem.detail}" if job.chunking else problem.detail
            problems.setdefault(owner[prompt], (problem.reason, detail))
    if not problems:
        return Prompts(rows, np.asarray(owner, np.int64), numbers, problems)
    fit = [prompt for prompt, position in enumerate(owner) if position not in problems]
    return Prompts(rows.take(fit), np.asarray(owner, np.int64)[fit], numbers[fit], problems)


def prompt_hashes(rows: TokenRows) -> pa.FixedSizeBinaryArray:
    """BLAKE2b of each row's token ids (int32, little-endian), 16 bytes: in one space, equal hashes are equal vectors."""
    ids = rows.ids.astype("<i4", copy=False)
    data = [hashlib.blake2b(ids[start:end].tobytes(), digest_size=16).digest() for start, end in itertools.pairwise(rows.offsets.tolist())]
    return pa.array(data, pa.binary(16))


def _row_columns(selection: Selection, unit: Unit, numbered: pa.Table, rows: Any) -> dict[str, Any]:
    place = pa.array(rows)
    columns: dict[str, Any] = {}
    if selection.id:
        columns["id"] = column(numbered, selection.id).take(place)
    columns["source_file"] = pa.array(np.full(len(rows), unit.file, np.int32))
    columns["source_row"] = numbered["__source_row"].take(place)
    return columns | {name: column(numbered, name).take(place) for name in selection.keep}


def _id_texts(selection: Selection, table: pa.Table) -> list[Any] | None:
    return id_values(column(table, selection.id)) if selection.id else None


def reject_table(file: int, source_rows: list[int], ids: list[Any] | None, problems: dict[int, tuple[str, str]]) -> pa.Table:
    """Rejects of a unit. problems: position in ``source_rows`` -> (reason, detail)."""
    order = sorted(problems)
    ids_text = [None if ids is None or ids[row] is None else str(ids[row]) for row in order]
    return pa.table(
        {
            "source_file": [file] * len(order),
            "source_row": [source_rows[row] for row in order],
            "id": ids_text,
            "reason": [problems[row][0] for row in order],
            "detail": [problems[row][1] for row in order],
        },
        schema=REJECTS,
    )
