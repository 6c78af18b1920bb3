"""SIGTERM to a synthesis: what was asked is answered and committed, and the same command asks only for the rest."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from llmemb_ray.errors import RunStopped
from tests.pipeline.test_notice import signals_when
from tests.synthesis.test_job import Server, Settings, answered, prompts, require_whole, run, settings

__all__ = ["prompts", "settings"]  # Fixtures.


def test_a_synthesis_finishes_the_units_it_has_begun(settings: Settings, tmp_path: Path) -> None:
    commits = tmp_path / "out" / "_llmemb" / "commits"
    with Server(seconds=0.02) as server:
        asked = settings(server, count=400, concurrency=4)
        with signals_when(lambda: commits.is_dir() and len(list(commits.glob("*.json"))) >= 2, signal.SIGTERM), pytest.raises(RunStopped) as caught:
            run(asked)
        words = str(caught.value)
        assert words.startswith("stopped because SIGTERM came: of 40 units ")
        assert "  llmemb synthesize " in words
        committed = len(list(commits.glob("*.json"))) * 10
        assert 20 <= committed < 400
        assert len(answered(tmp_path / "out")) == committed == server.examples.total(), "an answer that was paid for is not in a unit"
        require_whole(tmp_path / "out", run(asked), 400)
        assert set(server.examples.values()) == {1}, "a request was asked twice"
