"""The charts of evaluations, as plotly figures in JSON.

Invariant: names of models and rows are escaped before plotly sees them, because plotly reads a little HTML in its texts. An average is
drawn against those of papers only if it is of as many tasks as theirs.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from llmemb_ray.evaluation import published
from llmemb_ray.evaluation.compare import Comparison
from llmemb_ray.evaluation.published import METHODS, Published
from llmemb_ray.evaluation.record import Evaluation
from llmemb_ray.pipeline.estimates.text import quantity
from llmemb_ray.reporting.figures import COLOURS, as_json, figure, plain

BY_SIZE = ("sts", "sts-raw", "transfer")
"""Suites drawn against the size of the model."""

CURVES = {"prompteol": COLOURS[0], "prompteol-icl": COLOURS[1], "fine-tuned": COLOURS[2]}
"""Methods whose published averages are drawn, and their colours."""

OTHERS = COLOURS[3:]
"""Colours of our other methods."""

FAMILIES = {"opt": ("OPT", "solid"), "llama": ("LLaMA", "dot")}
"""Families whose published averages are drawn: name, kind of line."""

BARS = 3
"""Evaluations up to which languages are drawn as bars; more are drawn as points."""

TICKS = [10.0**power for power in range(4, 13)]
"""Parameters named on the axis."""

LABEL = 34
"""Characters in a line of a row's name."""

SCALE = [[0.0, "#7a2d4f"], [0.5, "#a06a1a"], [1.0, "#23805a"]]
"""0 to 100; white numbers are read on it at every point, light or dark the page."""


def charts(comparison: Comparison) -> dict[str, str]:
    """Figures in JSON by the id of the element that they are drawn in; those that have data."""
    drawn: dict[str, Any] = {}
    for suite in BY_SIZE:
        ours = [
            (row.name, made)
            for row, made in zip(comparison.rows, comparison.evaluations, strict=True)
            if published.is_whole(made, suite) and made.parameters > 0
        ]
        if suite in comparison.suites and ours:
            drawn[f"chart-size-{suite}"] = _by_size(ours, suite)
    if len(comparison.suites.get("bitext", ())) > 1:
        drawn["chart-languages"] = _languages({row.name: row.figures["bitext"] for row in comparison.rows})
    if "passkey" in comparison.suites:
        drawn["chart-passkey"] = _passkey({row.name: row.figures["passkey"] for row in comparison.rows})
    return as_json(drawn)


def _by_size(ours: Sequence[tuple[str, Evaluation]], suite: str) -> Any:
    made = figure(
        460,
        showlegend=True,
        legend={"orientation": "h", "y": -0.2, "yanchor": "top"},
        margin={"l": 64, "r": 16, "t": 16, "b": 120},
        xaxis={"type": "log", "title": {"text": "parameters"}, "automargin": True, "tickvals": TICKS, "ticktext": [quantity(tick) for tick in TICKS]},
        yaxis={"title": {"text": "average"}, "automargin": True},
    )
    for method, colour in CURVES.items():
        for family, (name, dash) in FAMILIES.items():
            rows = sorted((row for row in published.of(suite, method) if _on_curve(row, family)), key=lambda row: row.parameters)
            if len(rows) > 1:
                made.add_scatter(
                    x=[row.parameters for row in rows],
                    y=[row.avg for row in rows],
                    text=[plain(f"{row.title}: {published.shown(row.avg, approximate=row.is_approximate('avg'))}") for row in rows],
                    name=f"published: {name}, {METHODS[method].removeprefix('PromptEOL, ')}",
                    mode="lines+markers",
                    opacity=0.55,
                    line={"color": colour, "dash": dash, "width": 2},
                    marker={"size": 6, "symbol": "circle-open"},
                    hovertemplate="%{text}<extra></extra>",
                )
    methods = list(dict.fromkeys(published.method_of(one) for _, one in ours))
    colours = CURVES | {method: OTHERS[place % len(OTHERS)] for place, method in enumerate(method for method in methods if method not in CURVES)}
    for method in methods:
        mine = sorted(((name, one) for name, one in ours if published.method_of(one) == method), key=lambda pair: pair[1].parameters)
        made.add_scatter(
            x=[one.parameters for _, one in mine],
            y=[one.suites[suite]["avg"] for _, one in mine],
            text=[plain(f"{name}: {one.suites[suite]['avg']:.2f}, {quantity(one.parameters)} parameters") for name, one in mine],
            name=f"ours: {METHODS[method]}",
            mode="markers",
            marker={"size": 13, "symbol": "diamond", "color": colours[method], "line": {"width": 1.5, "color": "#ffffff"}},
            hovertemplate="%{text}<extra></extra>",
        )
    return made


def _on_curve(row: Published, family: str) -> bool:
    """Of the first LLaMA, in full precision."""
    return row.family == family and row.avg is not None and not row.settings and not row.model.startswith("LLaMA 2")


def _languages(figures: Mapping[str, Mapping[str, float]]) -> Any:
    languages = {task for of_row in figures.values() for task in of_row if task != "avg"}

    def mean(language: str) -> float:
        found = [of_row[language] for of_row in figures.values() if language in of_row]
        return sum(found) / len(found)

    ordered = sorted(languages, key=lambda language: (-mean(language), language))
    made = figure(
        400,
        showlegend=len(figures) > 1,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        margin={"l": 56, "r": 16, "t": 40, "b": 64},
        bargap=0.15,
        xaxis={"type": "category", "tickfont": {"size": 9}, "tickangle": -90, "automargin": True, "dtick": 1, "showgrid": False},
        yaxis={"title": {"text": "accuracy × 100"}, "range": [0, 100], "automargin": True},
    )
    for name, of_row in figures.items():
        values = [of_row.get(language) for language in ordered]
        hover = "%{x}: %{y:.2f}<extra>" + plain(name) + "</extra>"
        if len(figures) <= BARS:
            made.add_bar(x=[plain(language) for language in ordered], y=values, name=plain(name), hovertemplate=hover)
        else:
            made.add_scatter(x=[plain(language) for language in ordered], y=values, name=plain(name), mode="markers", hovertemplate=hover)
    return made


def _passkey(figures: Mapping[str, Mapping[str, float]]) -> Any:
    theirs = published.of("passkey")
    lengths = list(dict.fromkeys(task for of_row in [*figures.values(), *(row.tasks for row in theirs)] for task in of_row if task != "avg"))
    lengths.sort(key=_tokens)
    rows = [(name, [of_row.get(length) for length in lengths], False) for name, of_row in figures.items()]
    rows += [(f"published: {row.title}", [row.figure(length) for length in lengths], row.approximate == "all") for row in theirs]
    made = figure(
        110 + 46 * len(rows),
        margin={"l": 16, "r": 16, "t": 8, "b": 48},
        xaxis={"type": "category", "title": {"text": "prompt length in tokens"}, "automargin": True, "showgrid": False},
        yaxis={"type": "category", "autorange": "reversed", "automargin": True, "showgrid": False, "tickfont": {"size": 11}},
    )
    made.add_heatmap(
        x=lengths,
        y=[_label(name) for name, _, _ in rows],
        z=[values for _, values, _ in rows],
        text=[["" if value is None else published.shown(value, approximate=approximate, digits=0) for value in values] for _, values, approximate in rows],
        texttemplate="%{text}",
        textfont={"color": "#ffffff"},
        hovertemplate="%{y}<br>%{x} tokens: %{text}<extra></extra>",
        hoverongaps=False,
        zmin=0,
        zmax=100,
        colorscale=SCALE,
        xgap=2,
        ygap=2,
        showscale=False,
    )
    return made


def _tokens(length: str) -> int:
    """Of '512', '1k', '32k'; a name that is no length stands last."""
    number = length.removesuffix("k")
    return int(number) * (1024 if length.endswith("k") else 1) if number.isdecimal() else 2**62


def _label(name: str) -> str:
    return "<br>".join(plain(line) for line in textwrap.wrap(name, LABEL) or [name])
