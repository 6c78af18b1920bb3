"""A synthesis from settings to receipt: task pool, units of requests, duplicates, accounts.

Invariant: what is done stands in commits, and what was answered in kept answers, so the job can be killed at any moment and the same call
continues it. A finished run is left alone; one that is asked for more goes on where it ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llmemb_ray.config import SynthesizeSettings, parse_actors
from llmemb_ray.errors import OutputError, RunFailed, RunStopped
from llmemb_ray.evaluation import contamination
from llmemb_ray.generation import opening
from llmemb_ray.generation.generator import Answer, Prompt
from llmemb_ray.generation.tokens import ModelSpec
from llmemb_ray.pipeline import metrics, planning
from llmemb_ray.pipeline.notice import GRACE_SECONDS, Ended, Notice
from llmemb_ray.pipeline.progress import Counts, Reporter
from llmemb_ray.representation.space import digest
from llmemb_ray.shards import lease
from llmemb_ray.shards.run import OWN
from llmemb_ray.storage import Storage, absolute, is_temporary
from llmemb_ray.synthesis import brainstorming, duplicates, execution, languages, tasks
from llmemb_ray.synthesis.brainstorming import Brainstorming, Brief
from llmemb_ray.synthesis.commits import RECORDS, Made
from llmemb_ray.synthesis.drawing import Draw
from llmemb_ray.synthesis.execution import Execution, InProcess
from llmemb_ray.synthesis.families import FAMILIES, WEIGHTS
from llmemb_ray.synthesis.output import remove, require_free
from llmemb_ray.synthesis.prompts import Prompts
from llmemb_ray.synthesis.receipt import Receipt, no_examples, reconcile
from llmemb_ray.synthesis.record import PATH, Record
from llmemb_ray.synthesis.spending import Spending
from llmemb_ray.synthesis.tasks import Pool, Task
from llmemb_ray.synthesis.units import DATA, REJECTS, WRITTEN, Work
from llmemb_ray.written import command_line, given_settings

FAILURES_SHOWN = 5

HOPELESS = 200
"""Requests of this command, none of which became an example, that end it."""


def synthesize(settings: SynthesizeSettings, *, quiet: bool = False) -> Receipt | Brainstorming:
    """Makes examples in ``settings.out``; continues where it was stopped. With ``tasks_only`` the accounts of the tasks.

    Raises ConfigError, InputError, ModelError, OutputError (RunMismatch for other settings), StorageError, RunFailed where units are left
    that nobody answered, RunStopped where the budget is spent.
    """
    settings = settings.model_copy(update={"out": settings.out.rstrip("/")})
    with Reporter(Counts(), quiet=quiet) as reporter:
        output = Storage(absolute(settings.out), settings.access)
        require_free(output)
        asked = Asked.of(settings)
        with lease.LeaseHolder(output, reporter.snapshot, waiting=reporter.say) as held:
            made = _Job(settings, asked, output, reporter, held, Notice()).run()
    if isinstance(made, Receipt):
        made.require_examples(output)
    return made


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the settings ask for, read and settled: all that decides the examples, but for the pool."""

    brief: Brief
    families: dict[str, float]
    languages: dict[str, float]
    checks: dict[str, Any]
    """What else decides which examples are accepted."""
    contaminated: frozenset[str] = field(repr=False)
    specs: dict[str, ModelSpec] | None
    """Device -> the model there; None for an endpoint."""
    names: tuple[str, ...]
    """Of the generator, on each device that it may be asked on."""

    @classmethod
    def of(cls, settings: SynthesizeSettings) -> Asked:
        """Raises ConfigError, InputError or ModelError."""
        prompts = Prompts.load(settings.prompts, settings.access)
        weights = settings.families or dict(WEIGHTS)
        given = tuple(task for url in settings.tasks for task in tasks.read_file(absolute(url), settings.access))
        needing = tuple(name for name, family in FAMILIES.items() if family.asymmetric and weights.get(name))
        contaminated = contamination.keys(settings.contamination, settings.access) if settings.contamination else frozenset[str]()
        checks = {
            "strict": settings.strict,
            "check_language": settings.check_language,
            "near_duplicates": settings.near_duplicates,
            "contamination": digest(sorted(contaminated)) if contaminated else None,
            "max_characters": settings.max_characters,
            "keep_raw": settings.keep_raw,
            "unit_rows": settings.unit_rows,
        }
        brief = Brief(families=needing, given=given, each=settings.tasks_per_family, seed=settings.seed, prompts=prompts)
        spoken = settings.languages or dict(languages.SHARES)
        to_come = tuple(Task(family=family, task=family, source="") for family in needing) if brief.each else ()
        # What cannot be drawn from is refused before tasks are paid for.
        Draw(seed=settings.seed, families=weights, languages=spoken, pool=Pool((*given, *to_come)), prompts=prompts, generator_name="")
        specs = None if settings.model is None else opening.specs_of(settings)
        return cls(
            brief=brief,
            families=weights,
            languages=spoken,
            checks=checks,
            contaminated=contaminated,
            specs=specs,
            names=(opening.name_of(settings),) if specs is None else tuple(spec.name for spec in specs.values()),
        )

    def draw(self, pool: Pool, generator: str) -> Draw:
        return Draw(seed=self.brief.seed, families=self.families, languages=self.languages, pool=pool, prompts=self.brief.prompts, generator_name=generator)

    def identity(self, pool: Pool, generator: str) -> dict[str, Any]:
        """What the run key is made of."""
        return self.draw(pool, generator).identity | {"checks": self.checks, "brainstorming": self.brief.identity(generator)}


class _Job:
    def __init__(self, settings: SynthesizeSettings, asked: Asked, output: Storage, reporter: Reporter, held: lease.LeaseHolder, notice: Notice) -> None:
        self._settings, self._asked, self._output, self._reporter, self._held, self._notice = settings, asked, output, reporter, held, notice
        self._started = time.monotonic()

    def run(self) -> Receipt | Brainstorming:
        if self._settings.overwrite:
            remove(self._output)
        record = Record.load(self._output)
        pool = brainstorming.standing(self._output, [self._asked.brief.identity(name) for name in self._asked.names])
        if pool is not None and (done := self._done(record, pool)):
            return done
        with self._executing() as (execution, generator), self._notice.listening():  # Ray, once it starts, would hear signals itself.
            if pool is None:
                self._require_same_tasks(record, generator)
                pool = self._brainstorm(execution, generator)
                if self._settings.tasks_only:
                    return self._accounts()
            identity = self._asked.identity(pool, generator)
            if record is None:
                record = self._new_record(identity)
            record.require(identity, self._output.url)
            record = record.up_to(self._settings.count)
            if record.count > self._settings.count:
                self._reporter.say(f"note: {record.count:,} examples were asked for before; all of them will be made")
            record.save(self._output)
            self._generate(execution, record, pool)
        return self._finish(record)

    @cached_property
    def _spending(self) -> Spending:
        """Of all commands on this output."""
        commits = RECORDS.read_all(self._output)
        before = [brainstorming.kept_tokens(self._output), execution.kept_tokens(self._output, {commit.unit for commit in commits})]
        before += [(commit.prompt_tokens, commit.completion_tokens) for commit in commits]
        settings = self._settings
        spent = sum(one[0] for one in before), sum(one[1] for one in before)
        return Spending(price_in=settings.price_in, price_out=settings.price_out, budget=settings.budget, spent=spent, longest_answer=settings.max_new_tokens)

    def _done(self, record: Record | None, pool: Pool) -> Receipt | Brainstorming | None:
        """What there is to tell if nothing is left to ask."""
        if self._settings.tasks_only:
            return self._accounts()
        if record is None:
            return None
        name = record.generator if record.generator in self._asked.names else self._asked.names[0]
        record.require(self._asked.identity(pool, name), self._output.url)
        receipt = Receipt.load(self._output)
        if receipt is not None and receipt.asked == record.count >= self._settings.count:
            if record.count > self._settings.count:
                self._reporter.say(f"note: {record.count:,} examples were asked for before; all are there")
            return receipt
        if record.count >= self._settings.count and RECORDS.committed_units(self._output) >= {unit.name for unit in record.units()}:
            return self._finish(record)
        return None

    def _accounts(self) -> Brainstorming:
        made = brainstorming.accounts(self._output)
        assert made is not None
        return made

    def _require_same_tasks(self, record: Record | None, generator: str) -> None:
        """Tasks are not made anew under examples. Raises RunMismatch."""
        if record is not None:
            record.require(record.identity | {"brainstorming": self._asked.brief.identity(generator)}, self._output.url)
            gone = brainstorming.PATH if self._output.exists(brainstorming.ACCOUNTS) else brainstorming.ACCOUNTS
            raise OutputError(f"{self._output.display(gone)} is gone; bring it back, or begin anew with overwrite")

    def _new_record(self, identity: dict[str, Any]) -> Record:
        if RECORDS.committed_units(self._output) or self._output.list(execution.ANSWERS):
            raise OutputError(f"{self._output.display(PATH)} is gone, which tells what the units there are of; bring it back, or begin anew with overwrite")
        return Record(
            identity=identity,
            segments=[self._settings.count],
            unit_rows=self._settings.unit_rows,
            settings=given_settings(self._settings),
            versions=planning.versions(),
            created=time.time(),
        )

    @contextmanager
    def _executing(self) -> Iterator[tuple[Execution, str]]:
        """(something that asks the generator, the generator's name)."""
        settings, specs = self._settings, self._asked.specs
        if specs is None or parse_actors(settings.actors) == (0, 0):
            with opening.opened(settings, specs) as generator:
                yield InProcess(generator, self._spending), self._asked.names[0]
            return
        from llmemb_ray.pipeline.shape import cluster
        from llmemb_ray.synthesis.graph import OnRay

        on_cluster = settings.cluster()
        with cluster(on_cluster) as shape:
            spec = specs["cuda" if shape.on_gpu else "cpu"]
            with closing(OnRay(spec, shape, attempts=on_cluster.max_attempts)) as on_ray:
                yield on_ray, spec.name

    def _brainstorm(self, execution: Execution, generator: str) -> Pool:
        def ask(prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
            for answered in execution.answers(prompts):
                yield answered
                self._require_lease()
            if self._spending.ended:
                raise self._stopped("the tasks are not all brainstormed")

        # Many endpoints, OpenAI's among them, take no schema whose root is an array; the prompt asks for a list as well.
        held = self._settings.llm is None and opening.structured_of(self._settings) == "json_schema"
        schema = tasks.SCHEMA if held else None
        return brainstorming.fill(self._asked.brief, self._output, generator, ask, schema=schema, say=self._reporter.say)

    def _generate(self, execution: Execution, record: Record, pool: Pool) -> None:
        """Asks for every unit without a commit. Raises RunFailed if some could not be done, RunStopped where the budget is spent."""
        counts = self._reporter.counts
        done = RECORDS.committed_units(self._output)
        waiting = [unit for unit in record.units() if unit.name not in done]
        before = record.count - sum(unit.rows for unit in waiting)
        counts.units, counts.rows, counts.rows_total = len(done), before, record.count
        counts.units_total = len(done) + len(waiting)
        if done and waiting:
            self._reporter.say(f"continuing: {len(done):,} of {counts.units_total:,} units are already committed")
        work = Work(
            draw=self._asked.draw(pool, record.generator),
            output=self._output,
            run_key=record.run_key,
            generator=record.generator,
            max_characters=self._settings.max_characters,
            strict=self._settings.strict,
            check_language=self._settings.check_language,
            keep_raw=self._settings.keep_raw,
            contaminated=self._asked.contaminated,
        )
        failures: dict[str, str] = {}
        meter = metrics.Meter("synthesize", record.run_key)

        def live() -> tuple[int, int, int]:
            rows, tokens, actors = execution.live()
            meter.standing(
                units={"planned": counts.units_total, "committed": counts.units, "failed": counts.failed_units},
                rows={"planned": counts.rows_total, "committed": counts.rows},
            )
            return rows + before, tokens, actors

        with (
            suppress(Ended),  # There is a reason then.
            self._reporter.watching(live),
            self._notice.finishing(execution.stop, execution.at_work, grace=GRACE_SECONDS),
            closing(execution.run(work, waiting)) as outcomes,
        ):
            for outcome in outcomes:
                if outcome.made is not None:
                    counts.units += 1
                    counts.rows += outcome.made.rows
                    counts.tokens += outcome.made.prompt_tokens + outcome.made.completion_tokens
                    counts.rejects += outcome.made.rejected
                    if counts.rejects == counts.rows - before >= HOPELESS:
                        raise RunFailed(no_examples(counts.rejects, outcome.made.reasons, self._output))
                else:
                    failures[outcome.unit] = str(outcome.error)
                    counts.failed_units = len(failures)
                self._require_lease()
        if failures:
            shown = "\n".join(f"  unit {unit}: {error}" for unit, error in list(failures.items())[:FAILURES_SHOWN])
            more = f"\n  … and {len(failures) - FAILURES_SHOWN} more" if len(failures) > FAILURES_SHOWN else ""
            raise RunFailed(
                f"{len(failures)} of {counts.units_total} units failed, the others are committed, their answers are kept:\n{shown}{more}\n"
                "When the cause is mended, run the same command again: it asks only for what is missing."
            )
        if self._spending.ended or (self._notice.reason and counts.units < counts.units_total):
            raise self._stopped(f"of {counts.units_total:,} units {counts.units_total - counts.units:,} are not done")

    def _require_lease(self) -> None:
        if self._held.lost:
            raise OutputError(f"{self._held.lost}; this driver stops, what it committed stands")

    def _stopped(self, left: str) -> RunStopped:
        spending, settings = self._spending, self._settings
        if self._notice.reason:
            return RunStopped(
                f"stopped because {self._notice.reason}: {left}, what was answered is kept. To continue:\n  {command_line(settings, 'synthesize')}"
            )
        return RunStopped(
            f"stopped because the budget of {settings.budget:g} leaves no room for another request: {spending.cost:.4g} are spent; {left}, what was answered "
            f"is kept. To continue, with a larger --budget:\n  {command_line(settings, 'synthesize')}"
        )

    def _finish(self, record: Record) -> Receipt:
        """Removes duplicates, checks the accounts, compacts the commits, removes what none names, writes the receipt. Can be repeated."""
        output = self._output
        self._require_lease()
        commits = RECORDS.read_all(output)
        reconcile(record.units(), commits)
        if missing := sorted(_named(commits) - _present(output)):
            raise RunFailed(f"{len(missing)} files that commits name are gone, {output.display(missing[0])} among them; delete their commits to ask again")
        self._reporter.say("looking for duplicates")
        commits = duplicates.remove(output, record.run_key, commits, duplicates.find(output, commits, near=self._settings.near_duplicates))
        reconcile(record.units(), commits)
        made = brainstorming.accounts(output)
        receipt = Receipt.of(
            commits,
            run_key=record.run_key,
            generator=record.generator,
            of_tasks=(made.prompt_tokens, made.completion_tokens) if made else (0, 0),
            spending=self._spending,
            seconds_wall=round(time.monotonic() - self._started, 3),
            versions=planning.versions(),
        )
        self._require_lease()
        RECORDS.compact(output, commits)
        output.delete(sorted(path for path in _present(output) - _named(commits) if WRITTEN.fullmatch(path) or is_temporary(path)))
        output.delete_tree(execution.ANSWERS)
        output.delete([entry.path for entry in output.list(OWN) if is_temporary(entry.path)])
        receipt.save(output)
        return receipt


def _named(commits: Sequence[Made]) -> set[str]:
    return {path for commit in commits for path in (commit.shard, commit.rejects) if path}


def _present(output: Storage) -> set[str]:
    return {entry.path for directory in (DATA, REJECTS) for entry in output.list(directory)}
