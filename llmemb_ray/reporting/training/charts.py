"""The curves of a training, as plotly figures in JSON.

Invariant: a value that is not finite is a gap, in a curve and in what is smoothed from it; names are escaped before plotly sees them,
because plotly reads a little HTML in its texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llmemb_ray.reporting.figures import COLOURS, as_json, figure, plain
from llmemb_ray.training.metrics import Row

POINTS = 2000
"""Steps drawn; of a longer training every so-manieth, so that the page stays small."""

MEMORY_SHARE = 0.04
"""Of the rows, how far back smoothing remembers: a curve of any length is smoothed alike."""

Values = list[float | None]


def charts(steps: Sequence[Row], evaluations: Sequence[Row]) -> dict[str, str]:
    """Figures in JSON by the id of the element that they are drawn in; those that have data."""
    drawn: dict[str, Any] = {}
    if steps:
        drawn["chart-loss"] = _losses(steps)
        if any(row["accuracy"] is not None for row in steps):
            drawn["chart-accuracy"] = _curve(steps, "accuracy", "in the batch", COLOURS[2], smooth=True, layout={"tickformat": ".0%", "range": [0, 1]})
        drawn["chart-rate"] = _curve(steps, "learning_rate", "learning rate", COLOURS[4])
        drawn["chart-norm"] = _curve(steps, "gradient_norm", "norm of the gradient", COLOURS[5], smooth=True)
        drawn["chart-speed"] = _curve(steps, "tokens_per_second", "tokens/s", COLOURS[0])
        drawn["chart-memory"] = _curve(steps, "memory_bytes", "GiB", COLOURS[6], scale=2.0**-30)
    if evaluations:
        drawn["chart-evaluations"] = _evaluations(evaluations)
    return as_json(drawn)


def best(evaluations: Sequence[Row]) -> dict[str, Row]:
    """By evaluation its row of the highest score after a step, the first of equals: the checkpoint that a training keeps. None where no score is finite."""
    found: dict[str, Row] = {}
    for row in evaluations:
        name = row["evaluation"]
        if row["step"] and math.isfinite(row["score"]) and (name not in found or row["score"] > found[name]["score"]):
            found[name] = row
    return found


def smoothed(values: Values, weight: float) -> Values:
    """Exponential moving average whose beginning is not drawn to zero: the mean of all values so far, each ``weight`` times the one after it."""
    found: Values = []
    total = count = 0.0
    for value in values:
        if value is not None:
            total, count = total * weight + value, count * weight + 1
        found.append(total / count if value is not None else None)
    return found


def finite(value: float | None, scale: float = 1.0) -> float | None:
    return value * scale if value is not None and math.isfinite(value) else None


def _every(rows: Sequence[Any]) -> slice:
    """Counted from the end: the last step is always drawn."""
    stride = max(1, math.ceil(len(rows) / POINTS))
    return slice((len(rows) - 1) % stride, None, stride)


def _blank(height: int, axis: dict[str, Any] | str, **layout: Any) -> Any:
    y = {"title": {"text": axis}} if isinstance(axis, str) else axis
    return figure(height, xaxis={"title": {"text": "step"}, "automargin": True, "rangemode": "tozero"}, yaxis=y | {"automargin": True}, **layout)


def _losses(steps: Sequence[Row]) -> Any:
    parts = [name for name in ("contrastive", "distillation") if any(finite(row[name]) is not None for row in steps)]
    tasks = list(dict.fromkeys(row["task"] for row in steps))
    made = _blank(380, "loss", showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}, margin={"l": 64, "r": 16, "t": 40, "b": 48})
    every = _every(steps)
    for place, task in enumerate(tasks):
        shown = [row if row["task"] == task else row | {"loss": None} for row in map(dict, steps[every])]
        colour = COLOURS[place % len(COLOURS)]
        name = plain(task) if len(tasks) > 1 else "each step"
        _add(made, [row["step"] for row in shown], [finite(row["loss"]) for row in shown], name, colour, faint=True, joined=len(tasks) == 1)
    rows = [row["step"] for row in steps[every]]
    weight = _weight(len(steps))
    _add(made, rows, smoothed([finite(row["loss"]) for row in steps], weight)[every], "smoothed", COLOURS[3])
    if len(parts) > 1:
        for name, colour in zip(parts, (COLOURS[2], COLOURS[1]), strict=True):
            _add(made, rows, smoothed([finite(row[name]) for row in steps], weight)[every], f"{name}, smoothed", colour)
    return made


def _curve(steps: Sequence[Row], name: str, title: str, colour: str, *, smooth: bool = False, scale: float = 1.0, layout: dict[str, Any] | None = None) -> Any:
    made = _blank(240, {"title": {"text": title}, "rangemode": "tozero"} | (layout or {}), margin={"l": 64, "r": 16, "t": 16, "b": 44})
    every = _every(steps)
    rows, values = [row["step"] for row in steps[every]], [finite(row[name], scale) for row in steps]
    _add(made, rows, values[every], title, colour, faint=smooth)
    if smooth:
        _add(made, rows, smoothed(values, _weight(len(steps)))[every], "smoothed", colour)
    return made


def _weight(rows: int) -> float:
    return 1 - 1 / max(1.0, MEMORY_SHARE * rows)


def _add(made: Any, x: Sequence[int], y: Values, name: str, colour: str, *, faint: bool = False, joined: bool = True) -> None:
    alone = sum(value is not None for value in y) < 3  # A line of one point is not seen.
    made.add_scatter(
        x=list(x),
        y=y,
        name=name,
        mode=("lines+markers" if alone else "lines") if joined else "markers",
        opacity=(0.4 if joined else 0.7) if faint and not alone else 1,
        line={"color": colour, "width": 1 if faint else 2},
        marker={"color": colour, "size": 7 if alone else 5},
        hovertemplate=f"step %{{x:,}}: %{{y:.4~g}}<extra>{name}</extra>",
    )


def _evaluations(evaluations: Sequence[Row]) -> Any:
    made = _blank(300, {"title": {"text": "score × 100"}, "rangemode": "normal"}, showlegend=True, margin={"l": 64, "r": 16, "t": 40, "b": 48})
    made.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    highest = best(evaluations)
    for place, name in enumerate(dict.fromkeys(row["evaluation"] for row in evaluations)):
        rows = [row for row in evaluations if row["evaluation"] == name]
        colour, shown = COLOURS[place % len(COLOURS)], plain(name)
        hover = "step %{x:,}: %{y:.2f}<extra>" + shown + "</extra>"
        made.add_scatter(
            x=[row["step"] for row in rows],
            y=[finite(row["score"]) for row in rows],
            name=shown,
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"size": 6},
            hovertemplate=hover,
        )
        if name in highest:
            top = highest[name]
            made.add_scatter(
                x=[top["step"]],
                y=[top["score"]],
                name=f"best {top['score']:.2f}",
                mode="markers+text",
                text=[f"{top['score']:.2f}"],
                textposition="top center",
                marker={"size": 14, "symbol": "star", "color": colour},
                hovertemplate=hover,
                cliponaxis=False,
            )
    return made
