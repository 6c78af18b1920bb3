"""From the files of a training's sources to its batches, on Ray Data: rows are checked and written once, then brought together step by step.

Invariant: what stands in the batches follows from the files, the settings and the seed, not from how many tasks made them; no row that is trained
on has the anchor of one held out, without regard to case and white space. The driver holds numbers of rows, and keys of anchors where rows are held
out (8 bytes a row), never texts; data.json is written last, so that data without it are begun anew.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.data.context import ShuffleStrategy

from llmemb_ray import errors
from llmemb_ray.config.training import FinetuneSettings
from llmemb_ray.corpus import rows as corpus_rows
from llmemb_ray.errors import ConfigError, InputError, NotFound, RunFailed, RunMismatch
from llmemb_ray.representation.space import differences
from llmemb_ray.storage import Storage
from llmemb_ray.training import gathering, order, sources
from llmemb_ray.training.batches import DIRECTORY, RECORD, Batches
from llmemb_ray.training.gathering import Plan
from llmemb_ray.training.order import Group, Ints, Steps
from llmemb_ray.training.reading import FileTask
from llmemb_ray.training.sources import Origin

FORMAT = 2

SHARD_BYTES = 32 * 2**20
"""Texts in a shard of batches, about: what one task gathers."""

GATHERED_ROWS = 8 * 2**20
"""Rows brought into batches at once, of one or several epochs: each takes 24 bytes of the driver."""

DECIDES = ("batch_size", "epochs", "seed", "hard_negatives", "mix_tasks", "holdout", "distill")
"""Settings that batches depend on, besides the sources."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The checked rows of all sources, numbered through. bounds: the first row of each source, and the end; parts: (path, first row) of their files;
    anchors: int64, the key of each row's anchor (mining.equality), or none where no rows are held out.
    """

    origins: list[Origin]
    groups: list[Group]
    group_of: npt.NDArray[np.int32]
    anchors: Ints
    bounds: list[int]
    parts: list[tuple[str, int]]
    accounts: list[dict[str, Any]]
    row_bytes: float

    def of(self, source: int) -> Ints:
        return np.arange(self.bounds[source], self.bounds[source + 1], dtype=np.int64)


@dataclass(frozen=True)
class _Placed:
    """Steps of an epoch with the shard of each."""

    steps: Steps
    epoch: int
    shards: Ints


def prepare(settings: FinetuneSettings, storage: Storage, *, say: Say) -> Batches:
    """The batches of a training under ``storage``, its OUT, made on the Ray that is up, or those that are there if they are of the same data and settings.

    Raises ConfigError for columns or sets that are not there, InputError for files of no use, RunMismatch for other batches.
    """
    origins = sources.settle(settings)
    asked = _fingerprint(settings, origins)
    try:
        there = json.loads(storage.read(RECORD))
    except NotFound:
        there = None
    if there is not None:
        changed = [f"  {name}: there {theirs!r}, asked for now {ours!r}" for name, ours, theirs in differences(asked, there["fingerprint"])]
        if changed:
            way_out = f"repeat the settings, name another out, or delete {storage.display(DIRECTORY)} with what was trained on it"
            raise RunMismatch(f"out: {storage.url} holds batches of other data or settings; {way_out}:\n" + "\n".join(changed))
        say(f"data: the {there['steps']:,} steps in {storage.display(DIRECTORY)} are used again")
        return Batches(storage, there)
    storage.delete_tree(DIRECTORY)
    for origin in origins:
        for url in origin.files:
            names = corpus_rows.columns_of(url, settings.access, setting=f"{origin.place}.path")
            if names:
                sources.columns(origin, names, url, settings.distill)
    rows = _read(settings, origins, storage)
    record = _batches(settings, rows, storage) | {"format": FORMAT, "fingerprint": asked}
    storage.put(RECORD, json.dumps(record, indent=1, ensure_ascii=False).encode())
    for line in _lines(record, storage):
        say(line)
    return Batches(storage, record)


def _fingerprint(settings: FinetuneSettings, origins: Sequence[Origin]) -> dict[str, Any]:
    found = {
        "format": FORMAT,
        "sources": {origin.name: origin.described() | {"files": [corpus_rows.version(url, settings.access) for url in origin.files]} for origin in origins},
    }
    values: dict[str, Any] = json.loads(json.dumps(found | {name: getattr(settings, name) for name in DECIDES}))
    return values


# -- first pass: rows ------------------------------------------------------------------------------


def _read(settings: FinetuneSettings, origins: list[Origin], storage: Storage) -> _Rows:
    tasks = [
        FileTask(
            number=number,
            source=source,
            origin=origins[source],
            url=url,
            access=settings.access,
            distill=settings.distill,
            hard_negatives=settings.hard_negatives,
            mix_tasks=settings.mix_tasks,
            keep_anchors=settings.holdout > 0,
        )
        for number, (source, url) in enumerate((source, url) for source, origin in enumerate(origins) for url in origin.files)
    ]
    reference = ray.put(tasks)
    found = _run(
        _dataset([pa.table({"number": [task.number]}) for task in tasks]).map_batches(
            gathering.read_file, batch_size=1, batch_format="pyarrow", fn_kwargs={"tasks": reference, "storage": storage}
        )
    )
    found.sort(key=lambda row: row["number"])
    told = [json.loads(row["told"]) for row in found]
    local = [np.frombuffer(row["groups"], np.int32) for row in found]
    for one in told:
        if one["error"]:
            raise getattr(errors, one["error"][0])(one["error"][1])
    lengths = {one["teacher_length"]: tasks[number].url for number, one in enumerate(told) if one["teacher_length"]}
    if len(lengths) > 1:
        both = ", ".join(f"{length} numbers in {url}" for length, url in lengths.items())
        raise InputError(f"teacher_column: vectors of one teacher are of one length, and here are {both}; use one teacher")
    accounts = []
    for source, origin in enumerate(origins):
        own = [told[task.number] for task in tasks if task.source == source]
        reasons: Counter[str] = sum((Counter(one["reasons"]) for one in own), Counter())
        examples = {reason: text for one in reversed(own) for reason, text in one["examples"].items()}
        read = sum(one["read"] for one in own)
        sources.require_majority(origin, read, reasons, examples)
        accounts.append({"name": origin.name, "read": read, "rejected": reasons.total(), "rejects": dict(reasons), "weight": origin.weight})
    groups = sorted({_group(values) for one in told for values in one["groups"]})
    numbers = {group: number for number, group in enumerate(groups)}
    group_of = [np.array([numbers[_group(values)] for values in one["groups"]], np.int32)[mine] for one, mine in zip(told, local, strict=True) if len(mine)]
    if settings.distill == "vectors" and not any(group.teacher for group in groups):
        raise ConfigError(f"distill: no file has a teacher's vectors; name their column with teacher_column (usual: {sources.TEACHER})")
    if settings.distill == "scores" and not any(group.scores for group in groups):
        raise ConfigError("distill: no file has a teacher's scores; name their column with scores_column (usual: scores)")
    counts = [len(mine) for mine in local]
    starts = np.cumsum([0, *counts]).tolist()
    parts: list[tuple[str, int]] = []
    for start, one in zip(starts, told, strict=False):
        for path, length in one["parts"]:
            parts.append((path, start))
            start += length
    first_files = np.cumsum([0, *(len(origin.files) for origin in origins)])
    return _Rows(
        origins=origins,
        groups=groups,
        group_of=np.concatenate(group_of),
        anchors=np.concatenate([np.frombuffer(row["anchors"], np.int64) for row in found]),
        bounds=[starts[file] for file in first_files],
        parts=parts,
        accounts=accounts,
        row_bytes=sum(one["characters"] for one in told) / max(1, starts[-1]),
    )


def _group(values: Sequence[Any]) -> Group:
    task, instructions, symmetric, negatives, positive, teacher, scores = values
    return Group(task=task, instructions=tuple(instructions), symmetric=symmetric, negatives=negatives, positive=positive, teacher=teacher, scores=scores)


# -- second pass: batches --------------------------------------------------------------------------


def _batches(settings: FinetuneSettings, rows: _Rows, storage: Storage) -> dict[str, Any]:
    counts = [end - start for start, end in zip(rows.bounds, rows.bounds[1:], strict=False)]
    held = [start + numbers for start, numbers in zip(rows.bounds, order.hold_out(counts, settings.holdout, settings.seed), strict=False)]
    held_rows = np.concatenate(held)
    held_out = order.held_steps(held_rows, rows.group_of, rows.groups, settings.batch_size)
    free, same = [rows.of(source) for source in range(len(counts))], [0] * len(counts)
    if settings.holdout:
        kept = [order.apart(numbers, held_rows, rows.anchors) for numbers in free]
        free, same = [numbers for numbers, _ in kept], [count for _, count in kept]
        if not sum(map(len, free)):
            raise ConfigError(f"holdout: all {sum(same):,} rows that are left have the same anchor as a held-out row; hold out fewer")
    steps_per_shard = max(1, int(SHARD_BYTES // max(1, settings.batch_size * rows.row_bytes)))
    waiting = [_Placed(held_out, 0, np.full(len(held_out), -1, np.int64))]
    shards: list[int] = []
    per_epoch: list[int] = []
    shares = np.zeros(len(counts), np.int64)
    groups: dict[int, Counter[str]] = {}
    for epoch in range(1, settings.epochs + 1):
        weights = [origin.weight for origin in rows.origins]
        steps, taken = order.epoch_steps(free, weights, rows.group_of, rows.groups, batch_size=settings.batch_size, seed=settings.seed, epoch=epoch)
        if not len(steps):
            largest = max((count for count, _ in taken.values()), default=0)
            raise InputError(
                f"batch_size: none of the {sum(map(len, free)):,} rows make a batch of {settings.batch_size:,}, the most that may share one are {largest:,}; "
                "lower batch_size, or let sources share batches with mix_tasks"
            )
        waiting.append(_Placed(steps, epoch, len(shards) + np.arange(len(steps), dtype=np.int64) // steps_per_shard))
        shards += [sum(per_epoch) + start for start in range(0, len(steps), steps_per_shard)]
        per_epoch.append(len(steps))
        for group, (count, left) in taken.items():
            groups.setdefault(group, Counter()).update(rows=count, left_out=left, batches=(count - left) // settings.batch_size)
        shares += np.bincount(np.searchsorted(rows.bounds, steps.rows, side="right") - 1, minlength=len(counts))
        if epoch == settings.epochs or sum(len(one.steps.rows) for one in waiting) + len(steps.rows) > GATHERED_ROWS:
            _gather(settings, rows, storage, waiting)
            waiting = []
    named = [
        {**account, "held_out": len(numbers), "same_anchor": same[source], "trained": int(shares[source])}
        for source, (account, numbers) in enumerate(zip(rows.accounts, held, strict=True))
    ]
    return {
        "steps": sum(per_epoch),
        "epochs": settings.epochs,
        "steps_per_epoch": per_epoch,
        "batch_size": settings.batch_size,
        "steps_per_shard": steps_per_shard,
        "shards": shards,
        "heldout_pieces": len(held_out),
        "heldout_rows": len(held_out.rows),
        "sources": named,
        "groups": [asdict(rows.groups[group]) | dict(groups[group]) for group in sorted(groups)],
    }


def _gather(settings: FinetuneSettings, rows: _Rows, storage: Storage, placed: Sequence[_Placed]) -> None:
    """Writes the shards of some epochs, and of what is held out."""
    steps = Steps.joined([one.steps for one in placed])
    by_row = np.argsort(steps.rows, kind="stable")
    shards = np.concatenate([one.shards for one in placed])
    plan = Plan(
        steps=steps,
        rows_sorted=steps.rows[by_row],
        by_row=by_row,
        epochs=np.repeat([one.epoch for one in placed], [len(one.steps) for one in placed]),
        shards=shards,
        groups=rows.groups,
        told=[origin.instructions if settings.mix_tasks else () for origin in rows.origins],
        seed=settings.seed,
    )
    of_source = [int(np.searchsorted(rows.bounds, first, side="right")) - 1 for _, first in rows.parts]
    parts = [pa.table({"part": [part], "first": [first], "source": [source]}) for (part, first), source in zip(rows.parts, of_source, strict=True)]
    spread = _dataset(parts).map_batches(gathering.place_rows, batch_size=1, batch_format="pyarrow", fn_kwargs={"plan": ray.put(plan), "storage": storage})
    brought = spread.groupby("shard").map_groups(gathering.write_shard, batch_format="pyarrow", fn_kwargs={"storage": storage})
    written = sum(row["rows"] for row in _run(brought))
    if written != len(steps.rows):
        raise RunFailed(f"{written:,} of {len(steps.rows):,} rows came into batches: a task was lost; run the command again")


def _dataset(tables: list[pa.Table]) -> Any:
    """One block a table. Rows are brought together by sorting: hashing took 7 s of 9,000 numbers where sorting took 0.2 s (Ray 2.60, two busy cores)."""
    dataset = ray.data.from_arrow(tables)
    dataset.context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    dataset.context.enable_progress_bars = False
    return dataset


def _run(dataset: Any) -> list[dict[str, Any]]:
    """The rows that a dataset makes; an error of its tasks without Ray's wrapping."""
    try:
        return dataset.take_all()  # type: ignore[no-any-return]
    except (ray.exceptions.RayError, RuntimeError, errors.LlmembError) as error:
        inner: BaseException | None = error
        while inner is not None:
            if type(inner).__module__ == errors.__name__:
                raise inner from None
            inner = inner.__cause__
        raise RunFailed(f"preparing the data stopped: {type(error).__name__}: {error}; run the command again") from error


def _lines(record: dict[str, Any], storage: Storage) -> list[str]:
    lines = []
    total = sum(source["trained"] for source in record["sources"])
    for source in record["sources"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(source["rejects"].items()))
        rejected = f", {source['rejected']:,} rejected ({reasons}; rows in {storage.display(f'{DIRECTORY}/rejects')})" if source["rejected"] else ""
        held = f", {source['held_out']:,} held out" if source["held_out"] else ""
        held += f", {source['same_anchor']:,} left out (same anchor as a held-out row)" if source["same_anchor"] else ""
        lines.append(f"data: {source['name']}: {source['read']:,} rows{rejected}{held}; {source['trained'] / max(1, total):.1%} of the batches")
    left = sum(group["left_out"] for group in record["groups"])
    whole = [group for group in record["groups"] if not group["batches"]]
    if left:
        named = ", ".join(f"{group['task']} ({group['rows']:,} rows)" for group in whole[:3]) + (" …" if len(whole) > 3 else "")
        small = f"; left out whole, smaller than batch_size {record['batch_size']:,}: {len(whole):,} groups, {named}" if whole else ""
        epochs = f"in {record['epochs']:,} epochs " if record["epochs"] > 1 else ""
        lines.append(f"data: {left:,} rows of {len(record['groups']):,} groups {epochs}fill no batch{small}")
    per_epoch = record["steps_per_epoch"]
    lines.append(f"data: {record['steps']:,} steps of {record['batch_size']:,} rows in {record['epochs']:,} epochs ({per_epoch[0]:,} in the first)")
    return lines
