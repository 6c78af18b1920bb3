"""What jobs tell Prometheus, through Ray's exporter on each node, which puts ``ray_`` before every name.

Invariant: only this module names metrics, and ``CATALOGUE`` lists them all. Accounts (rows, tokens, units) are counted by the driver from
the commits, once each, so that they agree with the receipt; what is seen while it happens is counted by the process that sees it. Where
Ray is not up in a process nothing is counted. Once a pack, a unit or a second something is told, never once a row: telling takes 2 µs.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from llmemb_ray.embedders.work import Work
    from llmemb_ray.shards.commits import Commit
    from llmemb_ray.synthesis.commits import Made

Item = TypeVar("Item")

Command = Literal["embed", "synthesize", "finetune"]

OF_RUN = ("command", "run")
"""Labels of every metric. Not ``job``, which is the name of Prometheus' own label for what it scrapes."""

RUN_DIGITS = 12
"""Of the run key, in the label ``run``."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    """Besides OF_RUN."""
    buckets: tuple[float, ...] = ()
    """Seconds."""


BATCH_SECONDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
UNIT_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
"""Units are planned to take about a minute."""

CATALOGUE: Mapping[str, Metric] = {
    # Accounts of an embedding run, from its commits.
    "llmemb_rows_total": Metric(kind="counter", text="Rows of committed units, by what became of them", labels=("status",)),
    "llmemb_rejects_total": Metric(kind="counter", text="Rejects of committed units", labels=("reason",)),
    "llmemb_rows_truncated_total": Metric(kind="counter", text="Rows of committed units whose prompt was cut"),
    "llmemb_prompts_copied_total": Metric(
        kind="counter", text="Prompts that got a copy of a vector: of the same run, or of an earlier one", labels=("source",)
    ),
    "llmemb_tokens_total": Metric(kind="counter", text="Tokens of all prompts of committed units"),
    "llmemb_tokens_computed_total": Metric(kind="counter", text="Tokens that went through the model for committed units, padding included"),
    "llmemb_tokens_padding_total": Metric(kind="counter", text="Tokens of padding among those computed"),
    "llmemb_prefix_tokens_reused_total": Metric(kind="counter", text="Tokens not computed because they stand in the shared prefix"),
    "llmemb_padding_ratio": Metric(kind="gauge", text="Padding among the tokens computed since this command began"),
    "llmemb_units_committed_total": Metric(kind="counter", text="Units committed"),
    "llmemb_units_failed_total": Metric(kind="counter", text="Units that ended without a commit"),
    "llmemb_shard_bytes_total": Metric(kind="counter", text="Bytes of the shards of committed units"),
    "llmemb_storage_retries_total": Metric(kind="counter", text="Calls to storage that were repeated for committed units"),
    "llmemb_out_of_memory_total": Metric(kind="counter", text="Times that the token budget was halved for want of memory"),
    "llmemb_unit_seconds": Metric(kind="histogram", text="A unit in its actor: waiting for the model, computing, writing", buckets=UNIT_SECONDS),
    # As it happens.
    "llmemb_tokens_passed_total": Metric(kind="counter", text="Tokens of prompts whose forward pass was started, retried ones again"),
    "llmemb_batch_seconds": Metric(kind="histogram", text="A forward pass, on average over a unit", buckets=BATCH_SECONDS),
    "llmemb_seconds_total": Metric(kind="counter", text="Where processes spend their time", labels=("phase",)),
    "llmemb_units_prepared_total": Metric(kind="counter", text="Units read and tokenised"),
    "llmemb_unit_retries_total": Metric(kind="counter", text="Attempts at units that were begun before"),
    "llmemb_engine_restarts_total": Metric(kind="counter", text="Actors that took the place of one that died"),
    # Where a command stands, told every second while it runs.
    "llmemb_actors": Metric(kind="gauge", text="Actors that hold a model or load one", labels=("state",)),
    "llmemb_run_units": Metric(kind="gauge", text="Units of the run: planned, committed, failed, at work", labels=("state",)),
    "llmemb_run_rows": Metric(kind="gauge", text="Rows of the run: planned, committed", labels=("state",)),
    # Synthesis, from its commits.
    "llmemb_requests_total": Metric(kind="counter", text="Requests of committed units, by what became of their answers", labels=("outcome",)),
    "llmemb_request_tokens_total": Metric(kind="counter", text="Tokens of the requests of committed units", labels=("kind",)),
    # Training, as its first worker tells.
    "llmemb_train_step": Metric(kind="gauge", text="Steps done"),
    "llmemb_train_loss": Metric(kind="gauge", text="Loss, on average since the line before"),
    "llmemb_train_score": Metric(kind="gauge", text="Last score of the evaluation"),
    "llmemb_train_learning_rate": Metric(kind="gauge", text="Learning rate"),
    "llmemb_train_gradient_norm": Metric(kind="gauge", text="Norm of the gradient before clipping"),
    "llmemb_train_tokens_per_second": Metric(kind="gauge", text="Tokens per second of all workers"),
}

Phase = Literal["read", "tokenize", "load", "input", "turn", "model", "write"]

_made: dict[str, Any] = {}
"""Ray's instruments of this process, by name."""


def _instrument(name: str) -> Any:
    if name not in _made:
        from ray.util import metrics

        metric = CATALOGUE[name]
        labels = OF_RUN + metric.labels
        if metric.kind == "histogram":
            _made[name] = metrics.Histogram(name, metric.text, boundaries=list(metric.buckets), tag_keys=labels)
        else:
            kind = metrics.Counter if metric.kind == "counter" else metrics.Gauge
            _made[name] = kind(name, metric.text, tag_keys=labels)
    return _made[name]


def ray_is_up() -> bool:
    """Whether this process is a driver or a worker of Ray; does not import it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def key_of(url: str) -> str:
    """In place of a run key, for what has none: a digest of where it writes."""
    return hashlib.blake2b(url.encode(), digest_size=RUN_DIGITS // 2).hexdigest()


class Meter:
    """Tells of one run in this process. Several threads may use it."""

    def __init__(self, command: Command, run_key: str) -> None:
        self._labels = {"command": command, "run": run_key[:RUN_DIGITS]}
        self._up = ray_is_up()
        self._lock = threading.Lock()
        self._calls = 0
        self._since = time.monotonic()
        self._computed = self._padding = 0

    def _count(self, name: str, value: float = 1, **labels: str) -> None:
        if self._up and value > 0:
            _instrument(name).inc(value, self._labels | labels)

    def _set(self, name: str, value: float, **labels: str) -> None:
        if self._up:
            _instrument(name).set(value, self._labels | labels)

    def _observe(self, name: str, value: float) -> None:
        if self._up:
            _instrument(name).observe(value, self._labels)

    def _spent(self, phase: Phase, seconds: float) -> None:
        self._count("llmemb_seconds_total", seconds, phase=phase)

    # -- the driver --------------------------------------------------------------------------------

    def committed(self, commit: Commit) -> None:
        """A unit of an embedding run is done."""
        for status, rows in (("embedded", commit.embedded), ("rejected", commit.rejected), ("filtered", commit.filtered)):
            self._count("llmemb_rows_total", rows, status=status)
        for reason, rows in commit.reasons.items():
            self._count("llmemb_rejects_total", rows, reason=reason)
        self._count("llmemb_rows_truncated_total", commit.truncated)
        self._count("llmemb_prompts_copied_total", commit.copied, source="same run")
        self._count("llmemb_prompts_copied_total", commit.reused, source="earlier run")
        self._count("llmemb_tokens_total", commit.tokens)
        self._count("llmemb_tokens_computed_total", commit.tokens_computed)
        self._count("llmemb_tokens_padding_total", commit.tokens_padding)
        self._count("llmemb_prefix_tokens_reused_total", commit.tokens_shared)
        self._count("llmemb_units_committed_total")
        self._count("llmemb_shard_bytes_total", commit.shard_bytes)
        self._count("llmemb_storage_retries_total", commit.storage_retries)
        self._count("llmemb_out_of_memory_total", commit.out_of_memory)
        self._spent("model", commit.seconds_model)
        self._spent("turn", commit.seconds_wait)
        self._spent("write", commit.seconds_write)
        self._observe("llmemb_unit_seconds", commit.seconds_model + commit.seconds_wait + commit.seconds_write)
        self._computed += commit.tokens_computed
        self._padding += commit.tokens_padding

    def ended(self, made: Made | None) -> None:
        """A unit of a synthesis is done; None: it failed."""
        if made is None:
            self.unit_failed()
            return
        self._count("llmemb_requests_total", made.accepted, outcome="accepted")
        self._count("llmemb_requests_total", made.rejected, outcome="rejected")
        self._count("llmemb_request_tokens_total", made.prompt_tokens, kind="prompt")
        self._count("llmemb_request_tokens_total", made.completion_tokens, kind="completion")
        self._count("llmemb_units_committed_total")
        self._count("llmemb_shard_bytes_total", made.shard_bytes)
        self._observe("llmemb_unit_seconds", made.seconds)

    def unit_failed(self) -> None:
        self._count("llmemb_units_failed_total")

    def standing(self, *, units: Mapping[str, int], rows: Mapping[str, int]) -> None:
        """Where the run stands, by state. To be told every second: Ray forgets a gauge after two of its reports."""
        for state, count in units.items():
            self._set("llmemb_run_units", count, state=state)
        for state, count in rows.items():
            self._set("llmemb_run_rows", count, state=state)
        if self._computed:
            self._set("llmemb_padding_ratio", self._padding / self._computed)

    def actors(self, *, ready: int, loading: int, at_work: int) -> None:
        """Actors, and units they have begun; to be told every second."""
        self._set("llmemb_actors", ready, state="ready")
        self._set("llmemb_actors", loading, state="loading")
        self._set("llmemb_run_units", at_work, state="at work")

    def trained(self, row: Mapping[str, Any]) -> None:
        """The last values of a training, by the names that ``training.metrics`` has for them; to be told every few seconds."""
        for name in ("step", "loss", "score", "learning_rate", "gradient_norm", "tokens_per_second"):
            if row.get(name) is not None:
                self._set(f"llmemb_train_{name}", row[name])

    # -- tasks that read and tokenise --------------------------------------------------------------

    def reading(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; the time until each is there is spent reading."""
        iterator = iter(items)
        while True:
            started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._spent("read", time.perf_counter() - started)
            yield item

    @contextmanager
    def tokenizing(self) -> Iterator[None]:
        """Within this block a unit is tokenised."""
        started = time.perf_counter()
        yield
        self._spent("tokenize", time.perf_counter() - started)
        self._count("llmemb_units_prepared_total")

    # -- embedder actors ---------------------------------------------------------------------------

    def loaded(self, *, restarted: bool) -> None:
        """The model is there: the time since this was made went by loading it, and from now on the actor waits for units."""
        self._spent("load", time.monotonic() - self._since)
        if restarted:
            self._count("llmemb_engine_restarts_total")
        self._since = time.monotonic()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Within this block the actor has a unit; while it has none it waits for input."""
        with self._lock:
            if not self._calls:
                self._tell_waiting()
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                self._since = time.monotonic()

    def waited(self) -> bool:
        """Whether the actor has no unit; the time since this was asked last goes by waiting for one, and shows before the next one comes."""
        with self._lock:
            if self._calls:
                return False
            self._tell_waiting()
        return True

    def _tell_waiting(self) -> None:
        now = time.monotonic()
        self._spent("input", now - self._since)
        self._since = now

    def unit_retried(self) -> None:
        self._count("llmemb_unit_retries_total")

    def passed(self, tokens: int) -> None:
        """A forward pass was started."""
        self._count("llmemb_tokens_passed_total", tokens)

    def computed(self, work: Work) -> None:
        """The passes of a unit are through; on a GPU the host knows of one only when all are."""
        if work.packs:
            self._observe("llmemb_batch_seconds", work.seconds / work.packs)
