"""The embedding job from settings to receipt.

Invariant: what is done stands in commits and nowhere else, so the job can be killed at any moment and the same
call continues it. A finished run is left alone: calling again returns its receipt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from llmemb_ray.config import EmbedSettings, parse_actors
from llmemb_ray.corpus.columns import Selection
from llmemb_ray.corpus.files import Found
from llmemb_ray.embedders import models
from llmemb_ray.embedders.embedder import EmbedderSpec, settle
from llmemb_ray.errors import OutputError, RunFailed
from llmemb_ray.pipeline import planning
from llmemb_ray.pipeline.prepare import Job, ReadTask
from llmemb_ray.pipeline.progress import Counts, Reporter
from llmemb_ray.shards import commits as commit_records
from llmemb_ray.shards import lease
from llmemb_ray.shards.commits import Commit
from llmemb_ray.shards.plan import RECORD as PLAN_RECORD
from llmemb_ray.shards.plan import Plan
from llmemb_ray.shards.receipt import PATH as RECEIPT
from llmemb_ray.shards.receipt import Receipt, make_receipt
from llmemb_ray.shards.run import DATA, OWN, REJECTS
from llmemb_ray.storage import Storage, absolute, is_temporary

if TYPE_CHECKING:
    from llmemb_ray.pipeline.graph import Shape

FAILURES_SHOWN = 5


class Execution(Protocol):
    """Something that runs reading tasks: Ray (``graph``) or this process (``inprocess``)."""

    def run(self, tasks: list[ReadTask]) -> Iterator[tuple[str, Commit | None, str | None]]: ...

    def live(self) -> tuple[int, int, int]: ...


def embed(input: str | list[str], output: str, *, model: str, quiet: bool = False, **settings: Any) -> Receipt:
    """Embeds a corpus into ``output`` and returns the receipt; continues a run that was stopped.

    input:    Parquet file, directory or glob, or several; local or URL
    settings: any of ``llmemb_ray.config.EmbedSettings``
    Raises ConfigError, InputError, OutputError, ModelError, StorageError, RunFailed or RejectsExceeded.
    """
    inputs = [input] if isinstance(input, str) else list(input)
    return run(EmbedSettings.make({"input": inputs, "output": output, "model": model, **settings}), quiet=quiet)


def run(settings: EmbedSettings, *, quiet: bool = False) -> Receipt:
    """``embed`` for settings already made."""
    with Reporter(Counts(), quiet=quiet) as reporter:
        prospect = look(settings)  # Before Ray is started: what is wrong with the input is told at once.
        if settings.trust_remote_code:
            reporter.say(f"trust_remote_code is set: Python code from {settings.model} runs in this job")
        if parse_actors(settings.actors) == (0, 0):
            return _run(settings, prospect, None, reporter)
        from llmemb_ray.pipeline import graph

        with graph.cluster(settings) as shape:
            return _run(settings, prospect, shape, reporter)


@dataclass(frozen=True)
class Prospect:
    """What is known of a job before any process is started for it."""

    output: Storage
    spec: EmbedderSpec
    found: list[Found]
    selection: Selection


def look(settings: EmbedSettings) -> Prospect:
    """Settles the model and lists corpus and output. Raises ConfigError, InputError, ModelError or OutputError."""
    output = Storage(absolute(settings.output), settings.access)
    spec = settle(settings)
    found, selection = planning.find(settings)
    if not settings.overwrite and not output.exists(PLAN_RECORD):
        _refuse_foreign(output)
    return Prospect(output, spec, found, selection)


def _run(settings: EmbedSettings, prospect: Prospect, shape: Shape | None, reporter: Reporter) -> Receipt:
    started = time.monotonic()
    output, found = prospect.output, prospect.found
    gpu = shape.on_gpu if shape else models.default_device() == "cuda"
    spec = replace(prospect.spec, compute_dtype=models.resolve_dtype(prospect.spec.compute_dtype, "cuda" if gpu else "cpu"))
    with lease.LeaseHolder(output, reporter.snapshot, waiting=reporter.say) as held:
        if settings.overwrite:
            clear(output)
        plan = Plan.load(output)
        if plan is None:
            plan = planning.make_plan(settings, spec, found, prospect.selection, actors=shape.most if shape else 1, gpu=gpu)
            plan.save(output)
        else:
            _require_same(plan, settings, spec, found, output)
        receipt = Receipt.load(output)
        if receipt is None:
            _warn_versions(plan, reporter)
            _embed_units(settings, plan, spec, shape, output, reporter, held)
            receipt = finish(plan, output, started)
    receipt.check_rejects(settings.max_reject_rate, settings.reject_floor, output.url)
    return receipt


def _embed_units(
    settings: EmbedSettings, plan: Plan, spec: EmbedderSpec, shape: Shape | None, output: Storage, reporter: Reporter, held: lease.LeaseHolder
) -> None:
    """Runs every unit without a commit. Raises RunFailed if some could not be done."""
    counts = reporter.counts
    done = commit_records.committed_units(output)
    committed_rows = sum(unit.rows for unit in plan.units() if unit.name in done)
    counts.units, counts.rows, counts.rows_total = len(done), committed_rows, plan.rows
    counts.units_total = sum(1 for _ in plan.units())
    if done:
        reporter.say(f"continuing: {counts.units:,} of {counts.units_total:,} units are already committed")
    if counts.units == counts.units_total:
        return
    job = Job.of(plan, spec, output, settings.access)
    execution: Execution
    if shape is None:
        from llmemb_ray.pipeline import inprocess

        execution = inprocess.Execution(job)
        counts.actors = 1
    else:
        from llmemb_ray.pipeline import graph

        execution = graph.Execution(job, settings, shape)

    def live() -> tuple[int, int, int]:
        rows, tokens, actors = execution.live()
        return rows + committed_rows, tokens, actors

    failures: dict[str, str] = {}
    with reporter.watching(live):
        for tasks in windows(plan, done, settings.window_units):
            for unit, commit, error in execution.run(tasks):
                if commit is not None:
                    counts.units += 1
                    counts.rows += commit.rows
                    counts.tokens += commit.tokens
                    counts.rejects += commit.rejected
                    counts.storage_retries += commit.storage_retries
                else:
                    failures[unit] = str(error)
                    counts.failed_units = len(failures)
                if held.lost:
                    raise OutputError(f"{held.lost}; this driver stops, what it committed stands")
    if failures:
        shown = "\n".join(f"  unit {unit}: {error}" for unit, error in list(failures.items())[:FAILURES_SHOWN])
        more = f"\n  … and {len(failures) - FAILURES_SHOWN} more" if len(failures) > FAILURES_SHOWN else ""
        raise RunFailed(
            f"{len(failures)} of {counts.units_total} units failed, the others are committed:\n{shown}{more}\n"
            "When the cause is mended, run the same command again: it does only what is missing."
        )


def windows(plan: Plan, done: set[str], size: int) -> Iterator[list[ReadTask]]:
    """Reading tasks for the units that are not ``done``, about ``size`` units at a time."""
    tasks: list[ReadTask] = []
    units = 0
    for piece in plan.pieces():
        wanted = frozenset(unit.name for unit in piece.units) - done
        if not wanted:
            continue
        tasks.append(ReadTask(plan.files[piece.file], piece, wanted))
        units += len(wanted)
        if units >= size:
            yield tasks
            tasks, units = [], 0
    if tasks:
        yield tasks


def finish(plan: Plan, output: Storage, started: float) -> Receipt:
    """Checks the accounts, removes what no commit names, compacts the commits, writes the receipt. Can be repeated."""
    commits = commit_records.read_all(output)
    receipt = make_receipt(plan, commits, seconds_wall=time.monotonic() - started, versions=planning.versions(), finished=time.time())
    named = {path for commit in commits for path in (commit.shard, commit.rejects) if path}
    present = {entry.path for directory in (DATA, REJECTS) for entry in output.list(directory)}
    missing = sorted(named - present)
    if missing:
        raise RunFailed(f"{len(missing)} files that commits name are gone, {output.display(missing[0])} among them; delete their commits to embed them again")
    output.delete(sorted(present - named))
    output.delete([entry.path for entry in output.list(OWN) if is_temporary(entry.path)])
    commit_records.compact(output, commits)
    receipt.save(output)
    return receipt


def clear(output: Storage) -> None:
    """Deletes a run: its own files and nothing else that stands beside them.

    Receipt and commits go first and the plan last: stopped in between, what is left is a run that has nothing done yet.
    """
    output.delete([RECEIPT, commit_records.COMPACTED])
    for directory in (commit_records.DIRECTORY, DATA, REJECTS):
        output.delete_tree(directory)
    output.delete_tree(f"{OWN}/plan")


def _refuse_foreign(output: Storage) -> None:
    """Raises OutputError if there is something in the output that is not the beginning of a run."""
    foreign = [entry.path for entry in output.list() if not entry.path.startswith(f"{OWN}/")]
    if foreign:
        raise OutputError(f"{output.url} is not empty ({foreign[0]} …) and holds no run of llmemb_ray; choose another output")


def _require_same(plan: Plan, settings: EmbedSettings, spec: EmbedderSpec, found: list[Any], output: Storage) -> None:
    """Raises RunMismatch if the settings and the corpus of now do not make the stored run's key."""
    parts = planning.identity(settings, spec, found, plan.selection)
    asked = replace(plan, space=parts["space"], engine=parts["engine"], corpus=parts["corpus"])
    changes = planning.file_changes(plan, found)
    if changes and asked.run_key != plan.run_key:
        shown = "\n".join(f"  {change}" for change in changes[:20])
        raise OutputError(
            f"the corpus is not the one that the run in {output.url} was planned for:\n{shown}\n"
            "Bring the old files back, or embed the new corpus into another output."
        )
    plan.require_same(asked, output.url)


def _warn_versions(plan: Plan, reporter: Reporter) -> None:
    now = planning.versions()
    changed = [f"{name} {then} → {now.get(name)}" for name, then in plan.versions.items() if now.get(name) != then]
    if changed:
        reporter.say(f"note: the run began with other versions ({', '.join(changed)}); its vectors may differ within the stated bounds")
