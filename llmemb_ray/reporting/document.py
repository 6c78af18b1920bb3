"""A page of HTML that needs nothing else: what all pages have in common.

Invariant: all values are escaped by the template; the page's own rule (Content-Security-Policy) allows its two
scripts by their digests, and neither another script nor any request. Knows nothing of what a page tells.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from llmemb_ray import __version__
from llmemb_ray.pipeline.progress import duration
from llmemb_ray.reporting.figures import embedded

SCRIPT = """
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const root = document.documentElement;
function coloured(layout) {
  const style = getComputedStyle(root), of = (name) => style.getPropertyValue(name).trim();
  const made = { font: { family: "system-ui, sans-serif", size: 12, color: of("--text") },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: of("--quiet"), activecolor: of("--accent") },
    hoverlabel: { align: "left", bgcolor: of("--raised"), bordercolor: of("--line"),
    font: { family: "system-ui, sans-serif", size: 12, color: of("--text") } } };
  for (const name of Object.keys(layout)) {
    if (/^[xy]axis/.test(name)) made[name] = { ...layout[name], gridcolor: of("--line"), zerolinecolor: of("--line"), linecolor: of("--line") };
  }
  return { ...layout, ...made };
}
function draw() {
  for (const [name, figure] of Object.entries(figures)) {
    const map = name === "chart-map";
    // The buttons are listed one by one: plotly's own set has one that sends the chart, texts and all, to its maker's servers.
    Plotly.react(name, figure.data, coloured(figure.layout), { responsive: true, displaylogo: false, displayModeBar: map, scrollZoom: map,
      showSendToCloud: false, plotlyServerURL: "", modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]] });
  }
}
draw();
for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", draw);
"""


def render(template: str, drawn: Mapping[str, str], **values: Any) -> str:
    """The page of a template of this package. drawn: figures in JSON by the id of their element. About 5 MB, of which plotly's JavaScript is 4.8."""
    import jinja2
    from plotly.offline import get_plotlyjs

    plotly = get_plotlyjs()
    if "</script" in plotly.lower():
        plotly = plotly.replace("</script", "<\\/script")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llmemb_ray", "reporting"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= FILTERS
    return environment.get_template(template).render(
        **values,
        drawn=set(drawn),
        plotly=plotly,
        script=SCRIPT,
        figures=embedded(drawn),
        allowed=" ".join(f"'sha256-{_digest(text)}'" for text in (plotly, SCRIPT)),
        version=__version__,
        now=datetime.now(UTC).timestamp(),
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def _number(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"
    return f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:.3g}s" if value < 60 else duration(value)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _when(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC") if moment else "–"


FILTERS: dict[str, Callable[..., str]] = {"bytes": _bytes, "number": _number, "seconds": _seconds, "share": _share, "when": _when}
