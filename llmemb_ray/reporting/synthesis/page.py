"""One HTML page about a synthesis: what was asked for and what became of it, with a few examples of everything."""

from __future__ import annotations

from llmemb_ray.config import ReportSettings
from llmemb_ray.errors import ConfigError
from llmemb_ray.pipeline.estimates.text import quantity
from llmemb_ray.reporting import document
from llmemb_ray.reporting.report import target
from llmemb_ray.reporting.synthesis.charts import charts
from llmemb_ray.reporting.synthesis.facts import SAMPLES, Facts, collect
from llmemb_ray.synthesis import duplicates
from llmemb_ray.synthesis.record import Synthesis

MOST_SAMPLES = 100
"""Of each family: more make a page that no browser likes."""

CUT = 220
"""Characters of a text that are shown at once."""

FEW = 0.5
"""Share of a family's requests accepted below which a reader is told."""

FEW_REQUESTS = 20
"""Requests of a family from which its share is told."""


def report(settings: ReportSettings, synthesis: Synthesis) -> Facts:
    """Writes the page of a synthesis and returns its figures. ``sample``, where it is given, is of examples of each family.

    Raises OutputError, ConfigError, InputError, StorageError.
    """
    samples = settings.sample if "sample" in settings.model_fields_set else SAMPLES
    if samples > MOST_SAMPLES:
        raise ConfigError(f"sample: of a synthesis it is the number of examples of each family that are shown, {MOST_SAMPLES} at most")
    place, name = target(settings)
    facts = collect(synthesis, samples=samples, with_text=not settings.no_text)
    place.put(name, render(facts).encode())
    return facts


def render(facts: Facts) -> str:
    """The page."""
    return document.render(
        "synthesis/page.html",
        charts(facts),
        facts=facts,
        accounts=facts.accounts,
        rejects=[reason for reason in facts.reasons if reason.reason not in duplicates.REASONS],
        duplicates=[reason for reason in facts.reasons if reason.reason in duplicates.REASONS],
        duplicates_by_family={reason.reason: reason.families for reason in facts.reasons if reason.reason in duplicates.REASONS},
        answer_tokens=quantity(facts.accounts["completion_tokens"]),
        cut=CUT,
        banners=banners(facts),
    )


def banners(facts: Facts) -> list[str]:
    """What a reader must know before the figures."""
    found = []
    if facts.state != "finished":
        going = "is going on" if facts.state == "running" else "was stopped; the same synthesize command continues it"
        found.append(
            f"The run {going}: {facts.units_committed:,} of {facts.units:,} units are committed and there is no receipt. "
            "All figures are of these units; duplicates are looked for when all are done."
        )
    few = [name for name, tally in facts.families.items() if tally.asked >= FEW_REQUESTS and tally.accepted < FEW * tally.asked]
    if few:
        shares = ", ".join(f"{name} {facts.families[name].accepted / facts.families[name].asked:.0%}" for name in few)
        found.append(f"Less than half of the requests became examples in some families ({shares}): the mixture is not the one asked for; see Rejects.")
    return found
