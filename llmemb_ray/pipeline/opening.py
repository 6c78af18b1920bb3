"""What a job finds before it works: model, corpus, the run that stands in OUTPUT; and the plan that it goes on with.

Invariant: what cannot work is told before anything in OUTPUT is changed. A plan is replaced only by the next
generation of itself, or where overwriting was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import pyarrow as pa

from llmemb_ray import engines
from llmemb_ray.config import EmbedSettings, parse_deadline
from llmemb_ray.corpus.columns import Selection
from llmemb_ray.corpus.files import Found
from llmemb_ray.embedders.embedder import EmbedderSpec, settle
from llmemb_ray.errors import CheckFailed, ConfigError, LlmembError, OutputError, RunMismatch
from llmemb_ray.pipeline import planning
from llmemb_ray.pipeline.estimates.estimate import estimate
from llmemb_ray.pipeline.parity.parity import PATH as PARITY
from llmemb_ray.pipeline.parity.parity import Parity
from llmemb_ray.representation.space import differences
from llmemb_ray.shards import commits as commit_records
from llmemb_ray.shards import reuse
from llmemb_ray.shards.plan import RECORD as PLAN_RECORD
from llmemb_ray.shards.plan import Plan
from llmemb_ray.shards.precision import PATH as CALIBRATION
from llmemb_ray.shards.precision import Calibration
from llmemb_ray.shards.receipt import PATH as RECEIPT
from llmemb_ray.shards.run import DATA, OWN, REJECTS, Run
from llmemb_ray.storage import Storage, absolute, locate, redact

FILES_SHOWN = 20

CHUNK_SLACK = 8
"""Tokens that a chunk may have more by itself than in its text, where a merge crossed its border."""

Say = Callable[[str], None]


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
    if settings.deadline and parse_deadline(settings.deadline, now=time.time()) <= time.time():
        raise ConfigError(f"deadline: {settings.deadline} has passed; give another, or leave it out")
    output = Storage(absolute(settings.output), settings.access)
    spec = settle(settings)
    if spec.backend == "auto" and (begun := None if settings.overwrite else Plan.load(output)):
        spec = replace(spec, backend=begun.engine["backend"], backend_why="the run was begun with it")
        spec.refuse()
    _check_chunks(settings, spec)
    if settings.dtype == "ubinary" and spec.dimension % 8:
        raise ConfigError(f"ubinary: {spec.dimension} dimensions are no whole number of bytes; keep {spec.dimension // 8 * 8} with dimensions")
    found, selection = planning.find(settings)
    if not settings.overwrite and not output.exists(PLAN_RECORD):
        _refuse_foreign(output)
    earlier = None
    if settings.reuse:
        if absolute(settings.reuse) == absolute(settings.output):
            raise ConfigError("reuse: names the output itself; name an earlier run, and write this one somewhere else")
        earlier = _other_run(settings.reuse, "reuse", settings)
        reuse.require_finished(earlier)
    return Prospect(output, spec, found, selection, _calibration(settings, spec, earlier), earlier)


def plan_of(settings: EmbedSettings, prospect: Prospect, *, actors: int, gpu: bool, say: Say) -> tuple[Plan, bool]:
    """The plan to work on, in OUTPUT; and whether it must be done before files that wait can be appended.

    actors, gpu: what will do the work. Raises RunMismatch or OutputError where the run that stands is another.
    """
    output, spec = prospect.output, prospect.spec
    stored = None if settings.overwrite else Plan.load(output)
    if stored is None:
        plan = planning.make_plan(settings, spec, prospect.found, prospect.selection, actors=actors, gpu=gpu, calibration=prospect.calibration)
        if prospect.earlier:
            reuse.check(prospect.earlier, plan)
        if settings.overwrite:
            clear(output)
        plan.save(output)
        _save_estimate(settings, spec, plan, output, say)
        return plan, False
    if prospect.calibration is None and stored.engine["calibration"] not in (None, "own"):
        prospect = replace(prospect, calibration=_own_calibration(stored, output))
    waiting = False
    if settings.append:
        stored, waiting = _append(stored, settings, prospect, actors, gpu, say)
    else:
        stored = _same(stored, settings, prospect)
    if prospect.earlier:
        reuse.check(prospect.earlier, stored)
    elif stored.settings.get("reuse") and Run(output).receipt is None:
        say(f"note: the run was begun with reuse of {stored.settings['reuse']}; without it nothing more is copied, and rows deleted since are not listed")
    return stored, waiting


def clear(output: Storage) -> None:
    """Deletes a run: its own files and nothing else that stands beside them.

    The receipt goes first, the calibration after all that was written with it, and the plan last: stopped in between, what is
    left is a run that has less done.
    """
    output.delete([RECEIPT])
    output.delete([commit_records.COMPACTED])
    for directory in (commit_records.DIRECTORY, DATA, REJECTS, reuse.DIRECTORY):
        output.delete_tree(directory)
    output.delete([reuse.DELETED, PARITY, CALIBRATION])
    output.delete_tree(f"{OWN}/plan")


def _check_chunks(settings: EmbedSettings, spec: EmbedderSpec) -> None:
    """Raises ConfigError if chunks of the tokens asked for would be cut again to fit their prompts."""
    if settings.chunk_tokens is None:
        return
    template, most = spec.prompter(settings.role).template_tokens, spec.representation.max_tokens
    assert most is not None
    room = most - template - CHUNK_SLACK
    if settings.chunk_tokens > room:
        raise ConfigError(
            f"chunk_tokens: {settings.chunk_tokens} tokens and the template's {template} may be more than max_tokens={most}; "
            + (f"chunks of up to {room} fit" if room > 0 else "raise max_tokens or shorten the template")
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


def _own_calibration(stored: Plan, output: Storage) -> Calibration | None:
    """The calibration that a run took from another one, which may be gone by now, as it stands in the run."""
    own = Calibration.load(output)
    return own if own is not None and own.digest == stored.engine["calibration"] else None


def _save_estimate(settings: EmbedSettings, spec: EmbedderSpec, plan: Plan, output: Storage, say: Say) -> None:
    """Keeps what the run is expected to be, for the report to compare; a corpus that cannot be sampled is still embedded."""
    try:
        estimate(settings, spec, plan).save(output)
    except (LlmembError, pa.ArrowException) as error:
        say(f"note: no estimate is kept with the run: {error}")


def _append(plan: Plan, settings: EmbedSettings, prospect: Prospect, actors: int, gpu: bool, say: Say) -> tuple[Plan, bool]:
    """The next generation of a finished run's plan, saved; the plan itself where there is nothing new, or where it must be finished first."""
    output, spec = prospect.output, prospect.spec
    parts = planning.identity(settings, spec, plan.files, plan.selection, prospect.calibration)
    plan.require_same(replace(plan, space=parts["space"], engine=parts["engine"], corpus=parts["corpus"]), output.url)
    known = {file.url: file for file in plan.files}
    others = [file for file in prospect.found if file.url in known and (file.size, file.version) != (known[file.url].size, known[file.url].version)]
    changed = [file for file in others if known[file.url].problem is None]
    if changed:
        shown = "\n".join(f"  {redact(file.url)} changed" for file in changed[:FILES_SHOWN])
        raise OutputError(
            f"append: files that the run in {output.url} has embedded are others now:\n{shown}\n"
            "Bring the old files back, or embed the corpus into another output with --reuse, which copies what has not changed."
        )
    new = [file for file in prospect.found if file.url not in known or file in others]
    if not new:
        say("append: the run has all files of the input already")
        return plan, False
    _refuse_renamed(plan, new, settings)
    done = commit_records.committed_units(output)
    missing = sum(unit.name not in done for unit in plan.units())
    if missing:
        say(f"append: {len(new):,} new files wait for {missing:,} units that an earlier command left")
        return plan, True
    extended = planning.make_plan(settings, spec, new, plan.selection, actors=actors, gpu=gpu, calibration=prospect.calibration, appended_to=plan)
    extended.save(output)
    say(f"append: {len(new):,} new files with {extended.rows - plan.rows:,} rows")
    return extended, False


def _refuse_renamed(plan: Plan, new: list[Found], settings: EmbedSettings) -> None:
    """Raises OutputError if a new file is one that the run has embedded under a name that is gone: its rows would be doubled."""
    embedded = {(file.size, file.version): file for file in plan.files if file.problem is None}
    for file in new:
        twin = embedded.get((file.size, file.version))
        if twin is None:
            continue
        storage, name = locate(twin.url, settings.access)
        if not storage.exists(name):
            raise OutputError(
                f"append: {redact(file.url)} is the file that the run has embedded as {redact(twin.url)}, which is gone; "
                "give it its old name back, or embed the corpus into another output with --reuse"
            )


def _refuse_foreign(output: Storage) -> None:
    """Raises OutputError if there is something in the output that is not the beginning of a run."""
    foreign = [entry.path for entry in output.list() if not entry.path.startswith(f"{OWN}/")]
    if foreign:
        raise OutputError(f"{output.url} is not empty ({foreign[0]} …) and holds no run of llmemb_ray; choose another output")


def adopt(plan: Plan, output: Storage, compared: Parity, say: Say) -> None:
    """Stores a plan whose backend was changed, now that both were compared; the plan that stands is left alone. Raises CheckFailed."""
    stored = Plan.load(output)
    if stored is not None and stored.run_key != plan.run_key:
        before: engines.Backend = stored.engine["backend"]
        for group in compared.groups:
            if engines.TITLES[before] in group.measured.left_out:
                why = group.measured.left_out[engines.TITLES[before]]
                raise CheckFailed(f"accept_backend_change: backend {before}, which the run was begun with, could not be compared here: {why}")
        plan.save(output)
        say(f"accept_backend_change: the run goes on with backend {plan.engine['backend']}; what {stored.engine['backend']} has embedded stays")


def _same(plan: Plan, settings: EmbedSettings, prospect: Prospect) -> Plan:
    """The stored plan, or, where that is accepted, with the backend of now. Raises RunMismatch if settings and corpus of now do not make its run key."""
    found = planning.in_order_of(plan, prospect.found)
    parts = planning.identity(settings, prospect.spec, found, plan.selection, prospect.calibration)
    asked = replace(plan, space=parts["space"], engine=parts["engine"], corpus=parts["corpus"])
    changes = planning.file_changes(plan, found)
    if changes and asked.run_key != plan.run_key:
        shown = "\n".join(f"  {change}" for change in changes[:FILES_SHOWN])
        raise OutputError(
            f"the corpus is not the one that the run in {prospect.output.url} was planned for:\n{shown}\n"
            "Bring the old files back, add new ones with --append, or embed the corpus into another output (--reuse copies what has not changed)."
        )
    as_begun = replace(asked, engine=asked.engine | {"backend": plan.engine["backend"]})
    if asked.run_key != plan.run_key == as_begun.run_key:
        return _on_another_backend(plan, asked, settings, prospect.output)
    plan.require_same(asked, prospect.output.url)
    return plan


def _on_another_backend(plan: Plan, asked: Plan, settings: EmbedSettings, output: Storage) -> Plan:
    """The plan of a run that is to go on with another backend, not stored yet. Raises RunMismatch where that is not accepted."""
    if not settings.accept_backend_change:
        ours, theirs = asked.engine["backend"], plan.engine["backend"]
        raise RunMismatch(
            f"{output.url} holds a run begun with backend {theirs}, asked for now is {ours}; all else is the same. Set backend {theirs}; "
            "or let the backends be compared on some rows, and go on if they agree: --accept-backend-change --check-parity 64"
        )
    if {unit.name for unit in plan.units()} <= commit_records.committed_units(output):
        return plan  # Nothing is left to embed.
    return replace(plan, engine=asked.engine, earlier_run_keys=[*plan.earlier_run_keys, plan.run_key])
