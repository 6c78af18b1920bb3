"""Checking a run from its files alone.

``quick``   plan, commits and receipt agree; every file they name is there with its size, and no other
``sample``  and the contents of some units: checksums, schema, rows, vectors
``full``    and of all units; ids are unique in the run
With the corpus at hand (``against``): each of its rows is in exactly one of data and rejects, under its own id.

Invariant: nothing proportional to the rows is held in memory; ids are told apart by hash partitions on disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmemb_ray import parquet
from llmemb_ray.corpus import files as corpus_files
from llmemb_ray.corpus.columns import column, id_values
from llmemb_ray.corpus.reading import read_units
from llmemb_ray.errors import InputError, LlmembError, NotFound, OutputError, RunFailed
from llmemb_ray.shards import findings as generic
from llmemb_ray.shards import schema
from llmemb_ray.shards.commits import Commit
from llmemb_ray.shards.findings import Checked, Level
from llmemb_ray.shards.partitions import Partitions, id_digests, sortable
from llmemb_ray.shards.receipt import make_receipt, reconcile
from llmemb_ray.shards.run import Run
from llmemb_ray.shards.schema import CHUNK_COLUMNS
from llmemb_ray.storage import redact

__all__ = ["NORM_TOLERANCE", "Findings", "Level", "verify"]

NORM_TOLERANCE = {"float32": 1e-3, "float16": 5e-3}
"""How far the norm of a normalised vector may be from 1 in each precision written."""

NOT_FROM_COMMITS = {"seconds_wall", "versions", "version_changes", "finished", "reuse"}
"""Fields of a receipt that tell of the driver that wrote it; all others follow from plan and commits."""


@dataclass
class Findings(Checked):
    """What ``verify`` found. ``problems`` is empty for a sound run."""

    rows_embedded: int = 0
    rows_rejected: int = 0
    duplicate_ids: int | None = None
    """Ids that stand in more than one row; None where they were not counted."""
    against_rows: int | None = None

    def summary(self) -> str:
        ids = "" if self.duplicate_ids is None else ", ids unique" if self.duplicate_ids == 0 else ""
        corpus = "" if self.against_rows is None else f", {self.against_rows:,} rows of the corpus all found"
        counts = f"{self.units:,} units, {self.rows_embedded:,} rows embedded, {self.rows_rejected:,} rejected"
        return f"sound: {counts}; checked {self.looked_into}{ids}{corpus}"


def verify(run: Run, *, level: Level = "full", against: list[str] | None = None, allow_duplicate_ids: bool = False) -> Findings:
    """Checks a run. against: the corpus it was made of, wherever that lies now. Raises only for what it cannot reach."""
    findings = Findings(run=run.url, level=level)
    try:
        commits, _ = run.commits, run.receipt
    except OutputError as error:
        findings.problem(str(error))
        return findings
    findings.units = len(commits)
    findings.rows_embedded = sum(commit.embedded for commit in commits)
    findings.rows_rejected = sum(commit.rejected for commit in commits)
    _accounts(run, commits, findings)
    generic.files(run.storage, commits, findings, finished=run.receipt is not None)
    if level != "quick":
        with tempfile.TemporaryDirectory(prefix="llmemb-verify-") as scratch:
            ids = Partitions(Path(scratch)) if level == "full" and run.plan.selection.id else None
            units = {unit.name: unit for unit in run.plan.units()}
            for commit in generic.chosen(commits, level):
                unit = units.get(commit.unit)
                if unit is None or (unit.file, unit.start, unit.rows) != (commit.file, commit.start, commit.rows):
                    findings.problem(f"commit {commit.unit} is for {commit.rows} rows of file {commit.file} from row {commit.start}: the plan has no such unit")
                    continue
                _unit(run, commit, findings, ids)
                findings.units_read += 1
            if ids is not None:
                findings.duplicate_ids = _duplicates(ids)
                if findings.duplicate_ids:
                    query = f"SELECT id, count(*) FROM '{run.url}/data/*.parquet' GROUP BY id HAVING count(*) > 1"  # noqa: S608 - shown, not run
                    text = f"{findings.duplicate_ids} ids stand in more than one row (to see them: {query})"
                    if allow_duplicate_ids:
                        findings.notes.append(text)
                    else:
                        findings.problem(text + "; the corpus has them twice (allow with allow_duplicate_ids)")
    if against:
        _compare(run, against, findings)
    return findings


def _accounts(run: Run, commits: list[Commit], findings: Findings) -> None:
    receipt = run.receipt
    if receipt is None:
        findings.problem("the run is not finished: there is no receipt; run the embed command again to finish it")
    try:
        reconcile(run.plan, commits)
    except RunFailed as error:
        findings.problem(str(error))
        return
    if receipt is None:
        return
    again = make_receipt(run.plan, commits, seconds_wall=0, versions={}, finished=0).to_dict()
    told = receipt.to_dict()
    for name in told.keys() - NOT_FROM_COMMITS:
        if again[name] != told[name]:
            findings.problem(f"the receipt says {name} {told[name]!r}, the commits make {again[name]!r}")
    if receipt.null_ids:
        findings.notes.append(f"{receipt.null_ids} rows have a null id")
    for url, problem in receipt.bad_files.items():
        findings.notes.append(f"left out: {url} {problem}")


def _unit(run: Run, commit: Commit, findings: Findings, ids: Partitions | None) -> None:
    seen = np.zeros(commit.rows, np.int8)
    for path, sha256, count in ((commit.shard, commit.shard_sha256, commit.vectors), (commit.rejects, commit.rejects_sha256, commit.rejected)):
        if path is None:
            if count:
                findings.problem(f"commit {commit.unit} counts {count} rows but names no file for them")
            continue
        table = generic.table(run.storage, path, sha256, findings)
        if table is None:
            return
        lacking = [name for name in _columns(run, rejects=path == commit.rejects) if name not in table.column_names]
        if lacking:
            findings.problem(f"{path} lacks the columns {', '.join(lacking)}")
            return
        metadata = schema.metadata_of(table.schema)
        for name, wanted in (
            ("space", run.plan.space_digest),
            ("unit", commit.unit),
            ("attempt", commit.attempt),
        ):
            if metadata.get(name) != wanted:
                findings.problem(f"{path}: its metadata has {name} {metadata.get(name)!r}, the run has {wanted!r}")
        if metadata.get("run_key") not in run.plan.run_keys_of(commit.file):
            findings.problem(f"{path}: its metadata has run_key {metadata.get('run_key')!r}, the run has {run.plan.run_key!r}")
        if table.num_rows != count:
            findings.problem(f"{path} has {table.num_rows} rows, its commit says {count}")
        if not (table["source_file"].to_numpy() == commit.file).all():
            findings.problem(f"{path} has rows of another source file")
        rows = table["source_row"].to_numpy() - commit.start
        inside = (rows >= 0) & (rows < commit.rows)
        if not inside.all():
            findings.problem(f"{path} has rows outside its unit {commit.unit}")
        if path == commit.shard and run.plan.chunked:
            firsts = table["chunk"].to_numpy() == 0
            _chunks(path, table, findings)
            table_of_rows, rows, inside = table.filter(pa.array(firsts)), rows[firsts], inside[firsts]
            if len(rows) != commit.embedded:
                findings.problem(f"{path} has chunks of {len(rows)} rows, its commit says {commit.embedded}")
        else:
            table_of_rows = table
        np.add.at(seen, rows[inside], 1)
        if path == commit.shard:
            _vectors(run, path, table, findings)
            if ids is not None:
                ids.add(id_digests(table_of_rows["id"]))
    if (seen > 1).any():
        findings.problem(f"unit {commit.unit}: source row {commit.start + int(np.argmax(seen > 1))} stands twice in data and rejects")
    if int((seen == 0).sum()) != commit.filtered:
        findings.problem(f"unit {commit.unit}: {int((seen == 0).sum())} source rows are neither in data nor in rejects, {commit.filtered} were filtered out")


def _columns(run: Run, *, rejects: bool) -> list[str]:
    if rejects:
        return list(schema.REJECTS.names)
    own = ["source_file", "source_row", "embedding", "n_tokens", "truncated", "prompt_hash", *(CHUNK_COLUMNS if run.plan.chunked else ())]
    return [*(["id"] if run.plan.selection.id else []), *own, *run.plan.selection.keep]


def _chunks(path: str, table: pa.Table, findings: Findings) -> None:
    """The chunks of each row are numbered from 0 without a gap, and lie in its text one behind the other."""
    rows, numbers, starts, ends = (table[name].to_numpy() for name in ("source_row", *CHUNK_COLUMNS))
    first = np.concatenate([[True], rows[1:] != rows[:-1]])
    follows = ~first
    wrong = first & (numbers != 0)
    wrong[1:] |= follows[1:] & ((numbers[1:] != numbers[:-1] + 1) | (starts[1:] < starts[:-1]))
    wrong |= ends <= starts
    if wrong.any():
        findings.problem(f"{path}: the chunks of source row {rows[int(np.argmax(wrong))]} do not follow one another")


def _vectors(run: Run, path: str, table: pa.Table, findings: Findings) -> None:
    type_ = table.schema.field("embedding").type
    wanted = schema.embedding_type(run.plan.dimension, run.plan.dtype)
    if (type_.id, getattr(type_, "list_size", None), getattr(type_, "value_type", None)) != (wanted.id, wanted.list_size, wanted.value_type):
        findings.problem(f"{path}: embedding is {type_}, the run writes {run.plan.dimension} dimensions of {run.plan.dtype}")
        return
    if table["embedding"].null_count:
        findings.problem(f"{path}: {table['embedding'].null_count} vectors are null")
        return
    quantised = run.plan.dtype in ("int8", "ubinary")
    if run.plan.calibrates and not _calibrated(run, path, table, findings):
        return
    vectors = run.precision.decode(table["embedding"])
    source_rows = table["source_row"]
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        findings.problem(f"{path}: {int((~finite).sum())} vectors hold NaN or infinity, that of source row {source_rows[int(np.argmin(finite))]} among them")
    norms = np.linalg.norm(np.where(np.expand_dims(finite, 1), vectors, 0), axis=1)
    if (norms[finite] == 0).any():
        findings.problem(f"{path}: {int((norms[finite] == 0).sum())} vectors are zero")
    if run.plan.representation.normalize and not quantised:
        off: npt.NDArray[np.bool_] = finite & (norms > 0) & (np.abs(norms - 1) > NORM_TOLERANCE[run.plan.dtype])
        if off.any():
            first = int(np.argmax(off))
            findings.problem(f"{path}: {int(off.sum())} vectors are not normalised, that of source row {source_rows[first]} has norm {norms[first]:.4f}")


def _calibrated(run: Run, path: str, table: pa.Table, findings: Findings) -> bool:
    """Whether the shard's codes were made with the run's calibration."""
    try:
        calibration = run.precision.calibration
    except OutputError as error:
        findings.problem(str(error))
        return False
    if calibration is None:
        findings.problem(f"{path}: its codes cannot be read, the run's calibration is not there")
        return False
    said = schema.metadata_of(table.schema).get("calibration")
    if said != calibration.digest:
        findings.problem(f"{path}: its codes were made with calibration {said!r}, the run has {calibration.digest!r}")
    return bool(said == calibration.digest)


def _duplicates(ids: Partitions) -> int:
    """How many ids stand in several rows."""
    count = 0
    for digests, _ in ids:
        pairs = np.sort(sortable(digests), order=["high", "low"])
        same = pairs[1:] == pairs[:-1]
        count += int((same & ~np.concatenate([[False], same[:-1]])).sum()) if len(same) else 0
    return count


def _compare(run: Run, against: list[str], findings: Findings) -> None:
    """Reads the corpus again: same files, same rows, and each row's id in data or rejects."""
    access = run.storage.access
    found = corpus_files.discover(against, access)
    planned = [file for file in run.plan.files if file.problem is None]
    by_url = {file.url: file for file in found}
    pairs = [(file, by_url.get(file.url)) for file in planned]
    known = {file.url for file in run.plan.files}
    if not known & set(by_url) and len(found) == len(run.plan.files):
        in_order = sorted(range(len(run.plan.files)), key=lambda index: run.plan.files[index].url)  # The same corpus in another place.
        there = dict(zip(in_order, sorted(found, key=lambda file: file.url), strict=True))
        pairs = [(file, there[file.index]) for file in planned]
        known = set(by_url)
    for extra in sorted(set(by_url) - known):
        findings.problem(f"{redact(extra)} is in the corpus but not in the run")
    commits = {commit.unit: commit for commit in run.commits}
    total = 0
    for file, other in pairs:
        if other is None:
            findings.problem(f"{redact(file.url)} is in the run but not in the corpus")
            continue
        if other.size != file.size or (other.url == file.url and other.version != file.version):
            findings.problem(
                f"{redact(other.url)} is not the file that was embedded: it had {file.size} bytes and version {file.version}, "
                f"now it has {other.size} and {other.version}"
            )
        here = replace(file, url=other.url, size=other.size, version=other.version)
        footer = corpus_files.footers([other], access)[0]
        if isinstance(footer, str):
            findings.problem(f"{redact(other.url)} {footer}")
            continue
        limit = run.plan.corpus["limit_rows"]
        if footer.group_rows != file.group_rows or (limit is None and footer.rows != file.rows):
            planned_as = f"{file.rows} in {len(file.group_rows)}"
            findings.problem(f"{redact(other.url)} has {footer.rows} rows in {len(footer.group_rows)} row groups, the run was planned for {planned_as}")
            continue
        total += file.rows
        if not run.plan.selection.id:
            continue
        for piece in here.pieces():
            wanted = frozenset(unit.name for unit in piece.units)
            try:
                for unit, table in read_units(here, piece, run.plan.selection, access, wanted):
                    if isinstance(table, InputError):
                        findings.problem(str(table))
                        continue
                    _compare_ids(run, commits.get(unit.name), column(table, run.plan.selection.id), findings)
            except LlmembError as error:
                findings.problem(str(error))
    findings.against_rows = total
    if not run.plan.selection.id:
        findings.notes.append("the run has no id column: the corpus was compared by files and row counts alone")


def _compare_ids(run: Run, commit: Commit | None, source: pa.ChunkedArray, findings: Findings) -> None:
    if commit is None:
        return  # Already a finding of ``_accounts``.
    wanted = id_values(source)
    for path, as_text in ((commit.shard, False), (commit.rejects, True)):
        if path is None:
            continue
        for row, id_ in _rows_and_ids(run, path):
            expected = wanted[row - commit.start] if 0 <= row - commit.start < len(wanted) else None
            if id_ != (str(expected) if as_text and expected is not None else expected):
                findings.problem(f"{path}: source row {row} has id {id_!r}, the corpus has {expected!r} there")


def _rows_and_ids(run: Run, path: str) -> Iterator[tuple[int, Any]]:
    try:
        with run.storage.open(path) as reader:
            table = parquet.read(reader, columns=["source_row", "id"])
    except NotFound:
        return
    yield from zip(table["source_row"].to_pylist(), id_values(table["id"]), strict=True)
