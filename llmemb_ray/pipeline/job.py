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
from llmemb_ray.errors import ConfigError, LlmembError, OutputError, RunFailed, RunMismatch, RunStopped, UnhealthyVectors
from llmemb_ray.pipeline import planning
from llmemb_ray.pipeline.estimates.estimate import estimate
from llmemb_ray.pipeline.limits import Limits
from llmemb_ray.pipeline.prepare import Job, ReadTask
from llmemb_ray.pipeline.progress import Counts, Reporter
from llmemb_ray.representation.space import differences
from llmemb_ray.shards import commits as commit_records
from llmemb_ray.shards import lease, reuse
from llmemb_ray.shards.commits import Commit
from llmemb_ray.shards.plan import RECORD as PLAN_RECORD
from llmemb_ray.shards.plan import Plan
from llmemb_ray.shards.precision import PATH as CALIBRATION
from llmemb_ray.shards.precision import Calibration
from llmemb_ray.shards.receipt import COLLAPSED, NOT_FINITE, Receipt, make_receipt
from llmemb_ray.shards.receipt import PATH as RECEIPT
from llmemb_ray.shards.reuse import Reuse
from llmemb_ray.shards.run import DATA, OWN, REJECTS, Run
from llmemb_ray.storage import Storage, absolute, is_temporary
from llmemb_ray.written import command_line

if TYPE_CHECKING:
    from llmemb_ray.pipeline.graph import Shape

FAILURES_SHOWN = 5

BROKEN_SHARE, BROKEN_LEAST = 0.1, 100
"""A job stops at once when this share of its rows, and so many, have vectors that are not finite."""


class Execution(Protocol):
    """Something that runs reading tasks: Ray (``graph``) or this process (``inprocess``)."""

    def run(self, tasks: list[ReadTask]) -> Iterator[tuple[str, Commit | None, str | None]]: ...

    def stop(self) -> None: ...

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
    calibration: Calibration | None
    """Of another run, whose codes this one's are to mean the same as."""
    earlier: Run | None
    """The run that vectors are copied from."""


def look(settings: EmbedSettings) -> Prospect:
    """Settles the model and lists corpus and output. Raises ConfigError, InputError, ModelError or OutputError."""
    output = Storage(absolute(settings.output), settings.access)
    spec = settle(settings)
    _check_chunks(settings, spec)
    if settings.dtype == "ubinary" and spec.dimension % 8:
        raise ConfigError(f"ubinary: {spec.dimension} dimensions are no whole number of bytes; keep {spec.dimension // 8 * 8} with dimensions")
    found, selection = planning.find(settings)
    if not settings.overwrite and not output.exists(PLAN_RECORD):
        _refuse_foreign(output)
    earlier = _other_run(settings.reuse, "reuse", settings) if settings.reuse else None
    return Prospect(output, spec, found, selection, _calibration(settings, spec, earlier), earlier)


def _check_chunks(settings: EmbedSettings, spec: EmbedderSpec) -> None:
    """Raises ConfigError if chunks of the tokens asked for would be cut again to fit their prompts."""
    if settings.chunk_tokens is None:
        return
    template, most = spec.prompter(settings.role).template_tokens, spec.representation.max_tokens
    assert most is not None
    if settings.chunk_tokens + template > most:
        raise ConfigError(
            f"chunk_tokens: {settings.chunk_tokens} tokens and the template's {template} are more than max_tokens={most}; chunks of {most - template} fit"
        )


def _other_run(url: str, setting: str, settings: EmbedSettings) -> Run:
    try:
        return Run(Storage(absolute(url), settings.access))
    except OutputError as error:
        raise OutputError(f"{setting}: {error}") from error


def _calibration(settings: EmbedSettings, spec: EmbedderSpec, earlier: Run | None) -> Calibration | None:
    """The calibration of the run that the settings name, or of the one whose codes are copied. Raises OutputError or RunMismatch."""
    if settings.calibration:
        other = _other_run(settings.calibration, "calibration", settings)
    elif earlier is not None and earlier.plan.calibrates and (earlier.plan.dtype, earlier.plan.engine["centre"]) == (settings.dtype, settings.centre):
        other = earlier
    else:
        return None
    calibration = other.precision.calibration if other.plan.calibrates else None
    if calibration is None:
        raise OutputError(f"calibration: the run in {other.url} has none (its dtype is {other.plan.dtype}); name a run of int8 or centred ubinary")
    changed = [f"  {name}: that run has {there!r}, this one {here!r}" for name, here, there in differences(spec.space.to_dict(), other.plan.space)]
    if changed:
        raise RunMismatch(f"calibration: the run in {other.url} is in another vector space:\n" + "\n".join(changed))
    return calibration


def _run(settings: EmbedSettings, prospect: Prospect, shape: Shape | None, reporter: Reporter) -> Receipt:
    started = time.monotonic()
    output, found = prospect.output, prospect.found
    gpu = shape.on_gpu if shape else models.default_device() == "cuda"
    spec = replace(prospect.spec, compute_dtype=models.resolve_dtype(prospect.spec.compute_dtype, "cuda" if gpu else "cpu"))
    with lease.LeaseHolder(output, reporter.snapshot, waiting=reporter.say) as held:
        if settings.overwrite:
            clear(output)
        plan = Plan.load(output)
        sizing: dict[str, Any] = {"actors": shape.most if shape else 1, "gpu": gpu, "calibration": prospect.calibration}
        if plan is None:
            plan = planning.make_plan(settings, spec, found, prospect.selection, **sizing)
            plan.save(output)
            _save_estimate(settings, spec, plan, output, reporter)
        elif settings.append:
            plan = _append(plan, settings, spec, prospect, sizing, reporter)
        else:
            _require_same(plan, settings, spec, prospect)
        receipt = Run(output).receipt
        if receipt is None:
            _warn_versions(plan, reporter)
            _embed_units(settings, plan, spec, shape, prospect, reporter, held)
            receipt = finish(plan, output, started, earlier=prospect.earlier)
    if receipt.mean_cosine > COLLAPSED and receipt.vectors > 1:
        reporter.say(
            f"warning: the vectors are nearly all alike (mean cosine of pairs {receipt.mean_cosine:.3f}): they tell texts apart badly; "
            "look at the prompt, the pooling and the layer (llmemb report shows the vectors)"
        )
    receipt.check_health(settings.max_nan, output.url)
    receipt.check_rejects(settings.max_reject_rate, settings.reject_floor, output.url)
    return receipt


def _save_estimate(settings: EmbedSettings, spec: EmbedderSpec, plan: Plan, output: Storage, reporter: Reporter) -> None:
    """Keeps what the run is expected to be, for the report to compare; a corpus that cannot be sampled is still embedded."""
    try:
        estimate(settings, spec, plan).save(output)
    except LlmembError as error:
        reporter.say(f"note: no estimate is kept with the run: {error}")


def _append(plan: Plan, settings: EmbedSettings, spec: EmbedderSpec, prospect: Prospect, sizing: dict[str, Any], reporter: Reporter) -> Plan:
    """The next generation of a finished run's plan, saved; the plan itself where there is nothing new."""
    output, found = prospect.output, prospect.found
    parts = planning.identity(settings, spec, plan.files, plan.selection, prospect.calibration)
    plan.require_same(replace(plan, space=parts["space"], engine=parts["engine"], corpus=parts["corpus"]), output.url)
    changed = [change for change in planning.file_changes(plan, found) if change.endswith(" changed")]
    if changed:
        shown = "\n".join(f"  {change}" for change in changed[:20])
        raise OutputError(
            f"append: files that the run in {output.url} has embedded are others now:\n{shown}\n"
            "Bring the old files back, or embed the corpus into another output with --reuse, which copies what has not changed."
        )
    known = {file.url for file in plan.files}
    new = [file for file in found if file.url not in known]
    if not new:
        reporter.say("append: the run has all files of the input already")
        return plan
    done = commit_records.committed_units(output)
    missing = sum(unit.name not in done for unit in plan.units())
    if missing:
        raise OutputError(f"append: {missing} units of the run in {output.url} are not done; finish it first, with the command that began it")
    extended = planning.make_plan(settings, spec, new, plan.selection, appended_to=plan, **sizing)
    extended.save(output)
    reporter.say(f"append: {len(new):,} new files with {extended.rows - plan.rows:,} rows")
    return extended


def _embed_units(
    settings: EmbedSettings, plan: Plan, spec: EmbedderSpec, shape: Shape | None, prospect: Prospect, reporter: Reporter, held: lease.LeaseHolder
) -> None:
    """Runs every unit without a commit. Raises RunFailed if some could not be done, RunStopped at a deadline or budget."""
    counts, output = reporter.counts, prospect.output
    done = commit_records.committed_units(output)
    committed_rows = sum(unit.rows for unit in plan.units() if unit.name in done)
    counts.units, counts.rows, counts.rows_total = len(done), committed_rows, plan.rows
    counts.units_total = sum(1 for _ in plan.units())
    if done:
        reporter.say(f"continuing: {counts.units:,} of {counts.units_total:,} units are already committed")
    if counts.units == counts.units_total:
        return
    if prospect.calibration is not None and Calibration.load(output) is None:
        prospect.calibration.save(output)
    job = Job.of(plan, spec, output, settings.access, dedup=settings.dedup == "exact", reuse=_reuse(plan, prospect, reporter))
    limits = Limits.of(settings, gpus=shape.gpus if shape else 0)
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
    with reporter.watching(live), limits.watching(lambda: execution.live()[2], execution.stop):
        for tasks in windows(plan, done, settings.window_units):
            for unit, commit, error in execution.run(tasks):
                if commit is not None:
                    counts.units += 1
                    counts.rows += commit.rows
                    counts.tokens += commit.tokens
                    counts.rejects += commit.rejected
                    counts.storage_retries += commit.storage_retries
                    counts.not_finite += commit.reasons.get(NOT_FINITE, 0)
                    limits.took(commit.seconds_model + commit.seconds_write)
                else:
                    failures[unit] = str(error)
                    counts.failed_units = len(failures)
                if held.lost:
                    raise OutputError(f"{held.lost}; this driver stops, what it committed stands")
                _stop_if_broken(counts.not_finite, counts.rows - committed_rows, settings.max_nan)
            if limits.reason:
                break
    if limits.reason and counts.units < counts.units_total and not failures:
        raise RunStopped(
            f"stopped because {limits.reason}: {counts.units:,} of {counts.units_total:,} units are committed, nothing is lost. To continue:\n"
            f"  {command_line(settings)}"
        )
    if failures:
        shown = "\n".join(f"  unit {unit}: {error}" for unit, error in list(failures.items())[:FAILURES_SHOWN])
        more = f"\n  … and {len(failures) - FAILURES_SHOWN} more" if len(failures) > FAILURES_SHOWN else ""
        raise RunFailed(
            f"{len(failures)} of {counts.units_total} units failed, the others are committed:\n{shown}{more}\n"
            "When the cause is mended, run the same command again: it does only what is missing."
        )


def _stop_if_broken(not_finite: int, rows: int, max_nan: int) -> None:
    """Raises UnhealthyVectors if so many vectors are not finite that going on would only cost."""
    if not_finite > max(max_nan, BROKEN_LEAST, BROKEN_SHARE * rows):
        raise UnhealthyVectors(
            f"{not_finite} of {rows} rows have a vector that is not finite: the model does not work as it is loaded. "
            "Try another compute_dtype (bfloat16 or float32, not float16); what is committed stands, begin anew with overwrite"
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


def _reuse(plan: Plan, prospect: Prospect, reporter: Reporter) -> Reuse | None:
    """What workers need to copy vectors of the earlier run, its index made."""
    earlier = prospect.earlier
    if earlier is None:
        return None
    reuse.check(earlier, plan)
    assert earlier.receipt is not None
    reporter.say(f"reuse: looking for prompts among the {earlier.receipt.vectors:,} vectors of {earlier.url}")
    reuse.build_index(earlier, prospect.output)
    return Reuse(earlier.storage, earlier.precision, prospect.output, raw=earlier.plan.dtype == plan.dtype)


def finish(plan: Plan, output: Storage, started: float, *, earlier: Run | None = None) -> Receipt:
    """Checks the accounts, removes what no commit names, compacts the commits, writes the receipt. Can be repeated.

    earlier: the run that vectors were copied from; its rows that this one lacks are listed.
    """
    commits = commit_records.read_all(output)
    reused: dict[str, Any] = {}
    if earlier is not None:
        deleted = reuse.write_deletions(earlier, Run(output))
        reused = {"run": earlier.url, "deleted": deleted, "list": reuse.DELETED if deleted else None}
    receipt = make_receipt(plan, commits, seconds_wall=time.monotonic() - started, versions=planning.versions(), finished=time.time(), reuse=reused)
    named = {path for commit in commits for path in (commit.shard, commit.rejects) if path}
    present = {entry.path for directory in (DATA, REJECTS) for entry in output.list(directory)}
    missing = sorted(named - present)
    if missing:
        raise RunFailed(f"{len(missing)} files that commits name are gone, {output.display(missing[0])} among them; delete their commits to embed them again")
    output.delete(sorted(present - named))
    output.delete([entry.path for entry in output.list(OWN) if is_temporary(entry.path)])
    commit_records.compact(output, commits)
    output.delete_tree(reuse.DIRECTORY)
    receipt.save(output)
    return receipt


def clear(output: Storage) -> None:
    """Deletes a run: its own files and nothing else that stands beside them.

    Receipt and commits go first and the plan last: stopped in between, what is left is a run that has nothing done yet.
    """
    output.delete([RECEIPT, commit_records.COMPACTED, CALIBRATION, reuse.DELETED])
    for directory in (commit_records.DIRECTORY, DATA, REJECTS, reuse.DIRECTORY):
        output.delete_tree(directory)
    output.delete_tree(f"{OWN}/plan")


def _refuse_foreign(output: Storage) -> None:
    """Raises OutputError if there is something in the output that is not the beginning of a run."""
    foreign = [entry.path for entry in output.list() if not entry.path.startswith(f"{OWN}/")]
    if foreign:
        raise OutputError(f"{output.url} is not empty ({foreign[0]} …) and holds no run of llmemb_ray; choose another output")


def _require_same(plan: Plan, settings: EmbedSettings, spec: EmbedderSpec, prospect: Prospect) -> None:
    """Raises RunMismatch if the settings and the corpus of now do not make the stored run's key."""
    output, found = prospect.output, planning.in_order_of(plan, prospect.found)
    parts = planning.identity(settings, spec, found, plan.selection, prospect.calibration)
    asked = replace(plan, space=parts["space"], engine=parts["engine"], corpus=parts["corpus"])
    changes = planning.file_changes(plan, found)
    if changes and asked.run_key != plan.run_key:
        shown = "\n".join(f"  {change}" for change in changes[:20])
        raise OutputError(
            f"the corpus is not the one that the run in {output.url} was planned for:\n{shown}\n"
            "Bring the old files back, add new ones with --append, or embed the corpus into another output (--reuse copies what has not changed)."
        )
    plan.require_same(asked, output.url)


def _warn_versions(plan: Plan, reporter: Reporter) -> None:
    now = planning.versions()
    changed = [f"{name} {then} → {now.get(name)}" for name, then in plan.versions.items() if now.get(name) != then]
    if changed:
        reporter.say(f"note: the run began with other versions ({', '.join(changed)}); its vectors may differ within the stated bounds")
