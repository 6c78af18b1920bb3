"""What all charts have in common: a bare plotly figure, its colours, texts that plotly shows as they are.

Invariant: colours of paper, text and grid are the page's: it sets them, light or dark.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

COLOURS = ["#3f7fd0", "#e0892b", "#2f9e73", "#c9518c", "#8a66d6", "#c0a020", "#4aa8b8", "#b5654a"]
"""Told apart on white and on near black."""


def figure(height: int, **layout: Any) -> Any:
    """A plotly figure without a template. height: in pixels; layout: in place of what stands here."""
    import plotly.graph_objects as go

    return go.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 64, "r": 16, "t": 16, "b": 48},
            "colorway": COLOURS,
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "showlegend": False,
            "xaxis": {"automargin": True},
            "yaxis": {"automargin": True, "rangemode": "tozero"},
            "hoverlabel": {"align": "left"},
        }
        | layout
    )


def as_json(drawn: Mapping[str, Any]) -> dict[str, str]:
    """plotly's figures in JSON, by the id of the element that they are drawn in."""
    return {name: str(made.to_json(validate=False)) for name, made in drawn.items()}


def embedded(drawn: Mapping[str, str]) -> str:
    """The figures as one JSON object that can stand in a script element: it holds no ``<``."""
    return ("{" + ",".join(f"{json.dumps(name)}:{made}" for name, made in drawn.items()) + "}").replace("<", "\\u003c")


def plain(text: str) -> str:
    """So that plotly shows the text as it is; of its entities it knows those of ``<``, ``>`` and ``&``, not that of a quote."""
    return html.escape(text, quote=False)
