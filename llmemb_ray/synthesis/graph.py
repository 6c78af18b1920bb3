"""The same requests by actors on Ray: units → actors that hold a generator → commits, as a Ray Data graph.

Invariant: one call of an actor is one unit. An actor begins no unit whose commit is visible. An actor that dies is started again, and a unit
that ended so many actors fails alone. Brainstorming goes in rounds, each of which needs the one before: its actors stay loaded between them.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections.abc import Generator as Generating
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from llmemb_ray import errors
from llmemb_ray.errors import EngineDied, LlmembError, NotFound, RunFailed
from llmemb_ray.generation import opening
from llmemb_ray.generation.actors import ActorGenerator
from llmemb_ray.generation.generator import Answer, Generator, Prompt
from llmemb_ray.generation.tokens import ModelSpec
from llmemb_ray.pipeline import metrics
from llmemb_ray.pipeline.graph import records, settle_context
from llmemb_ray.pipeline.ledger import Directions
from llmemb_ray.pipeline.ledger_actor import LedgerActor
from llmemb_ray.pipeline.shape import Shape, use_threads
from llmemb_ray.synthesis.commits import RECORDS, Made
from llmemb_ray.synthesis.execution import Outcome
from llmemb_ray.synthesis.units import Unit, Work, write

logger = logging.getLogger(__name__)

WINDOW_UNITS = 10_000
"""Units in one execution of Ray Data, which bounds what the driver holds. Models are loaded anew for the next."""


class Synthesize:
    """The actor: holds the generator; a unit in, a record of what became of it out."""

    def __init__(self, spec: Any, work: Any, ledger: Any, threads: int | None, attempts: int) -> None:
        """spec, work: references to a ModelSpec and a Work; ledger: actor handle."""
        self._ledger, self._attempts = ledger, attempts
        self._work: Work = ray.get(work)
        self._name = ray.get_runtime_context().get_actor_id()
        self._failure: LlmembError | None = None
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        use_threads(threads)
        try:
            self._generator: Generator = opening.load(ray.get(spec))
        except LlmembError as error:
            self._failure = error  # Told by the first call: Ray would take it here for a lost actor, and try again for long.
        ledger.hello.remote(self._name)

    def __call__(self, batch: pa.Table) -> pa.Table:
        unit = Unit(batch["start"][0].as_py(), batch["rows"][0].as_py())
        name = unit.name
        if self._failure is not None:
            return _record(name, error=str(self._failure), fatal=type(self._failure).__name__)
        self._ledger.hello.remote(self._name)
        if not ray.get(self._ledger.may_begin.remote(name)):
            return _record(name)
        directions: Directions = ray.get(self._ledger.begin.remote(name, 1))
        if directions.ranges is not None:
            self._ledger.failed.remote(name)
            return _record(name, error=f"the engine died {self._attempts} times at it{f': {directions.last_words}' if directions.last_words else ''}")
        time.sleep(directions.wait)
        try:
            made = self._make(unit)
        except EngineDied as error:
            if ray.get(self._ledger.died.remote(name, str(error))):
                return _record(name, error=f"engines die again and again: {error}", fatal="RunFailed")
            logger.error("%s: %s; this process ends and another takes its place", name, error)
            logging.shutdown()
            os._exit(1)
        except LlmembError as error:
            self._ledger.failed.remote(name)
            fatal = type(error).__name__ if isinstance(error, errors.ConfigError) else None
            return _record(name, error=str(error), fatal=fatal)
        self._ledger.done.remote(name)
        return _record(name, made=made)

    def _make(self, unit: Unit) -> Made:
        work = self._work
        try:
            return RECORDS.read(work.output, unit.name)
        except NotFound:
            pass  # As it should be: nobody made it before.
        began = time.time()
        requests = work.requests(unit)
        answers: dict[int, Answer] = {}
        for number, answer in self._generator.generate([work.prompt(request) for request in requests]):
            answers[number] = answer
            self._ledger.add.remote(1, answer.prompt_tokens + answer.completion_tokens)
            if answer.passing:
                raise RunFailed(f"request {requests[number].row}: {answer.problem}")
        return write(work, unit, requests, [answers[number] for number in range(len(requests))], began=began)


def _record(name: str, *, made: Made | None = None, error: str | None = None, fatal: str | None = None) -> pa.Table:
    """Neither commit nor error: the unit was not begun, because the job stops.

    fatal: class of an error that no other item would be spared, by its name in ``errors``.
    """
    values = {"name": name, "made": None if made is None else json.dumps(asdict(made)), "error": error, "fatal": fatal}
    return pa.table({key: pa.array([value], pa.string()) for key, value in values.items()})


class OnRay:
    """Actors as ``shape`` says. attempts: actors that may die at a unit until it fails."""

    def __init__(self, spec: ModelSpec, shape: Shape, *, attempts: int) -> None:
        self._spec, self._shape, self._attempts = spec, shape, attempts
        self._ledger = LedgerActor(metrics.Meter("synthesize", ""), attempts, 1.0)  # Until there are units, there is no run key.
        self._brainstorming: ActorGenerator | None = None

    def answers(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Answer]]:
        self._brainstorming = self._brainstorming or ActorGenerator(self._spec, self._shape, attempts=self._attempts)
        yield from self._brainstorming.generate(prompts)

    def run(self, work: Work, units: Iterable[Unit]) -> Generating[Outcome, None, None]:
        self.close()  # The GPUs of the brainstorming are needed.
        rest = iter(units)
        while window := list(itertools.islice(rest, WINDOW_UNITS)):
            yield from self._run(work, window)

    def _run(self, work: Work, waiting: Sequence[Unit]) -> Iterator[Outcome]:
        settle_context()
        self._ledger.meter = meter = metrics.Meter("synthesize", work.run_key)
        known = {"ledger": self._ledger.handle, "threads": self._shape.threads, "attempts": self._attempts}
        dataset = ray.data.from_arrow([pa.table({"start": [unit.start], "rows": [unit.rows]}) for unit in waiting]).map_batches(
            Synthesize,
            fn_constructor_kwargs={"spec": ray.put(self._spec), "work": ray.put(work)} | known,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=min(self._shape.least, len(waiting)), max_size=min(self._shape.most, len(waiting))),
            num_cpus=self._shape.cpus,
            **({"num_gpus": self._shape.gpus} if self._shape.on_gpu else {}),
        )
        for row in records(dataset):
            if row["made"] or row["error"] is not None:
                made = Made(**json.loads(row["made"])) if row["made"] else None
                meter.ended(made)
                yield Outcome(row["name"], made, row["error"])

    def close(self) -> None:
        if self._brainstorming is not None:
            self._brainstorming.close()
            self._brainstorming = None

    def stop(self) -> None:
        self._ledger.stop()

    def at_work(self) -> bool:
        return self._ledger.at_work()

    def live(self) -> tuple[int, int, int]:
        return self._ledger.live()
