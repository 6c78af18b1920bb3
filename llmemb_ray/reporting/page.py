"""The report as one HTML page that needs nothing else.

Invariant: all values are escaped by the template; the page's own rule (Content-Security-Policy) allows its two
scripts by their digests, and neither another script nor any request.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from llmemb_ray import __version__
from llmemb_ray.pipeline.progress import duration
from llmemb_ray.reporting.charts import charts, embedded
from llmemb_ray.reporting.facts import Facts

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


def render(facts: Facts) -> str:
    """The page. About 5 MB, of which plotly's JavaScript is 4.8."""
    import jinja2
    from plotly.offline import get_plotlyjs

    plotly = get_plotlyjs()
    if "</script" in plotly.lower():
        plotly = plotly.replace("</script", "<\\/script")
    drawn = charts(facts)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llmemb_ray", "reporting"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= FILTERS
    return environment.get_template("page.html").render(
        facts=facts,
        accounts=facts.accounts,
        health=facts.health,
        drawn=set(drawn),
        plotly=plotly,
        script=SCRIPT,
        figures=embedded(drawn),
        allowed=" ".join(f"'sha256-{_digest(text)}'" for text in (plotly, SCRIPT)),
        banners=_banners(facts),
        version=__version__,
        now=datetime.now(UTC).timestamp(),
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _banners(facts: Facts) -> list[str]:
    """What a reader must know before the figures."""
    found = []
    if facts.state != "finished":
        going = "is going on" if facts.state == "running" else "was stopped; the same embed command continues it"
        appended = f" Files were added to it, or its backend was changed, {facts.generation} times; the latest are not done." if facts.generation else ""
        found.append(
            f"The run {going}: {facts.units_committed:,} of {facts.units:,} units are committed and there is no receipt. "
            f"All figures are of these units.{appended}"
        )
    found += [f"{len(facts.health.warnings)} findings about the vectors call for a look: see Health."] if len(facts.health.warnings) > 1 else []
    found += [f"Health: {facts.health.warnings[0].name.lower()}. {facts.health.warnings[0].says}"] if len(facts.health.warnings) == 1 else []
    if facts.texts_missing:
        found.append("Some source texts could not be read back, and their points on the map have none: " + "; ".join(facts.texts_missing))
    if facts.accounts["bad_files"]:
        found.append(f"Input files left out: {len(facts.accounts['bad_files']):,}. Their rows are unknown; see Accounts.")
    return found


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
