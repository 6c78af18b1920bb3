"""The charts of a report, as plotly figures in JSON.

Invariant: whatever comes from a corpus is escaped before plotly sees it, because plotly reads a little HTML in
its texts.
"""

from __future__ import annotations

import math
import textwrap
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

from llmemb_ray.reporting.accounts import Throughput
from llmemb_ray.reporting.facts import Facts, Point
from llmemb_ray.reporting.figures import COLOURS, as_json, figure, plain
from llmemb_ray.reporting.health import Histogram

SCALE = [[0.0, "#4a86d8"], [0.5, "#36b08a"], [1.0, "#f0a030"]]
"""Few to many tokens; seen on white and on near black at every point."""

WRAP = 64
"""Characters in a line of a text on hover."""


def charts(facts: Facts) -> dict[str, str]:
    """Figures in JSON by the id of the element that they are drawn in; those that have data."""
    drawn: dict[str, Any] = {}
    if facts.throughput:
        drawn["chart-throughput"] = throughput(facts.throughput)
    if facts.lengths:
        drawn["chart-lengths"] = _lengths(facts)
    if facts.accounts["tokens_computed"] or facts.accounts["tokens_copied"]:
        drawn["chart-tokens"] = _tokens(facts.accounts)
    if facts.health.sampled > 1:
        drawn["chart-norms"] = _histogram(facts.health.norms, "norm", COLOURS[0])
        drawn["chart-cosines"] = _histogram(facts.health.cosines, "cosine of a pair", COLOURS[2], mark=(facts.health.mean_cosine, "mean"))
        drawn["chart-dimensions"] = _dimensions(facts.health.deviations)
    if facts.points:
        drawn["chart-map"] = _map(facts.points)
    return as_json(drawn)


def throughput(rates: Throughput, rows: str = "rows") -> Any:
    """Tokens a second by host, and ``rows`` a second, over the time of work."""
    from datetime import UTC, datetime

    largest = rates.seconds[-1]
    unit, size = ("hours", 3600.0) if largest > 3 * 3600 else ("minutes", 60.0) if largest > 180 else ("seconds", 1.0)
    # Steps from the beginning of each bin to its end, so that the last one has a width too.
    x = [(second - rates.bin_seconds / 2) / size for second in rates.seconds] + [(largest + rates.bin_seconds / 2) / size]
    clock = [datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") for moment in [*rates.clock, rates.clock[-1]]]
    made = figure(
        400,
        showlegend=len(rates.tokens_per_s) > 1,
        legend={"orientation": "h", "y": 1.12},
        hovermode="x",
        xaxis={"title": {"text": f"{unit} of work"}, "anchor": "y2", "rangemode": "tozero"},
        yaxis={"title": {"text": "tokens/s"}, "domain": [0.48, 1], "rangemode": "tozero", "automargin": True},
        yaxis2={"title": {"text": f"{rows}/s"}, "domain": [0, 0.38], "rangemode": "tozero", "automargin": True, "anchor": "x"},
    )
    for host, values in rates.tokens_per_s.items():
        name = plain(host or "all hosts")
        hover = "%{customdata}<br>%{y:,.0f} tokens/s<extra>" + name + "</extra>"
        made.add_scatter(x=x, y=[*values, values[-1]], customdata=clock, name=name, mode="lines", line={"shape": "hv"}, stackgroup="hosts", hovertemplate=hover)
    rows_hover = "%{customdata}<br>%{y:,.3~r} " + rows + "/s<extra></extra>"
    values = [*rates.rows_per_s, rates.rows_per_s[-1]]
    line = {"shape": "hv", "color": COLOURS[2]}
    made.add_scatter(x=x, y=values, customdata=clock, yaxis="y2", mode="lines", fill="tozeroy", line=line, showlegend=False, hovertemplate=rows_hover)
    for place in rates.pauses:
        made.add_vline(x=place / size, line={"dash": "dot", "width": 1, "color": COLOURS[3]})
    return made


def _lengths(facts: Facts) -> Any:
    lengths = facts.lengths
    assert lengths is not None
    made = figure(
        280, xaxis={"title": {"text": "tokens of a prompt"}, "automargin": True}, yaxis={"title": {"text": "prompts"}, "automargin": True}, bargap=0.04
    )
    ranges = [f"{low:,}" if high - low == 1 else f"{low:,} to {high - 1:,}" for low, high in pairwise(lengths.edges)]
    made.add_bar(
        x=[(low + high - 1) / 2 for low, high in pairwise(lengths.edges)],
        y=lengths.counts,
        width=[high - low for low, high in pairwise(lengths.edges)],
        customdata=ranges,
        hovertemplate="%{customdata} tokens: %{y:,} prompts<extra></extra>",
    )
    return made


def _tokens(accounts: dict[str, Any]) -> Any:
    parts = [
        ("through the model", accounts["tokens_computed"] - accounts["tokens_padding"], COLOURS[0]),
        ("padding", accounts["tokens_padding"], COLOURS[1]),
        ("shared prefix, not computed again", accounts["tokens_shared"], COLOURS[2]),
        ("of copied vectors, not computed", accounts["tokens_copied"], COLOURS[4]),
    ]
    whole = max(1, sum(count for _, count, _ in parts))
    made = figure(
        130,
        barmode="stack",
        showlegend=True,
        legend={"orientation": "h", "y": 1.1, "yanchor": "bottom", "traceorder": "normal"},
        margin={"l": 16, "r": 16, "t": 40, "b": 40},
        xaxis={"tickformat": ".0%", "range": [0, 1]},
        yaxis={"visible": False},
    )
    for name, count, colour in parts:
        if count:
            hover = f"{name}: {count:,} tokens, %{{x:.1%}}<extra></extra>"
            made.add_bar(x=[count / whole], y=[""], orientation="h", name=name, marker={"color": colour}, hovertemplate=hover)
    return made


def _histogram(histogram: Histogram, title: str, colour: str, mark: tuple[float, str] | None = None) -> Any:
    edges = histogram.edges
    made = figure(240, xaxis={"title": {"text": title}, "automargin": True}, bargap=0.04, margin={"l": 56, "r": 16, "t": 24, "b": 48})
    made.add_bar(
        x=[(low + high) / 2 for low, high in pairwise(edges)],
        y=histogram.counts,
        marker={"color": colour},
        hovertemplate="%{x:.4f}: %{y:,}<extra></extra>",
    )
    if mark:
        made.add_vline(
            x=mark[0],
            line={"dash": "dot", "width": 1.5, "color": COLOURS[3]},
            annotation={"text": f"{mark[1]} {mark[0]:.3f}", "y": 1, "yref": "paper", "yanchor": "bottom", "xanchor": "center"},
        )
    return made


def _dimensions(deviations: list[float]) -> Any:
    made = figure(240, xaxis={"title": {"text": "dimensions, by deviation"}, "automargin": True})
    made.add_scatter(
        x=list(range(1, len(deviations) + 1)),
        y=deviations,
        mode="lines",
        fill="tozeroy",
        line={"color": COLOURS[4]},
        hovertemplate="%{x:,} dimensions deviate by at least %{y:.4g}<extra></extra>",
    )
    return made


def _map(points: list[Point]) -> Any:
    tokens = [point.n_tokens for point in points]
    ticks = [2**power for power in range(15) if min(tokens) <= 2**power <= max(tokens)]
    ticks = ticks if len(ticks) > 1 else sorted({min(tokens), max(tokens)})
    bare = {"visible": False}
    made = figure(620, xaxis=bare, yaxis=bare | {"scaleanchor": "x"}, margin={"l": 8, "r": 8, "t": 8, "b": 8}, dragmode="pan")
    made.add_scatter(
        x=[point.x for point in points],
        y=[point.y for point in points],
        mode="markers",
        text=[_hover(point) for point in points],
        hovertemplate="%{text}<extra></extra>",
        marker={
            "size": 6,
            "opacity": 0.75,
            "color": [math.log2(max(1, count)) for count in tokens],
            "colorscale": SCALE,
            "showscale": min(tokens) < max(tokens),
            "colorbar": {
                "title": {"text": "tokens"},
                "tickvals": [math.log2(tick) for tick in ticks],
                "ticktext": ticks,
                "thickness": 10,
                "len": 0.5,
                "outlinewidth": 0,
            },
        },
    )
    return made


def _hover(point: Point) -> str:
    name = plain(textwrap.shorten(point.id, WRAP, placeholder="…") if point.id is not None else f"row {point.source_row:,}")
    chunk = f", chunk {point.chunk}" if point.chunk is not None else ""
    lines = [f"<b>{name}</b>", f"{plain(PurePosixPath(point.url).name[-WRAP:])} row {point.source_row:,}{chunk}, {point.n_tokens:,} tokens"]
    if point.text is not None:
        lines += ["", *(plain(line) for line in textwrap.wrap(point.text, WRAP))]
    return "<br>".join(lines)
