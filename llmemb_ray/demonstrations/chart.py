"""The leaderboard as a chart: scores best first against the zero-shot line, each with its demonstration on hover."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence

from llmemb_ray.demonstrations.leaderboard import Place

WRAP = 64
"""Characters in a line of a demonstration on hover."""


def page(ranking: Sequence[Place], *, zero_shot: float, title: str, axis: str) -> str:
    """An HTML page of about 5 MB, complete in itself: plotly's JavaScript is in it. What comes from candidates is escaped."""
    import plotly.graph_objects as go

    scored = [place for place in ranking if place.outcome.score is not None]
    hover = [
        "<br>".join(html.escape(line, quote=False) for shown in place.demonstrations for line in textwrap.wrap(f"{shown.sentence} ⇒ {shown.word}", WRAP))
        for place in scored
    ]
    better = ["#2f9e73" if (place.gain or 0.0) > 0 else "#c9518c" for place in scored]
    figure = go.Figure(layout={"template": "plotly_white", "title": {"text": html.escape(title, quote=False)}, "showlegend": False})
    figure.update_xaxes(title_text="rank")
    figure.update_yaxes(title_text=axis)
    figure.add_scatter(
        x=[place.rank for place in scored],
        y=[place.outcome.score for place in scored],
        customdata=[[text, place.gain] for text, place in zip(hover, scored, strict=True)],
        mode="markers",
        marker={"color": better, "size": 7},
        hovertemplate="%{x}: %{y:.2f} (%{customdata[1]:+.2f})<br>%{customdata[0]}<extra></extra>",
    )
    figure.add_hline(y=zero_shot, line={"dash": "dash", "color": "#3f7fd0"}, annotation_text=f"zero-shot {zero_shot:.2f}")
    return str(figure.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False}))
