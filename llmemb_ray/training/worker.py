"""What each of Ray Train's workers does: its loop, and at the end the trained weights, written by the first one.

Invariant: an error of ours is told to the driver once, and a group that is started again after it ends at once; other deaths go on from the last
checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from llmemb_ray.config import FinetuneSettings
from llmemb_ray.embedders.embedder import EmbedderSpec
from llmemb_ray.errors import LlmembError, RunFailed
from llmemb_ray.storage import Storage
from llmemb_ray.training import metrics
from llmemb_ray.training.batches import Batches
from llmemb_ray.training.checkpoints import Checkpoints
from llmemb_ray.training.judging import Judge
from llmemb_ray.training.loop import Loop, Place, barrier

OUTCOMES = {"lora": "adapter", "full": "model"}
"""Directory in OUT of what a method trains."""


class Board:
    """An actor that workers tell and the driver asks: rows of metrics, and the error that ends all."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._error: LlmembError | None = None
        self._up = False

    def up(self) -> None:
        """A worker has begun."""
        self._up = True

    def began(self) -> bool:
        return self._up

    def tell(self, row: dict[str, Any]) -> None:
        self._rows.append(row)

    def take(self) -> list[dict[str, Any]]:
        """What was told since the last time."""
        rows, self._rows = self._rows, []
        return rows

    def fail(self, error: LlmembError) -> None:
        self._error = self._error or error

    def error(self) -> LlmembError | None:
        return self._error


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a worker needs; plain data."""

    settings: FinetuneSettings
    spec: EmbedderSpec
    output: Storage
    judge: Judge | None
    board: Any = None
    threads: int | None = None
    """Of a CPU worker."""


def work(config: dict[str, Any]) -> dict[str, Any] | None:
    """One worker's part of ``config["job"]``; the first one's Standing comes back, as a mapping."""
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    job: Job = config["job"]
    if ray.get(job.board.error.remote()) is not None:
        return None
    job.board.up.remote()
    context, device = get_context(), get_device()
    assert isinstance(device, torch.device)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    try:
        place = Place(context.get_world_rank(), context.get_world_size())
        return train(job, place, device, tell=job.board.tell.remote, check=partial(_go_on, job.board))
    except torch.OutOfMemoryError as error:
        told = RunFailed(f"out of memory: {str(error).splitlines()[0]}; lower micro_batch, or set gradient_checkpointing or shard_parameters")
        ray.get(job.board.fail.remote(told))
        raise
    except LlmembError as error:
        ray.get(job.board.fail.remote(error))
        raise


def _go_on(board: Any) -> None:
    """Raises what ends the training from without: another driver took OUT over."""
    error = ray.get(board.error.remote())
    if error is not None:
        raise error


def train(job: Job, place: Place, device: Any, *, tell: Any = lambda row: None, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Runs the loop and writes OUT/adapter or OUT/model, without its card; without Ray where there is one worker."""
    settings, output = job.settings, job.output

    def keep(rows: list[dict[str, Any]]) -> None:
        check()
        metrics.write(rows, output)

    loop = Loop(
        settings,
        job.spec.on(device.type == "cuda"),
        Batches.open(output),
        Checkpoints(output),
        device=device,
        place=place,
        judge=job.judge,
        tell=tell,
        keep=keep,
    )
    standing = loop.run()
    loop.load_best()
    with tempfile.TemporaryDirectory(prefix="llmemb-") as scratch:
        directory = Path(scratch)
        loop.model.save(directory)
        if place.rank == 0:
            metrics.write(standing.rows, output)
            for path in sorted(path for path in directory.rglob("*") if path.is_file()):
                output.put(f"{OUTCOMES[settings.method]}/{path.relative_to(directory).as_posix()}", path.read_bytes())
        barrier()
    return dict(vars(standing))
