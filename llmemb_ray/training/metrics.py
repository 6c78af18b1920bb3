"""What a training measured, step by step: as JSON lines, as a TensorBoard event file, as a line of the log.

Invariant: each form is made from the whole list of rows and replaces the one before, so that a training that goes on from a checkpoint
leaves no step twice. Knows nothing of how a step is made.

A row of a step: step (steps done), epoch, task, loss, contrastive and distillation (None where the batch has none), accuracy (0 to 1, in the
batch), masked (candidates left out), learning_rate, gradient_norm, tokens (so far), tokens_per_second, seconds (so far), memory_bytes.
A row of an evaluation: step, evaluation (its name), score (× 100).
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmemb_ray.pipeline.estimates.text import quantity
from llmemb_ray.pipeline.progress import duration
from llmemb_ray.storage import Storage

Row = Mapping[str, Any]

JSONL = "metrics.jsonl"

EVENTS = "tensorboard/events.out.tfevents.training"
"""TensorBoard reads a file of any name that has ``tfevents`` in it."""

NAMES = ("task", "evaluation")
"""Of a row, what is text."""

NOT_FINITE = ("nan", "inf", "-inf")
"""Numbers that JSON does not have, as ``JSONL`` has them."""

SCALARS = (
    *("loss", "contrastive", "distillation", "accuracy", "masked", "learning_rate", "gradient_norm"),
    *("tokens", "tokens_per_second", "memory_bytes", "epoch"),
)
"""Of a step's row, shown by TensorBoard as ``train/…``."""


def write(rows: Sequence[Row], storage: Storage, *, started: float = 0.0) -> None:
    """Puts ``JSONL`` and ``EVENTS`` in place of those before. started: as for ``tensorboard``. Raises StorageError."""
    storage.put(JSONL, jsonl(rows))
    storage.put(EVENTS, tensorboard(rows, started=started))


def read(storage: Storage) -> list[dict[str, Any]]:
    """The rows that ``write`` wrote. Raises NotFound where there are none, StorageError."""
    rows = [json.loads(line) for line in storage.read(JSONL).splitlines()]
    return [{name: float(value) if value in NOT_FINITE and name not in NAMES else value for name, value in row.items()} for row in rows]


def jsonl(rows: Sequence[Row]) -> bytes:
    """One JSON object a row. JSON has no NaN and no infinity: they are written as the strings "nan", "inf" and "-inf"."""
    made = ({name: _json(value) for name, value in row.items()} for row in rows)
    return b"".join(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in made)


def tensorboard(rows: Sequence[Row], *, started: float = 0.0) -> bytes:
    """An event file with the scalars ``train/…`` by step and ``eval/NAME``.

    started: when the training began, in Unix seconds; an event's time is this and the seconds of its row. An evaluation's is that of the
    step's row before it.
    """
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory(prefix="llmemb-events-") as scratch:
        writer = SummaryWriter(scratch)
        for name, value, step, seconds in _scalars(rows):
            writer.add_scalar(name, value, step, started + seconds)
        writer.close()
        (made,) = Path(scratch).iterdir()
        return made.read_bytes()


def line(row: Row, steps: int) -> str:
    """A row for the log. steps: of the whole training, for the time left, which is judged by the mean time of a step so far."""
    at = f"step {row['step']:,}/{steps:,}"
    if "evaluation" in row:
        return f"{at}, {row['evaluation']} {row['score']:.2f}"
    parts = [at, f"loss {row['loss']:.3f}"]
    if row["contrastive"] is not None and row["distillation"] is not None:
        parts[-1] += f" (contrastive {row['contrastive']:.3f}, distillation {row['distillation']:.3f})"
    if row["accuracy"] is not None:
        parts.append(f"accuracy {row['accuracy']:.1%}".replace("%", " %"))
    parts.append(f"lr {scientific(row['learning_rate'])}")
    parts += [f"{quantity(row['tokens_per_second'])} tokens/s", memory(row["memory_bytes"])]
    if 0 < row["step"] < steps:
        parts.append(f"ETA {duration(row['seconds'] / row['step'] * (steps - row['step']))}")
    return ", ".join(parts)


def scientific(value: float) -> str:
    """``4.5e-4``."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def memory(bytes_: float) -> str:
    """In powers of two, as memory is sold: ``1.2 GiB``."""
    return f"{bytes_ / 2**30:.1f} GiB" if bytes_ >= 2**30 else f"{bytes_ / 2**20:.0f} MiB"


def _json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(rows: Sequence[Row]) -> Iterator[tuple[str, float, int, float]]:
    seconds = 0.0
    for row in rows:
        if "evaluation" in row:
            yield f"eval/{row['evaluation']}", row["score"], row["step"], seconds
            continue
        seconds = row["seconds"]
        for name in SCALARS:
            if row[name] is not None:
                yield f"train/{name}", row[name], row["step"], seconds
