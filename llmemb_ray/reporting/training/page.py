"""One HTML page about a training: its curves, its evaluations, the settings it ran with and what came out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmemb_ray.config import FinetuneSettings
from llmemb_ray.pipeline.estimates.text import quantity
from llmemb_ray.pipeline.progress import duration
from llmemb_ray.reporting import document
from llmemb_ray.reporting.training.charts import POINTS, best, charts
from llmemb_ray.storage import Storage, absolute
from llmemb_ray.training import metrics
from llmemb_ray.training.finetune import PAGE, Finetuned
from llmemb_ray.training.metrics import Row


@dataclass(frozen=True, kw_only=True)
class Tile:
    name: str
    value: str
    small: str = ""


def write(
    rows: Sequence[Row],
    storage: Storage,
    title: str,
    *,
    steps: int | None = None,
    settings: Mapping[str, Any] | None = None,
    result: Mapping[str, Any] | None = None,
) -> None:
    """Puts the page at ``PAGE`` in place of the one before; the rest as for ``render``. Raises StorageError."""
    storage.put(PAGE, render(rows, title, steps=steps, settings=settings, result=result).encode())


def of(made: Finetuned, settings: FinetuneSettings) -> None:
    """Puts the page of a finished training into its OUT. Raises StorageError, NotFound where its metrics are gone."""
    storage = Storage(absolute(settings.out), settings.access)
    result = {"steps": made.steps, "tokens": made.tokens, "seconds": made.seconds, "before": made.before, "after": made.after, "step written": made.after_step}
    told = {name: value for name, value in result.items() if value is not None}
    write(metrics.read(storage), storage, f"Fine-tuning of {made.model}", steps=made.planned, settings=made.settings, result=told)


def render(
    rows: Sequence[Row], title: str, *, steps: int | None = None, settings: Mapping[str, Any] | None = None, result: Mapping[str, Any] | None = None
) -> str:
    """The page.

    rows:     of steps and of evaluations, as ``llmemb_ray.training.metrics`` has them; may be empty
    steps:    of the whole training, None where it is not known
    settings: by name, all are shown: no secrets; result: what came out, by name
    """
    of_steps = [row for row in rows if "evaluation" not in row]
    evaluations = [row for row in rows if "evaluation" in row]
    return document.render(
        "training/page.html",
        charts(of_steps, evaluations),
        title=title,
        tiles=_tiles(of_steps, evaluations, steps),
        banners=_banners(of_steps, evaluations),
        evaluations=_table(evaluations),
        thinned=len(of_steps) if len(of_steps) > POINTS else 0,
        points=POINTS,
        settings={name: _shown(value) for name, value in (settings or {}).items()},
        result={name: _shown(value) for name, value in (result or {}).items()},
    )


def _tiles(steps: Sequence[Row], evaluations: Sequence[Row], whole: int | None) -> list[Tile]:
    before = {row["evaluation"]: f", {row['score']:.2f} before" for row in evaluations if not row["step"]}
    found = [
        Tile(name=f"best {name}", value=f"{row['score']:.2f}", small=f"at step {row['step']:,}{before.get(name, '')}")
        for name, row in list(best(evaluations).items())[:2]
    ]
    if not steps:
        return found
    last = steps[-1]
    speeds = [row["tokens_per_second"] for row in steps if math.isfinite(row["tokens_per_second"])]
    progress = f"of {whole:,}, " if whole is not None else ""
    return [
        Tile(name="steps", value=f"{last['step']:,}", small=f"{progress}epoch {last['epoch']:.2f}"),
        Tile(name="loss", value=f"{last['loss']:.3f}", small=f"first logged {steps[0]['loss']:.3f}"),
        *(
            [Tile(name="accuracy in the batch", value=f"{last['accuracy']:.1%}", small=f"first logged {steps[0]['accuracy']:.1%}")]
            if last["accuracy"] is not None and steps[0]["accuracy"] is not None
            else []
        ),
        *found,
        Tile(name="time", value=duration(last["seconds"])),
        Tile(name="tokens", value=quantity(last["tokens"]), small=f"{quantity(sum(speeds) / len(speeds))} a second" if speeds else ""),
        Tile(name="peak memory", value=metrics.memory(max(row["memory_bytes"] for row in steps))),
    ]


def _banners(steps: Sequence[Row], evaluations: Sequence[Row]) -> list[str]:
    """What a reader must know before the curves."""
    if not steps:
        return ["No step is logged yet."]
    found = []
    for what, rows, name in (("loss", steps, "loss"), ("gradient", steps, "gradient_norm"), ("score of an evaluation", evaluations, "score")):
        bad = [row["step"] for row in rows if not math.isfinite(row[name])]
        if bad:
            more = f" and at {len(bad) - 1:,} later ones logged" if len(bad) > 1 else ""
            found.append(f"The {what} is no finite number at step {bad[0]:,}{more}: gaps in the curve.")
    return found


def _table(evaluations: Sequence[Row]) -> tuple[list[str], list[tuple[int, list[tuple[str, bool]]]]]:
    """Names, and by step a cell of each: the score, and whether it is the best one kept."""
    names = list(dict.fromkeys(row["evaluation"] for row in evaluations))
    highest = best(evaluations)
    scores = {(row["step"], row["evaluation"]): row["score"] for row in evaluations}
    lines = []
    for step in sorted({row["step"] for row in evaluations}):
        cells = [(f"{scores[step, name]:.2f}" if (step, name) in scores else "–", name in highest and highest[name]["step"] == step) for name in names]
        lines.append((step, cells))
    return names, lines


def _shown(value: Any) -> str:
    if value is None or value == [] or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_shown, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(one)}" for name, one in value.items() if one not in (None, [], ""))
    return str(value)
