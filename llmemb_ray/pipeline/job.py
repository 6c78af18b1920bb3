"""The embedding job from settings to receipt.

Invariant: what is done stands in commits and nowhere else, so the job can be killed at any moment and the same
call continues it. A finished run is left alone: calling again returns its receipt.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from llmemb_ray import engines
from llmemb_ray.config import EmbedSettings, parse_actors
from llmemb_ray.embedders import models
from llmemb_ray.errors import OutputError, RunFailed, RunStopped, UnhealthyVectors
from llmemb_ray.pipeline import metrics, opening, planning
from llmemb_ray.pipeline.limits import Limits
from llmemb_ray.pipeline.notice import Ended, Notice
from llmemb_ray.pipeline.opening import Prospect
from llmemb_ray.pipeline.parity import parity
from llmemb_ray.pipeline.prepare import Job, ReadTask
from llmemb_ray.pipeline.progress import Counts, Reporter
from llmemb_ray.shards import commits as commit_records
from llmemb_ray.shards import lease, reuse
from llmemb_ray.shards.commits import Commit
from llmemb_ray.shards.plan import Plan
from llmemb_ray.shards.precision import PATH as CALIBRATION
from llmemb_ray.shards.precision import Calibration
from llmemb_ray.shards.receipt import COLLAPSED, NOT_FINITE, Receipt, make_receipt
from llmemb_ray.shards.reuse import Reuse
from llmemb_ray.shards.run import DATA, OWN, REJECTS, Run
from llmemb_ray.storage import Storage, is_temporary
from llmemb_ray.written import command_line

if TYPE_CHECKING:
    from llmemb_ray.pipeline.shape import Shape

FAILURES_SHOWN = 5

WINDOW_UNITS = 4000
"""Units in one execution of Ray Data, which bounds what the driver holds."""

UNITS_OF_AN_ACTOR = 200
"""Of them for each actor at least: the next execution loads the models anew."""

CLIPPED = 0.01
"""Share of values clipped from which on a run is warned of; a sample of 2,048 vectors like the corpus leaves out 0.001."""

BROKEN_SHARE, BROKEN_LEAST = 0.1, 100
"""A job stops at once when this share of its rows, and so many, have vectors that are not finite."""


class Execution(Protocol):
    """Something that runs reading tasks: Ray (``graph``) or this process (``inprocess``)."""

    def run(self, tasks: list[ReadTask]) -> Iterator[tuple[str, Commit | None, str | None]]: ...

    def stop(self) -> None: ...

    def at_work(self) -> bool: ...

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
        prospect = opening.look(settings)  # Before Ray is started: what is wrong with the input is told at once.
        if settings.trust_remote_code:
            reporter.say(f"trust_remote_code is set: Python code from {settings.model} runs in this job")
        if parse_actors(settings.actors) == (0, 0):
            return _run(settings, prospect, None, reporter)
        from llmemb_ray.pipeline.shape import cluster

        with cluster(settings) as shape:
            return _run(settings, prospect, shape, reporter)


def _run(settings: EmbedSettings, prospect: Prospect, shape: Shape | None, reporter: Reporter) -> Receipt:
    started = time.monotonic()
    gpu = shape.on_gpu if shape else models.default_device() == "cuda"
    share = shape.gpus / prospect.spec.tensor_parallel if shape and shape.on_gpu else 1.0
    spec = replace(prospect.spec, gpu_share=share).on(gpu)
    prospect = replace(prospect, spec=spec)
    if settings.backend == "auto" and (spec.backend == "vllm" or engines.vllm_version()):  # Where there was a choice.
        reporter.say(f"backend: {spec.backend}, because {spec.backend_why}")
    with Notice().listening() as notice, lease.LeaseHolder(prospect.output, reporter.snapshot, waiting=reporter.say) as held:
        while True:
            plan, waiting = opening.plan_of(settings, prospect, actors=shape.most if shape else 1, gpu=gpu, say=reporter.say)
            receipt = Run(prospect.output).receipt
            if receipt is None:
                _warn_versions(plan, reporter)
                _embed_units(settings, plan, shape, prospect, reporter, held, notice)
                _require_lease(held)
                receipt = finish(plan, prospect.output, started, earlier=prospect.earlier)
            if not waiting:
                break
    _warn_of_vectors(receipt, reporter)
    receipt.check_health(settings.max_nan, prospect.output.url)
    receipt.check_rejects(settings.max_reject_rate, settings.reject_floor, prospect.output.url)
    return receipt


def _require_lease(held: lease.LeaseHolder) -> None:
    if held.lost:
        raise OutputError(f"{held.lost}; this driver stops, what it committed stands")


def _warn_of_vectors(receipt: Receipt, reporter: Reporter) -> None:
    if receipt.mean_cosine > COLLAPSED and receipt.vectors > 1:
        reporter.say(
            f"warning: the vectors are nearly all alike (mean cosine of pairs {receipt.mean_cosine:.3f}): they tell texts apart badly; "
            "look at the prompt, the pooling and the layer (llmemb report shows the vectors)"
        )
    if receipt.clipped_share > CLIPPED:
        reporter.say(
            f"warning: {receipt.clipped_share:.1%} of the values lay outside the calibration's ranges and were clipped: its sample is unlike the corpus; "
            "take the ranges of another run (calibration), or write float16"
        )


def _embed_units(
    settings: EmbedSettings, plan: Plan, shape: Shape | None, prospect: Prospect, reporter: Reporter, held: lease.LeaseHolder, notice: Notice
) -> None:
    """Runs every unit without a commit. Raises RunFailed if some could not be done, RunStopped at a deadline, budget or signal."""
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
    if plan.calibrates and done and Calibration.load(output) is None:
        raise OutputError(
            f"{output.display(CALIBRATION)} is gone, and the units that are committed were written with it; bring it back, or begin anew with overwrite"
        )
    job = Job.of(plan, prospect.spec, output, settings.access, dedup=settings.dedup == "exact", reuse=_reuse(plan, prospect, reporter))
    limits = Limits.of(settings, gpus=shape.gpus if shape else 0)
    if settings.check_parity is not None:
        limits.tick(1)
        compared = parity.of_job(settings, job, plan, output, shape=shape, gpu=shape.on_gpu if shape else models.default_device() == "cuda", say=reporter.say)
        opening.adopt(plan, output, compared, reporter.say)
    limits.tick(0 if shape else 1)
    execution: Execution
    if shape is None:
        from llmemb_ray.pipeline import inprocess

        execution = inprocess.Execution(job)
        counts.actors = 1
    else:
        from llmemb_ray.pipeline import graph

        execution = graph.Execution(job, settings, shape)

    meter = metrics.Meter("embed", plan.run_key)

    def live() -> tuple[int, int, int]:
        rows, tokens, actors = execution.live()
        meter.standing(
            units={"planned": counts.units_total, "committed": counts.units, "failed": counts.failed_units},
            rows={"planned": counts.rows_total, "committed": counts.rows},
        )
        return rows + committed_rows, tokens, actors

    failures: dict[str, str] = {}
    with (
        contextlib.suppress(Ended),  # There is a reason then.
        reporter.watching(live),
        limits.watching(lambda: execution.live()[2], execution.stop),
        notice.finishing(execution.stop, execution.at_work, grace=settings.stop_grace),
    ):
        for tasks in windows(plan, done, settings.window_units or window_units(shape.most if shape else 1)):
            for unit, commit, error in execution.run(tasks):
                if commit is not None:
                    meter.committed(commit)
                    counts.units += 1
                    counts.rows += commit.rows
                    counts.tokens += commit.tokens
                    counts.rejects += commit.rejected
                    counts.storage_retries += commit.storage_retries
                    counts.not_finite += commit.reasons.get(NOT_FINITE, 0)
                    limits.took(commit.seconds_model + commit.seconds_wait + commit.seconds_write)
                else:
                    meter.unit_failed()
                    failures[unit] = str(error)
                    counts.failed_units = len(failures)
                _require_lease(held)
                _stop_if_broken(counts.not_finite, counts.rows - committed_rows, settings.max_nan)
            if limits.reason or notice.reason:
                break
    reason = limits.reason or notice.reason
    if reason and counts.units < counts.units_total and not failures:
        raise RunStopped(
            f"stopped because {reason}: {counts.units:,} of {counts.units_total:,} units are committed, nothing is lost. To continue:\n"
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


def window_units(actors: int) -> int:
    """Units of a window for so many actors, where no setting says otherwise."""
    return max(WINDOW_UNITS, UNITS_OF_AN_ACTOR * actors)


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
    assert earlier.receipt is not None
    reporter.say(f"reuse: looking for prompts among the {earlier.receipt.vectors:,} vectors of {earlier.url}")
    broken = reuse.build_index(earlier, prospect.output)
    if broken:
        reporter.say(f"note: {len(broken)} shards of {earlier.url} are gone or broken ({broken[0]} …); their vectors are made anew")
    return Reuse(earlier.storage, earlier.precision, prospect.output, raw=earlier.plan.dtype == plan.dtype)


def finish(plan: Plan, output: Storage, started: float, *, earlier: Run | None = None) -> Receipt:
    """Checks the accounts, removes what no commit names, compacts the commits, writes the receipt. Can be repeated.

    earlier: the run that vectors were copied from; its rows that this one lacks are listed.
    """
    commits = commit_records.read_all(output)
    reused: dict[str, Any] = {}
    if earlier is None:
        output.delete([reuse.DELETED])  # Of an earlier generation: what it lists may have come back.
    else:
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


def _warn_versions(plan: Plan, reporter: Reporter) -> None:
    now = planning.versions()
    changed = [f"{name} {then} → {now.get(name)}" for name, then in plan.versions.items() if now.get(name) != then]
    if changed:
        reporter.say(f"note: the run began with other versions ({', '.join(changed)}); its vectors may differ within the stated bounds")
