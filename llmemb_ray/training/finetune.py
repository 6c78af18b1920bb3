"""Fine-tuning from settings to a trained model: prepare batches, train on Ray Train, write what comes out.

Invariant: OUT belongs to one training: the same command continues it or finds it finished, another is refused. Batches are prepared once;
of what workers do, only checkpoints count.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from llmemb_ray.config import FinetuneSettings
from llmemb_ray.corpus import rows as corpus_rows
from llmemb_ray.embedders.embedder import EmbedderSpec, settle
from llmemb_ray.errors import LeaseHeld, NotFound, OutputError, RunFailed, RunMismatch
from llmemb_ray.pipeline import metrics as exported
from llmemb_ray.pipeline import planning
from llmemb_ray.representation.space import differences
from llmemb_ray.shards.lease import PATH as LEASE
from llmemb_ray.shards.lease import LeaseHolder
from llmemb_ray.storage import Entry, Storage, absolute, redact
from llmemb_ray.training import judging, metrics, outcome, sources
from llmemb_ray.training.batches import DIRECTORY, Batches
from llmemb_ray.training.batches import RECORD as DATA
from llmemb_ray.training.checkpoints import ROOT as CHECKPOINTS
from llmemb_ray.training.checkpoints import Checkpoints
from llmemb_ray.training.worker import OUTCOMES, Board, Job, work
from llmemb_ray.written import command_line, given_settings, masked

PLAN, RECORD, PAGE = "finetune.json", "finetuned.json", "training.html"

FORMAT = 1

POLL_SECONDS = 0.5

WAITING_SECONDS = 30.0
"""After so long without a worker it is said what they wait for."""

STARTS = 30
"""Times that Ray Train waits for workers, a minute each, before it gives up."""

MOST_CPUS = 8

FREE = (
    "out", "overwrite", "workers", "gpus_per_worker", "cpus_per_worker", "max_failures", "ray_address", "log_steps", "checkpoint_steps", "micro_batch",
    "gradient_checkpointing", "shard_parameters", "data", "endpoint_url", "storage_options", "storage_retry_seconds", "allow_pickle", "trust_remote_code",
    "preset",
    "model", "revision", "representation", "prompt", "demo", "instruction", "clean", "pooling", "layer", "normalize", "dimensions",
    "max_tokens", "rope_theta", "sliding_window", "append_eos", "role",
)  # fmt: skip
"""Settings that may change from one command to the next, or that the space tells."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """What a training came to; stands in OUT/finetuned.json."""

    model: str
    out: str
    outcome: str
    """Directory or URL of the adapter or model."""
    method: str
    steps: int
    """Done; fewer than planned where patience ended."""
    planned: int
    score: str | None
    """What the scores are."""
    before: float | None
    after: float | None
    """Of the weights written."""
    after_step: int
    loss: float | None
    """Of the last steps."""
    tokens: int
    seconds: float
    """Of steps and evaluations, all commands together."""
    space: str
    workers: str
    settings: dict[str, Any]
    versions: dict[str, str]
    command: str
    finished: float
    """Unix time."""
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        early = f" of {self.planned:,} (no better evaluation came)" if self.steps < self.planned else ""
        loss = f", loss {self.loss:.4f} at the end" if self.loss is not None else ""
        yield f"{self.steps:,} steps{early}, {self.tokens:,} tokens in {self.seconds:,.0f} s{loss}"
        if self.after is not None:
            yield f"{self.score}: {self.before:.2f} before, {self.after:.2f} after (step {self.after_step:,}, the best)"
        option = f"--model BASE --adapter {self.outcome}" if self.method == "lora" else f"--model {self.outcome}"
        yield f"{self.outcome} holds what was trained: llmemb embed {option} …"
        yield f"{self.out}/training.html shows the course of it; metrics.jsonl and tensorboard/ hold the figures"


def finetune(settings: FinetuneSettings, *, say: Say = lambda line: None) -> Finetuned:
    """Trains ``settings.model`` into ``settings.out``; continues where it was stopped, and is done at once where it was finished.

    Raises ConfigError, InputError, ModelError, OutputError (RunMismatch for another training's OUT, LeaseHeld), RunFailed.
    """
    from llmemb_ray.connection import connected
    from llmemb_ray.training.prepare import prepare

    settings = settings.model_copy(update={"out": settings.out.rstrip("/")})
    spec = settle(settings.model_settings())
    output = Storage(absolute(settings.out), settings.access)
    with LeaseHolder(output, dict, waiting=say) as held:
        _settle_plan(settings, spec, output)
        finished = _finished(output)
        if finished is not None:
            say(f"{finished.out} is finished already")
            return finished
        judge: judging.Judge | None = judging.StsDev(settings.data) if settings.evaluate == "sts-dev" else None
        with connected(settings.ray_address):
            batches = prepare(settings, output, say=say)
            if settings.evaluate == "holdout":
                judge = judging.HeldOut(batches.heldout())
            steps = min(batches.steps, settings.max_steps or batches.steps)
            resumed = Checkpoints(output).steps()
            if resumed:
                say(f"goes on from step {resumed[-1]:,} of {steps:,}")
            job = Job(settings=settings, spec=spec, output=output, judge=judge)
            standing = _train(job, steps, say, held)
        _require_lease(held)
        return _finish(job, batches, standing, steps)


def _require_lease(held: LeaseHolder) -> None:
    if held.lost is not None:
        raise LeaseHeld(f"{held.lost}; this training stops, the other one goes on from its checkpoints")


def _settle_plan(settings: FinetuneSettings, spec: EmbedderSpec, output: Storage) -> None:
    """Keeps what is asked for, or compares it with what OUT was begun with. Raises RunMismatch, OutputError."""
    training = masked({name: value for name, value in settings.model_dump(mode="json").items() if name not in FREE})
    asked = json.loads(json.dumps({"format": FORMAT, "space": spec.space.to_dict(), "training": training}))
    try:
        there = json.loads(output.read(PLAN))
    except NotFound:
        foreign = _others(output)
        if foreign:
            raise OutputError(f"out: {output.url} is not empty ({foreign[0].path} …) and holds nothing that finetune began; choose another out") from None
        there = None
    changed = [] if there is None else [f"  {name}: there {theirs!r}, asked for now {ours!r}" for name, ours, theirs in differences(asked, there)]
    begun = output.exists(DATA) or bool(Checkpoints(output).steps())
    if changed and begun and not settings.overwrite:
        raise RunMismatch(f"out: {output.url} holds another training; name another out, or set overwrite:\n" + "\n".join(changed))
    if settings.overwrite:
        for origin in sources.settle(settings):  # What cannot begin deletes nothing.
            for url in origin.files:
                corpus_rows.version(url, settings.access)
        _clear(output)
    output.put(PLAN, json.dumps(asked, indent=1, ensure_ascii=False).encode())


def _clear(output: Storage) -> None:
    """Deletes what a training leaves, its record first; other files stay."""
    output.delete([RECORD, metrics.JSONL, PAGE])
    for directory in (CHECKPOINTS, *OUTCOMES.values(), DIRECTORY, posixpath.dirname(metrics.EVENTS)):
        output.delete_tree(directory)


def _others(output: Storage) -> list[Entry]:
    """What stands in OUT besides the lease and the files it is written through."""
    return [entry for entry in output.list() if not entry.path.startswith(posixpath.dirname(LEASE) + "/")]


def _finished(output: Storage) -> Finetuned | None:
    try:
        return Finetuned(**json.loads(output.read(RECORD)))
    except NotFound:
        return None


def _train(job: Job, steps: int, say: Say, held: LeaseHolder) -> dict[str, Any]:
    """The Standing of the first worker at the end. Raises what a worker told, or RunFailed."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    settings = job.settings
    low, high = settings.worker_range
    gpus = settings.gpus_per_worker if settings.gpus_per_worker is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
    cpus = settings.cpus_per_worker or (1.0 if gpus else _cpus(high))
    resources = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()
    job = replace(job, board=board, threads=None if gpus else max(1, int(cpus)))
    with tempfile.TemporaryDirectory(prefix="llmemb-train-") as scratch:
        trainer = TorchTrainer(
            work,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(num_workers=low if low == high else (low, high), use_gpu=gpus > 0, resources_per_worker=resources),
            run_config=RunConfig(
                name=f"llmemb-{uuid.uuid4().hex[:8]}",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=settings.max_failures, controller_failure_limit=STARTS),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            meter = exported.Meter("finetune", exported.key_of(redact(settings.out)))
            with _shown(board, steps, say, held, f"{low} × {resources}", meter):
                result = trainer.fit()
        except TrainingFailedError as error:
            _raise_told(board)
            raise RunFailed(f"training failed: {_reason(error)}; the same command goes on from the last checkpoint") from error
        _raise_told(board)
    assert isinstance(result.return_value, dict)
    return result.return_value


def _cpus(workers: int) -> float:
    """CPU cores of a worker where there are no GPUs: what the smallest node has for each that it may have to hold, at most 8."""
    import ray

    cores = [node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not cores:
        return 1.0
    return float(max(1, min(MOST_CPUS, int(min(cores)) // -(-workers // len(cores)))))


@contextlib.contextmanager
def _shown(board: Any, steps: int, say: Say, held: LeaseHolder, wanted: str, meter: exported.Meter) -> Iterator[None]:
    """Says each row that workers tell, and what they wait for, while the block runs."""
    import ray

    stop = threading.Event()

    def show() -> None:
        began, said = False, time.monotonic()
        last: dict[str, Any] = {}
        while True:
            ended = stop.wait(POLL_SECONDS)
            with contextlib.suppress(ray.exceptions.RayError):  # The training's own error matters more.
                for row in ray.get(board.take.remote()):
                    say(metrics.line(row, steps))
                    last |= row
                meter.trained(last)
                if held.lost is not None:
                    board.fail.remote(LeaseHeld(held.lost))
                began = began or ray.get(board.began.remote())
                if not began and time.monotonic() - said > WAITING_SECONDS:
                    said = time.monotonic()
                    say(f"waiting for room for workers: {wanted}; free in the cluster: {ray.available_resources()}; lower workers or cpus_per_worker")
            if ended:
                return

    thread = threading.Thread(target=show, name="llmemb-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _raise_told(board: Any) -> None:
    import ray

    with contextlib.suppress(ray.exceptions.RayError):  # Gone with its node: the training's own error matters more.
        error = ray.get(board.error.remote())
        if error is not None:
            raise error


def _reason(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    first = next(iter(failures.values()), error)
    lines = [line for line in str(first).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(first).__name__


def _finish(job: Job, batches: Batches, standing: dict[str, Any], steps: int) -> Finetuned:
    settings, spec, output = job.settings, job.spec, job.output
    rows = standing["rows"]
    losses = [row["loss"] for row in rows if "loss" in row]
    scores = {row["step"]: row["score"] for row in rows if "score" in row}
    place = OUTCOMES[settings.method]
    made = Finetuned(
        model=redact(settings.model),
        out=redact(settings.out),
        outcome=f"{redact(settings.out)}/{place}",
        method=settings.method,
        steps=standing["step"],
        planned=steps,
        score=job.judge.name if job.judge else None,
        before=scores.get(0),
        after=standing["best_score"],
        after_step=standing["best_step"] or standing["step"],
        loss=losses[-1] if losses else None,
        tokens=standing["tokens"],
        seconds=round(standing["seconds"], 2),
        space=spec.space.digest,
        workers=settings.workers,
        settings=given_settings(settings),
        versions=planning.versions(),
        command=command_line(settings, "finetune"),
        finished=time.time(),
    )
    record = outcome.write(output.child(place), spec, settings, made, batches)
    made = replace(made, space=record["space"])
    output.put(RECORD, json.dumps(made.to_dict(), indent=1, ensure_ascii=False).encode())
    return made
