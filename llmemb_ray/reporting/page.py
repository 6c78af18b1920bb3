"""The report of a run as a page: its figures, charts and what a reader must know before them."""

from __future__ import annotations

from llmemb_ray.reporting import document
from llmemb_ray.reporting.charts import charts
from llmemb_ray.reporting.facts import Facts


def render(facts: Facts) -> str:
    """The page."""
    return document.render("page.html", charts(facts), facts=facts, accounts=facts.accounts, health=facts.health, banners=_banners(facts))


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
