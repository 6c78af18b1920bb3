"""``llmemb report``: figures collected, page rendered and put where it was asked for."""

from __future__ import annotations

import posixpath

from llmemb_ray.config import ReportSettings
from llmemb_ray.errors import ConfigError
from llmemb_ray.reporting.facts import Facts, collect
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Storage, absolute


def report(settings: ReportSettings) -> Facts:
    """Writes the page of a run and returns its figures. Raises OutputError, ConfigError, StorageError."""
    from llmemb_ray.reporting.page import render

    run = Run(Storage(absolute(settings.run), settings.access))
    place, name = target(settings)
    facts = collect(run, sample_size=settings.sample, with_text=not settings.no_text)
    place.put(name, render(facts).encode())
    return facts


def target(settings: ReportSettings) -> tuple[Storage, str]:
    """Where the page goes: (directory, name). Raises ConfigError where that is a directory."""
    parent, name = posixpath.split(absolute(settings.out))
    place = Storage(parent or "/", settings.access)
    if not name or settings.out.endswith("/") or place.is_directory(name):
        raise ConfigError(f"out: {settings.out} is a directory; name a file in it, such as {posixpath.join(settings.out, 'report.html')}")
    return place, name
