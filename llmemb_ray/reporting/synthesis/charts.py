"""The charts of a synthesis, as plotly figures in JSON.

Invariant: names are those of the package or escaped before plotly sees them, because plotly reads a little HTML in its texts.
"""

from __future__ import annotations

import math
from typing import Any

from llmemb_ray.reporting.charts import throughput
from llmemb_ray.reporting.figures import COLOURS, as_json, figure, plain
from llmemb_ray.reporting.synthesis.facts import Facts
from llmemb_ray.synthesis.duplicates import TEXTS

LOGARITHMIC = 30
"""How many times the requests of one language those of another are from which bars are drawn by powers of ten."""

LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"}


def charts(facts: Facts) -> dict[str, str]:
    """Figures in JSON by the id of the element that they are drawn in; those that have data."""
    drawn: dict[str, Any] = {}
    if facts.families:
        drawn["chart-families"] = _families(facts)
    if len(facts.languages) > 1:
        drawn["chart-languages"] = _languages(facts)
    if facts.lengths:
        drawn["chart-lengths"] = _lengths(facts)
    if facts.throughput:
        drawn["chart-throughput"] = throughput(facts.throughput, "requests")
    return as_json(drawn)


def _families(facts: Facts) -> Any:
    made = figure(
        300,
        showlegend=True,
        barmode="group",
        bargap=0.3,
        legend=LEGEND,
        margin={"l": 56, "r": 16, "t": 40, "b": 40},
        xaxis={"type": "category", "automargin": True},
        yaxis={"tickformat": ".0%", "rangemode": "tozero", "automargin": True},
    )
    for kind, colour in (("asked", COLOURS[6]), ("accepted", COLOURS[0])):
        counts = {name: getattr(tally, kind) for name, tally in facts.families.items()}
        whole = max(1, sum(counts.values()))
        made.add_bar(
            x=[plain(name) for name in counts],
            y=[count / whole for count in counts.values()],
            customdata=list(counts.values()),
            name=f"share of all {kind}",
            marker={"color": colour},
            hovertemplate=f"%{{x}}: %{{customdata:,}} {kind}, %{{y:.1%}} of all<extra></extra>",
        )
    return made


def _languages(facts: Facts) -> Any:
    """Requests and what was accepted of them; below, the share."""
    tallies = facts.languages.values()
    names, asked = [plain(name) for name in facts.languages], [tally.asked for tally in tallies]
    axis: dict[str, Any] = {"title": {"text": "requests"}, "rangemode": "tozero", "automargin": True, "domain": [0.42, 1]}
    if max(asked) > LOGARITHMIC * min(asked):
        axis |= {"type": "log", "dtick": 1, "range": [math.log10(0.6), math.log10(max(asked) * 1.2)]}
    made = figure(
        460,
        showlegend=True,
        barmode="overlay",
        bargap=0.2,
        legend=LEGEND,
        margin={"l": 56, "r": 16, "t": 40, "b": 64},
        xaxis={"type": "category", "tickfont": {"size": 9}, "tickangle": -90, "automargin": True, "dtick": 1, "showgrid": False, "anchor": "y2"},
        yaxis=axis,
        yaxis2={"title": {"text": "accepted"}, "tickformat": ".0%", "range": [0, 1], "automargin": True, "domain": [0, 0.34], "anchor": "x"},
    )
    accepted = [tally.accepted for tally in tallies]
    made.add_bar(x=names, y=asked, name="asked", marker={"color": COLOURS[6]}, hovertemplate="%{x}: %{y:,} asked<extra></extra>")
    made.add_bar(x=names, y=accepted, name="accepted", marker={"color": COLOURS[0]}, hovertemplate="%{x}: %{y:,} accepted<extra></extra>")
    shares = [part / whole for part, whole in zip(accepted, asked, strict=True)]
    hover = "%{x}: %{y:.1%} accepted<extra></extra>"
    made.add_bar(x=names, y=shares, yaxis="y2", showlegend=False, marker={"color": COLOURS[0]}, hovertemplate=hover)
    return made


def _lengths(facts: Facts) -> Any:
    made = figure(
        380,
        showlegend=True,
        boxmode="group",
        legend=LEGEND,
        margin={"l": 64, "r": 16, "t": 40, "b": 40},
        xaxis={"type": "category", "automargin": True},
        yaxis={"title": {"text": "words"}, "type": "log", "automargin": True, "tickvals": [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]},
    )
    for text, colour in zip(TEXTS, (COLOURS[0], COLOURS[2], COLOURS[3]), strict=True):
        of_text = [one for one in facts.lengths if one.text == text]
        if of_text:
            made.add_box(
                x=[plain(one.family) for one in of_text],
                name=text,
                line={"color": colour, "width": 1.5},
                **{
                    place: [max(0.5, getattr(one, name)) for one in of_text]
                    for place, name in (("lowerfence", "low"), ("q1", "q1"), ("median", "median"), ("q3", "q3"), ("upperfence", "high"))
                },
            )
    return made
