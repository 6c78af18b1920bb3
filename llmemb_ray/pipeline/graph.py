"""The embedding job as a Ray Data graph: reading tasks → CPU tasks that read and tokenise → embedder actors.

Invariant: one call of the actor is one unit. Units travel as one-row Arrow blocks ("envelopes"): a target
block size of one byte makes each row a block of its own, and ``batch_size=1`` a call of its own. Reading asks
for other resources than embedding does, so that Ray does not fuse the two and tokenise on the actor.
What leaves an actor is a record of one row; vectors go from the actor straight to storage.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from llmemb_ray import errors
from llmemb_ray.config import EmbedSettings
from llmemb_ray.errors import EngineDied, LlmembError, RunFailed
from llmemb_ray.pipeline import attempt, calibrate, metrics, stalls
from llmemb_ray.pipeline.ledger import CALIBRATION, Directions
from llmemb_ray.pipeline.ledger_actor import LedgerActor
from llmemb_ray.pipeline.making import Isolation, Workshop
from llmemb_ray.pipeline.prepare import Job, Prepared, ReadTask, prepare
from llmemb_ray.pipeline.shape import Shape, use_threads
from llmemb_ray.shards.commits import Commit

logger = logging.getLogger(__name__)

READ_CPUS = 0.25
"""Reserved by a task that reads and tokenises: it waits for storage half of its time."""

CALLS_PER_ACTOR = 2
"""Calls at once: while one unit runs on the model, the one before is encoded and written."""

ACTOR_INIT_DEATHS = 20
"""Actors in a row that may die while they load before the job gives up: spot machines go at any time."""

MEMORY_SECONDS = 10.0
"""Before an actor whose model found too little memory is replaced."""

REPORT_SECONDS = 1.0

WAITING_SECONDS = 5.0
"""Between two words of an actor that waits for a unit."""

DRAIN_SECONDS = 15.0
"""How long units that were read but not begun may take to leave a graph that stops, before it is cut off."""


def read_and_tokenize(batch: pa.Table, job: Any, ledger: Any) -> Iterator[pa.Table]:
    """The reading operator: a reading task in, envelopes out, one for each unit; none any more when the job stops.

    job: reference to a Job; ledger: actor handle.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if ray.get(ledger.stopping.remote()):
        return
    settled: Job = ray.get(job)
    for text in batch.column("task").to_pylist():
        for prepared in prepare(settled, ReadTask.from_json(text)):
            yield prepared.to_envelope()


class EmbedUnits:
    """The embedding operator's actor: holds the model; an envelope in, a record of the attempt out."""

    def __init__(self, job: Any, ledger: Any, threads: int | None) -> None:
        from llmemb_ray.embedders.embedder import Embedder

        self._job: Job = ray.get(job)
        self._ledger = ledger
        use_threads(threads)
        self._pending = (0, 0)
        self._reported = time.monotonic()
        self._lock = threading.Lock()
        self._name = ray.get_runtime_context().get_actor_id()
        self._process = stalls.this_process(self._name)
        self._meter = metrics.Meter("embed", self._job.run_key)
        ledger.loads.remote(self._name)
        self._failure: LlmembError | None = None
        try:
            self._embedder = Embedder(self._job.spec)
            ledger.arrived.remote(self._process)
            turns = _Turns(ledger, self._name)
            precision = calibrate.settled(self._job, self._embedder, turns, on_pack=lambda *_: self._on_pack(0, 0), computing=self._calibrating)
            self._workshop = Workshop(precision=precision)
        except LlmembError as error:
            if "memory" in str(error) and not ray.get(ledger.load_failed.remote()):
                logger.error("%s; another process tries again in %g s", error, MEMORY_SECONDS)
                time.sleep(MEMORY_SECONDS)
                os._exit(1)
            # Told by the first call: Ray would take an error here for a lost actor, and try again for long.
            self._failure = error
            ledger.arrived.remote(self._process)
        self._meter.loaded(restarted=ray.get_runtime_context().was_current_actor_reconstructed)
        threading.Thread(target=self._wait, name="llmemb-waiting", daemon=True).start()

    def _wait(self) -> None:
        """Tells that the actor waits while it has no unit; of one that has some only the units tell."""
        while True:
            time.sleep(WAITING_SECONDS)
            if self._meter.waited():
                self._ledger.hello.remote(self._name)

    def __call__(self, envelope: pa.Table) -> pa.Table:
        with self._meter.call():
            return self._embed(envelope)

    def _embed(self, envelope: pa.Table) -> pa.Table:
        prepared = Prepared.from_envelope(envelope)
        unit = prepared.unit
        if self._failure is not None:
            return _record(unit.name, None, str(self._failure), fatal=type(self._failure).__name__)
        if prepared.error is not None:
            return _record(unit.name, None, prepared.error)
        self._ledger.hello.remote(self._name)
        if not ray.get(self._ledger.may_begin.remote(unit.name)):
            return _record(unit.name, None, None)
        directions: Directions = ray.get(self._ledger.begin.remote(unit.name, prepared.accepted.num_rows, self._process))
        if directions.give_up:
            return _record(unit.name, None, directions.give_up, fatal="RunFailed")
        if directions.attempt > 1:
            self._meter.unit_retried()
        time.sleep(directions.wait)
        isolation = None
        if directions.ranges is not None:
            isolation = Isolation(
                ranges=directions.ranges,
                poison=frozenset(directions.poison),
                last_words=directions.last_words,
                entering=lambda rows: ray.get(self._ledger.entering.remote(unit.name, rows)),
            )
        try:
            commit = attempt.run(
                *(self._job, prepared, self._embedder, self._workshop), on_pack=self._on_pack, isolation=isolation, computing=lambda: self._computing(unit.name)
            )
        except EngineDied as error:
            return self._end(unit.name, str(error))
        except LlmembError as error:
            self._ledger.failed.remote(unit.name)
            return _record(unit.name, None, str(error))
        self._ledger.done.remote(unit.name)
        return _record(unit.name, commit, None)

    @contextmanager
    def _computing(self, unit: str) -> Iterator[None]:
        """Within it the ledger waits for signs of this actor."""
        self._ledger.computing.remote(self._process, unit)
        try:
            yield
        finally:
            self._ledger.computed.remote(self._process, unit)

    @contextmanager
    def _calibrating(self) -> Iterator[None]:
        """The same while the calibration is measured, as if that were a unit."""
        directions: Directions = ray.get(self._ledger.begin.remote(CALIBRATION, 0, self._process))
        if directions.give_up:
            raise RunFailed(directions.give_up)
        with self._computing(CALIBRATION):
            yield
        self._ledger.done.remote(CALIBRATION)

    def _end(self, unit: str, words: str) -> pa.Table:
        """Ends this process, whose engine is of no use any more: Ray starts another actor, and the unit comes again."""
        if ray.get(self._ledger.died.remote(unit, words)):
            return _record(unit, None, f"engines die again and again, on no row in particular; the last one said: {words}", fatal="RunFailed")
        logger.error("unit %s: %s; this process ends and another takes its place", unit, words)
        logging.shutdown()
        os._exit(1)

    def _on_pack(self, rows: int, tokens: int) -> None:
        self._meter.passed(tokens)
        with self._lock:
            self._pending = (self._pending[0] + rows, self._pending[1] + tokens)
            now = time.monotonic()
            if now - self._reported >= REPORT_SECONDS:
                self._ledger.add.remote(*self._pending)
                self._ledger.hello.remote(self._name)
                self._pending, self._reported = (0, 0), now


class _Turns:
    """Agreement on one calibration through the ledger."""

    def __init__(self, ledger: Any, actor: str) -> None:
        self._ledger, self._actor = ledger, actor

    def mine(self) -> bool:
        return bool(ray.get(self._ledger.calibrates.remote(self._actor)))

    def agreed(self, made: str) -> str:
        return str(ray.get(self._ledger.first_calibration.remote(made)))


def _record(unit: str, commit: Commit | None, error: str | None, *, fatal: str | None = None) -> pa.Table:
    """Neither commit nor error: the unit was not begun, because the job stops.

    fatal: class of an error that no other unit would be spared, by its name in ``errors``.
    """
    record = json.dumps(asdict(commit)) if commit else None
    return pa.table({"unit": [unit], **{name: pa.array([value], pa.string()) for name, value in (("commit", record), ("error", error), ("fatal", fatal))}})


def build(tasks: list[ReadTask], job: Any, ledger: Any, shape: Shape) -> Dataset:
    """The graph over some reading tasks. job: reference to a Job; ledger: actor handle."""
    settle_context()
    source = ray.data.from_arrow([pa.table({"task": [task.to_json()]}) for task in tasks])
    return source.map_batches(
        read_and_tokenize,
        fn_kwargs={"job": job, "ledger": ledger},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=READ_CPUS,
    ).map_batches(
        EmbedUnits,
        fn_constructor_kwargs={"job": job, "ledger": ledger, "threads": shape.threads},
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=shape.least, max_size=shape.most, max_concurrent_calls_per_actor=CALLS_PER_ACTOR, enable_true_multi_threading=True),
        num_cpus=shape.cpus,
        **({"num_gpus": shape.gpus} if shape.on_gpu else {}),
    )


class Execution:
    """Runs windows of reading tasks on the cluster and yields what became of each unit."""

    def __init__(self, job: Job, settings: EmbedSettings, shape: Shape) -> None:
        self._job = ray.put(job)
        self._shape = shape
        self._stopping = False
        self._idle_since = 0.0
        known = (settings.max_attempts, settings.retry_wait, settings.stall_timeout, settings.storage_retry_seconds)
        self.ledger = LedgerActor(metrics.Meter("embed", job.run_key), *known)

    def run(self, tasks: list[ReadTask]) -> Iterator[tuple[str, Commit | None, str | None]]:
        """(unit, commit or None, error or None) of each unit, as it is done. Raises the job's own error, unwrapped."""
        with stalls.ended(self.ledger):
            for row in records(build(tasks, self._job, self.ledger.handle, self._shape)):
                commit = Commit(**json.loads(row["commit"])) if row["commit"] else None
                if commit is not None or row["error"] is not None:
                    yield row["unit"], commit, row["error"]
                if self._drained_for_long():
                    return

    def stop(self) -> None:
        """Begins no more units; those begun are still finished."""
        self._stopping = True
        self.ledger.stop()

    def at_work(self) -> bool:
        """Whether units are begun that are not committed yet, for all that is known."""
        return self.ledger.at_work()

    def _drained_for_long(self) -> bool:
        """Whether the job stops, no unit is being worked on, and what was read already still comes through after a while."""
        if not self._stopping or self.ledger.at_work():
            return False
        self._idle_since = self._idle_since or time.monotonic()
        return time.monotonic() - self._idle_since > DRAIN_SECONDS

    def live(self) -> tuple[int, int, int]:
        return self.ledger.live()


def settle_context() -> None:
    """Ray Data as graphs of units need it: each row a block of its own, and no end for want of progress, which it would look for in blocks."""
    context = DataContext.get_current()
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1
    context.max_consecutive_actor_init_deaths = ACTOR_INIT_DEATHS


def records(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """What the actors tell of each unit, as it is done. Raises an error that no other unit would be spared, unwrapped, and RunFailed for Ray's own."""
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.to_pylist():
                if row["fatal"]:
                    raise getattr(errors, row["fatal"])(row["error"])
                yield row
    except (ray.exceptions.RayError, RuntimeError) as error:
        raise RunFailed(f"the job stopped: {cause(error)}; what was committed stands, the same command continues") from error


def cause(error: BaseException) -> str:
    """The line of Ray's text that names the first error which is not Ray's own."""
    named = re.findall(r"^(?!ray\.)[\w.]+(?:Error|Exception|Exit|Interrupt)\b.*$", str(error), re.MULTILINE)
    return str(named[0]) if named else f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
