"""Making a plan: the corpus listed, its footers read, its units settled. Needs no cluster and no weights."""

from __future__ import annotations

import importlib.metadata
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from llmemb_ray import __version__, engines
from llmemb_ray.config import EmbedSettings
from llmemb_ray.config.embedding import MAX_TEXT_BYTES
from llmemb_ray.corpus import files as corpus_files
from llmemb_ray.corpus.columns import Selection, filtered
from llmemb_ray.corpus.files import BadFile, Footer, Found
from llmemb_ray.corpus.units import PlannedFile, rows_per_unit
from llmemb_ray.embedders.embedder import EmbedderSpec
from llmemb_ray.errors import InputError
from llmemb_ray.representation.space import digest
from llmemb_ray.shards.plan import Plan
from llmemb_ray.shards.precision import Calibration, Precision
from llmemb_ray.shards.schema import vector_bytes
from llmemb_ray.storage import redact

BYTES_PER_TOKEN = 4.0
"""English text under common vocabularies; only used to size units."""

CPU_FLOPS, GPU_FLOPS = 1e11, 2e14
"""What one actor is assumed to reach when units are sized: some CPU cores in float32, a recent GPU in bfloat16.
A wrong guess makes units longer or shorter than a minute, nothing else."""

UNITS_PER_ACTOR = 4
"""A small corpus is cut into at least so many units an actor, so that all of them have work to the end."""

LEAST_ROWS = 256
"""… but not into units smaller than this."""

BAD_FILES_SHOWN = 20
"""Bad files named in one message."""

PACKAGES = ("ray", "torch", "transformers", "pyarrow", "peft", "bitsandbytes", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of this package and of what makes the vectors; recorded, and warned about when they change."""
    found = {"llmemb_ray": __version__}
    vllm = engines.vllm_version()
    if vllm is not None:
        found["vllm"] = vllm
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def identity(
    settings: EmbedSettings, spec: EmbedderSpec, found: Sequence[Found | PlannedFile], selection: Selection, calibration: Calibration | None
) -> dict[str, Any]:
    """What the run key is made of, known from a listing alone. calibration: that of another run, where its codes are to mean the same."""
    engine: dict[str, Any] = {"backend": spec.backend, "compute_dtype": spec.compute_dtype, "quantization": spec.quantization}
    deciding = {name: value for name, value in spec.engine_args.items() if name not in engines.HARMLESS_ENGINE_ARGS}
    if deciding:
        engine["engine_args"] = deciding
    calibrates = Precision.calibrates(settings.dtype, settings.centre)
    own = "own" if calibrates else None
    return {
        "space": spec.space.to_dict(),
        "engine": engine | {"dtype": settings.dtype, "centre": settings.centre, "calibration": calibration.digest if calibration else own},
        "corpus": {
            "files": digest([[file.url, file.size, file.version] for file in found]),
            "text_column": selection.text,
            "id_column": settings.id_column,
            "keep_columns": list(settings.keep_columns),
            "filter": selection.filter,
            "limit_rows": settings.limit_rows,
            "rows_per_unit": settings.rows_per_unit,
            "role": settings.role,
            "chunk_tokens": settings.chunk_tokens,
            "chunk_overlap": settings.chunk_overlap,
            "chunk_pool": settings.chunk_pool,
        }
        | ({"max_text_bytes": selection.max_bytes} if selection.max_bytes != MAX_TEXT_BYTES else {}),
    }


def find(settings: EmbedSettings) -> tuple[list[Found], Selection]:
    """The corpus as it is listed now. Raises InputError or ConfigError."""
    selection = Selection(
        text=settings.text_column, id=settings.id_column, keep=tuple(settings.keep_columns), filter=settings.filter, max_bytes=settings.max_text_bytes
    )
    return corpus_files.discover(settings.input, settings.access), selection


def file_changes(stored: Plan, found: list[Found]) -> list[str]:
    """How a corpus listed now differs from the one a stored plan was made of, file by file."""
    then = {file.url: (file.size, file.version) for file in stored.files}
    now = {file.url: (file.size, file.version) for file in found}
    changes = [f"{redact(url)} is gone" for url in then if url not in now]
    changes += [f"{redact(url)} is new" for url in now if url not in then]
    changes += [f"{redact(url)} changed" for url in now if url in then and then[url] != now[url]]
    return changes


def in_order_of(stored: Plan, found: list[Found]) -> list[Found]:
    """The files as listed now, in the order of a plan to which files were appended, if it has just these."""
    order = {file.url: file.index for file in stored.files}
    return sorted(found, key=lambda file: order[file.url]) if order.keys() == {file.url for file in found} else found


def make_plan(
    settings: EmbedSettings,
    spec: EmbedderSpec,
    found: list[Found],
    selection: Selection,
    *,
    actors: int,
    gpu: bool,
    calibration: Calibration | None = None,
    appended_to: Plan | None = None,
) -> Plan:
    """Reads every footer and settles the units.

    actors, gpu: what will do the work, to size the units. appended_to: a finished run's plan, whose files stay as they
    are; ``found`` then holds only new ones. Raises InputError naming every bad file.
    """
    footers = corpus_files.footers(found, settings.access)
    partitions = corpus_files.partition_values(found, before=[file.partitions for file in appended_to.files] if appended_to else [])
    first = next((footer for footer in footers if isinstance(footer, Footer)), None)
    if first is not None and appended_to is None:
        selection = selection.with_default_id(first.schema)
    problems: dict[int, str] = {}
    types: dict[str, pa.DataType] | None = None
    of_run = appended_to.column_types if appended_to else None
    for index, footer in enumerate(footers):
        try:
            if isinstance(footer, str):
                raise BadFile(footer)
            here = selection.check(footer.schema, partitions[index])
            if of_run is not None and (named := {name: str(type_) for name, type_ in here.items()}) != of_run:
                raise BadFile(f"has another schema than the run: {_differing(named, of_run, 'in the run')}")
            if types is None:
                types = here
            elif here != types:
                raise BadFile(f"has another schema: {_differing(here, types, 'in the first file')}")
        except BadFile as error:
            problems[index] = str(error)
    if problems and not settings.skip_bad_files:
        raise InputError(_describe(found, problems))
    if types is None:
        raise InputError("no file of the corpus can be read: " + _describe(found, problems))
    if selection.filter and first is not None:
        _check_filter(selection, first, partitions[0])
    before = {file.url: file for file in appended_to.files} if appended_to else {}
    indices = itertools.count(len(before))
    planned: list[PlannedFile] = []
    for file, footer, values in zip(found, footers, partitions, strict=True):
        problem = problems.get(len(planned))
        index = before[file.url].index if file.url in before else next(indices)
        planned.append(_planned(index, file, footer, values, problem, settings, spec, selection, gpu))
    planned = _limited(planned, settings.limit_rows)
    rows = sum(file.rows for file in planned)
    if rows == 0 and appended_to is None:
        raise InputError(f"the corpus has {len(found)} files but no rows; check the input paths")
    if settings.rows_per_unit is None:
        share = max(LEAST_ROWS, -(-rows // (UNITS_PER_ACTOR * max(1, actors))))
        planned = [replace(file, rows_per_unit=min(file.rows_per_unit, share)) for file in planned]
    if appended_to is not None:
        by_index = {file.index: file for file in appended_to.files}
        by_index |= {file.index: replace(file, generation=appended_to.generation + 1) for file in planned}  # A file mended since takes its own place.
        planned = [by_index[index] for index in sorted(by_index)]
    parts = identity(settings, spec, planned, selection, calibration)
    return Plan(
        files=planned,
        earlier_run_keys=[*appended_to.earlier_run_keys, appended_to.run_key] if appended_to else [],
        selection=selection,
        space=parts["space"],
        engine=parts["engine"],
        corpus=parts["corpus"],
        role=settings.role,
        dimension=spec.dimension,
        dtype=settings.dtype,
        id_type=str(types[selection.id]) if selection.id else None,
        kept_types={name: str(types[name]) for name in selection.keep},
        model_name=redact(spec.model.name),
        adapter_name=redact(spec.adapter.name) if spec.adapter else None,
        settings=settings.recorded(),
        versions=versions(),
        created=time.time(),
    )


def _differing(here: dict[str, Any], there: dict[str, Any], where: str) -> str:
    return ", ".join(f"{name} is {here.get(name)} here and {there.get(name)} {where}" for name in {**here, **there} if here.get(name) != there.get(name))


def _planned(
    index: int,
    file: Found,
    footer: Footer | str,
    partitions: dict[str, Any],
    problem: str | None,
    settings: EmbedSettings,
    spec: EmbedderSpec,
    selection: Selection,
    gpu: bool,
) -> PlannedFile:
    known = PlannedFile(index=index, url=file.url, size=file.size, version=file.version, partitions=partitions, problem=problem)
    if problem is not None or isinstance(footer, str):
        return known
    text_bytes = sum(size for path, size in footer.column_bytes.items() if path in selection.text_columns) / max(1, footer.rows)
    assert spec.representation.max_tokens is not None
    template = len(spec.representation.form(settings.role).template)
    tokens = min(spec.representation.max_tokens, (text_bytes + template) / BYTES_PER_TOKEN)
    chunks = 1.0
    if settings.chunk_tokens:
        chunks = max(1.0, text_bytes / BYTES_PER_TOKEN / (settings.chunk_tokens - settings.chunk_overlap))
        tokens = min(tokens, settings.chunk_tokens + template / BYTES_PER_TOKEN)
    held = vector_bytes(spec.dimension, settings.dtype if settings.chunk_pool == "none" else "float32")
    size = settings.rows_per_unit or rows_per_unit(
        text_bytes=text_bytes,
        vector_bytes=chunks * (held + 64),
        flops_per_row=chunks * tokens * spec.model_flops,
        flops_per_second=GPU_FLOPS * settings.tensor_parallel if gpu else CPU_FLOPS,
    )
    return replace(known, group_rows=footer.group_rows, rows=footer.rows, rows_per_unit=size)


def _limited(files: list[PlannedFile], limit: int | None) -> list[PlannedFile]:
    if limit is None:
        return files
    limited = []
    for file in files:
        limited.append(replace(file, rows=min(file.rows, limit)))
        limit -= limited[-1].rows
    return limited


def _check_filter(selection: Selection, footer: Footer, partitions: dict[str, Any]) -> None:
    empty = footer.schema.empty_table()
    for key, value in partitions.items():
        if key not in empty.column_names:
            empty = empty.append_column(key, pa.array([], pa.int64() if isinstance(value, int) else pa.string()))
    filtered(empty, selection.filter or "true")


def _describe(found: list[Found], problems: dict[int, str]) -> str:
    lines = [f"  {redact(found[index].url)}: {problem}" for index, problem in list(problems.items())[:BAD_FILES_SHOWN]]
    more = f"\n  … and {len(problems) - BAD_FILES_SHOWN} more" if len(problems) > BAD_FILES_SHOWN else ""
    way_out = "Mend or remove them, or leave them out with skip_bad_files (the receipt names them)."
    return f"{len(problems)} of {len(found)} files cannot be used:\n" + "\n".join(lines) + more + "\n" + way_out
