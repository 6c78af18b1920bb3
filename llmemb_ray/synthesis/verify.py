"""Checking a synthesis from its files alone.

``quick``   record, commits and receipt agree; every file they name is there with its size, and no other
``sample``  and the contents of some units: checksums, columns, rows, texts, and that each row is what its seed draws
``full``    and of all units; no two examples of the run are the same

Invariant: a unit is in memory at a time; examples are told apart by digests on disk.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmemb_ray.errors import LlmembError, OutputError, RunFailed
from llmemb_ray.shards import findings as generic
from llmemb_ray.shards.findings import Checked, Level
from llmemb_ray.shards.schema import metadata_of
from llmemb_ray.synthesis import brainstorming, drawing, duplicates, tasks
from llmemb_ray.synthesis.brainstorming import Brainstorming
from llmemb_ray.synthesis.commits import Made
from llmemb_ray.synthesis.drawing import Draw
from llmemb_ray.synthesis.families import FAMILIES
from llmemb_ray.synthesis.prompts import Prompts
from llmemb_ray.synthesis.receipt import Receipt, reconcile, sums
from llmemb_ray.synthesis.record import Synthesis
from llmemb_ray.synthesis.tasks import Pool
from llmemb_ray.synthesis.units import EXAMPLES, REJECT_ROWS, Unit

NOT_FROM_COMMITS = {"cost", "seconds_wall", "versions", "finished"}
"""Fields of a receipt that tell of the command that wrote it; all others follow from record, commits and the accounts of the tasks."""

DRAWN = ("family", "language", "task", "placeholders", "seed")
"""Columns that follow from the run's seed and the row."""


@dataclass
class Findings(Checked):
    """What ``verify`` found. ``problems`` is empty for a sound synthesis."""

    asked: int = 0
    accepted: int = 0
    rejected: int = 0
    duplicates: int = 0
    repeated: int | None = None
    """Examples that are the same as an earlier one; None where they were not looked for."""
    drawn_again: int = 0
    """Rows that were held against what the seed draws."""

    def summary(self) -> str:
        counts = f"{self.asked:,} asked = {self.accepted:,} accepted + {self.rejected:,} rejected + {self.duplicates:,} duplicates"
        again = f", {self.drawn_again:,} rows drawn again" if self.drawn_again else ""
        return f"sound: {self.units:,} units, {counts}; checked {self.looked_into}{again}{'' if self.repeated is None else ', no example stands twice'}"


def verify(synthesis: Synthesis, *, level: Level = "full") -> Findings:
    """Checks a synthesis. Raises only for what it cannot reach."""
    findings = Findings(run=synthesis.storage.url, level=level)
    try:
        commits, receipt, of_tasks = synthesis.commits, synthesis.receipt, brainstorming.accounts(synthesis.storage)
    except OutputError as error:
        findings.problem(str(error))
        return findings
    findings.units = len(commits)
    findings.asked, findings.accepted = sum(commit.rows for commit in commits), sum(commit.accepted for commit in commits)
    findings.rejected, findings.duplicates = sum(commit.rejected for commit in commits), sum(commit.duplicates for commit in commits)
    _accounts(synthesis, commits, receipt, of_tasks, findings)
    generic.files(synthesis.storage, commits, findings, finished=receipt is not None)
    pool = _pool(synthesis, findings)
    if level != "quick":
        draw = _draw(synthesis, pool, findings)
        units = {unit.name: unit for unit in synthesis.record.units()}
        whole = [commit for commit in generic.chosen(commits, level) if _unit(synthesis, commit, units.get(commit.unit), draw, findings)]
        if level == "full" and receipt is not None:
            _repeated(synthesis, whole, findings)
    return findings


def _accounts(synthesis: Synthesis, commits: Sequence[Made], receipt: Receipt | None, of_tasks: Brainstorming | None, findings: Findings) -> None:
    record = synthesis.record
    try:
        reconcile(record.units(), commits)
    except RunFailed as error:
        findings.problem(str(error))
    for commit in commits:
        _within_commit(commit, findings)
    if receipt is None:
        findings.problem("the synthesis is not finished: there is no receipt for all that was asked for; run the synthesize command again to finish it")
        return
    again: dict[str, Any] = {
        "run_key": record.run_key,
        "generator": record.generator,
        "units": len(commits),
        "asked": findings.asked,
        "task_prompt_tokens": of_tasks.prompt_tokens if of_tasks else 0,
        "task_completion_tokens": of_tasks.completion_tokens if of_tasks else 0,
    }
    for field in fields(Receipt):
        if field.name in NOT_FROM_COMMITS:
            continue
        if field.name not in again:
            again[field.name] = sums(commits, field.name) if field.type.startswith("dict") else sum(getattr(commit, field.name) for commit in commits)
        told = getattr(receipt, field.name)
        if again[field.name] != told:
            findings.problem(f"the receipt says {field.name} {told!r}, the commits make {again[field.name]!r}")


def _within_commit(commit: Made, findings: Findings) -> None:
    """What a commit says agrees with itself."""
    moved = sum(commit.reasons.get(reason, 0) for reason in duplicates.REASONS)
    for what, one, other, counted in (
        ("families", "accepted", sum(commit.families.values()), commit.accepted),
        ("languages", "accepted", sum(commit.languages.values()), commit.accepted),
        ("reasons", "rejected and duplicates", sum(commit.reasons.values()), commit.rejected + commit.duplicates),
        (f"reasons {' and '.join(duplicates.REASONS)}", "duplicates", moved, commit.duplicates),
    ):
        if other != counted:
            findings.problem(f"commit {commit.unit}: its {what} make {other}, it has {counted} {one}")
    for kind, path, count in (("shard", commit.shard, commit.accepted), ("rejects", commit.rejects, commit.rejected + commit.duplicates)):
        if (path is None) != (count == 0):
            findings.problem(f"commit {commit.unit} counts {count} rows of {kind} and names {'no file' if path is None else path} for them")


def _pool(synthesis: Synthesis, findings: Findings) -> Pool | None:
    """The tasks that the run was drawn from; None where they are others now."""
    path, storage, wanted = brainstorming.PATH, synthesis.storage, synthesis.record.identity.get("tasks")
    try:
        pool = Pool(tasks.read_file(storage.display(path), storage.access)) if storage.exists(path) else Pool()
    except LlmembError as error:
        findings.problem(f"the tasks cannot be read: {error}")
        return None
    if pool.digest != wanted:
        findings.problem(f"{path} holds {len(pool):,} tasks, and they are not those that the examples were made for: it was changed since")
        return None
    return pool


def _draw(synthesis: Synthesis, pool: Pool | None, findings: Findings) -> Draw | None:
    """Draws again what was asked for; the prompts are not compared, so the package's own do."""
    identity = synthesis.record.identity
    if identity.get("drawing") != drawing.VERSION:
        findings.notes.append(f"requests were drawn by version {identity.get('drawing')}, this one draws by {drawing.VERSION}: none was drawn again")
        return None
    if pool is None:
        return None
    try:
        weights = {name: identity[name] for name in ("families", "languages")}
        return Draw(seed=identity["seed"], pool=pool, prompts=Prompts.load(), generator_name=synthesis.record.generator, **weights)
    except (LlmembError, KeyError) as error:
        findings.problem(f"the record does not say what to draw from: {error}")
        return None


def _unit(synthesis: Synthesis, commit: Made, unit: Unit | None, draw: Draw | None, findings: Findings) -> bool:
    """Whether both files of a unit could be read and have their columns."""
    if unit is None or (unit.start, unit.rows) != (commit.start, commit.rows):
        findings.problem(f"commit {commit.unit} is for {commit.rows} requests from {commit.start}: the run has no such unit")
        return False
    findings.units_read += 1
    seen = np.zeros(commit.rows, np.int64)
    whole = True
    for kind, path, sha256, count in (
        ("shard", commit.shard, commit.shard_sha256, commit.accepted),
        ("rejects", commit.rejects, commit.rejects_sha256, commit.rejected + commit.duplicates),
    ):
        if path is None:
            continue
        table = generic.table(synthesis.storage, path, sha256, findings)
        if table is None or not _has_columns(synthesis, kind, path, table, findings):
            whole = False
            continue
        if table.num_rows != count:
            findings.problem(f"{path} has {table.num_rows} rows, its commit says {count}")
        _metadata(synthesis, commit, path, table, findings)
        rows = table["row"].to_numpy() - commit.start
        inside = (rows >= 0) & (rows < commit.rows)
        if not inside.all():
            findings.problem(f"{path} has rows outside its unit {commit.unit}, {commit.start + int(rows[int(np.argmin(inside))])} among them")
        np.add.at(seen, rows[inside], 1)
        _counts(commit, kind, path, table, findings)
        if kind == "shard":
            _texts(path, table, findings)
        if draw is not None:
            _drawn_again(draw, path, table.filter(pa.array(inside)), findings)
    if whole and (seen > 1).any():
        findings.problem(f"unit {commit.unit}: row {commit.start + int(np.argmax(seen > 1))} stands {int(seen.max())} times in data and rejects")
    if whole and (seen == 0).any():
        first = commit.start + int(np.argmax(seen == 0))
        findings.problem(f"unit {commit.unit}: {int((seen == 0).sum())} rows are neither in data nor in rejects, {first} among them")
    return whole


def _has_columns(synthesis: Synthesis, kind: str, path: str, table: pa.Table, findings: Findings) -> bool:
    wanted = REJECT_ROWS if kind == "rejects" else EXAMPLES
    if kind == "shard" and synthesis.record.identity.get("checks", {}).get("keep_raw"):
        wanted = wanted.append(pa.field("raw", pa.string()))
    if table.schema.equals(wanted, check_metadata=False) and not table["row"].null_count:
        return True
    findings.problem(f"{path} has other columns than a synthesis writes: {table.schema.to_string(show_schema_metadata=False)!r}")
    return False


def _metadata(synthesis: Synthesis, commit: Made, path: str, table: pa.Table, findings: Findings) -> None:
    metadata = metadata_of(table.schema)
    for name, wanted in (("run_key", synthesis.record.run_key), ("unit", commit.unit), ("attempt", commit.attempt)):
        if metadata.get(name) != wanted:
            findings.problem(f"{path}: its metadata has {name} {metadata.get(name)!r}, the run has {wanted!r}")
    others = pc.sum(pc.not_equal(table["generator"], synthesis.record.generator)).as_py()
    if others or table["generator"].null_count:
        findings.problem(f"{path} has {(others or 0) + table['generator'].null_count} rows of another generator than {synthesis.record.generator!r}")


def _counts(commit: Made, kind: str, path: str, table: pa.Table, findings: Findings) -> None:
    """What the commit counts is what stands in the file."""
    if kind == "shard":
        noted = [note for notes in table["notes"].to_pylist() for note in notes or ()]
        found = {"families": table["family"].to_pylist(), "languages": table["language"].to_pylist(), "notes": noted}
    else:
        found = {"reasons": table["reason"].to_pylist()}
    for name, values in found.items():
        if dict(Counter(values)) != getattr(commit, name):
            findings.problem(f"{path} has {name} {dict(Counter(values))!r}, its commit says {getattr(commit, name)!r}")


def _texts(path: str, table: pa.Table, findings: Findings) -> None:
    """Every text that a family has is there, and the instruction is the task."""
    names = ("row", "family", "task", "instruction", "query", "positive", "negative")
    for row, name, task, instruction, query, positive, negative in zip(*(table[name].to_pylist() for name in names), strict=True):
        family = FAMILIES.get(name)
        texts = [instruction, query, positive, *([negative] if family is None or family.negative else [])]
        if any(text is None or not text.strip() for text in texts):
            findings.problem(f"{path}: row {row} has an empty text")
        if instruction != task:
            findings.problem(f"{path}: row {row} has an instruction that is not its task: {instruction!r}")
        if family is not None and family.negative is None and negative is not None:
            findings.problem(f"{path}: row {row} has a negative, its family {name} has none")


def _drawn_again(draw: Draw, path: str, table: pa.Table, findings: Findings) -> None:
    differing: list[str] = []
    for row in table.select(["row", *DRAWN]).to_pylist():
        request = draw.request(row["row"])
        wanted = {name: getattr(request, name) for name in DRAWN} | {"placeholders": json.dumps(request.placeholders, ensure_ascii=False)}
        differing += [f"row {row['row']} has {name} {row[name]!r}, its seed draws {wanted[name]!r}" for name in DRAWN if row[name] != wanted[name]]
    findings.drawn_again += table.num_rows
    if differing:
        more = f", and {len(differing) - 1} more differ" if len(differing) > 1 else ""
        findings.problem(f"{path}: {differing[0]}{more}")


def _repeated(synthesis: Synthesis, whole: Sequence[Made], findings: Findings) -> None:
    """Among the examples alone: what was moved to the rejects is no longer looked at."""
    found = duplicates.find(synthesis.storage, [replace(commit, rejects=None) for commit in whole], near=None)
    findings.repeated = len(found)
    if found:
        row = min(found)
        findings.problem(f"{len(found)} examples are the same as an earlier one: row {row} as row {found[row][0]}")
