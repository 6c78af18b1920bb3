"""Deadlines and budgets: the job stops in time with all it began committed, and the command it prints finishes it."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from llmemb_ray.config import EmbedSettings, parse_deadline
from llmemb_ray.errors import ConfigError, RunStopped
from llmemb_ray.pipeline.limits import Limits
from llmemb_ray.written import command_line
from tests.small_jobs import embed, opened, problems_of, write


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5h", 5400), ("2d", 172800), ("1h30m", 5400)])
def test_a_deadline_can_be_a_duration(text: str, seconds: float) -> None:
    assert parse_deadline(text, now=1000.0) == 1000.0 + seconds


def test_a_deadline_can_be_a_time() -> None:
    assert parse_deadline("2026-12-31T06:00:00+00:00", now=0) == 1798696800
    assert parse_deadline("2026-12-31 06:00", now=0) == datetime(2026, 12, 31, 6).timestamp()


@pytest.mark.parametrize("text", ["soon", "6", "6 hours", "", "2026-13-01"])
def test_what_is_neither_is_refused(text: str, tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match="neither a duration such as 90m"):
        embed(tmp_path, tmp_path / "out", model, deadline=text)


def test_a_budget_needs_a_price(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match="max_cost: needs the price of a GPU hour; give price"):
        embed(tmp_path, tmp_path / "out", model, max_cost=3.0)


def test_units_begun_are_still_counted_before_the_deadline() -> None:
    limits = Limits(deadline=time.time() + 30, max_cost=None, price=0)
    assert limits.tick(2) is None
    limits.took(40.0)
    assert "deadline" in str(limits.tick(2))


def test_a_budget_counts_the_actors_that_are_alive_and_what_they_are_at() -> None:
    limits = Limits(deadline=None, max_cost=1.0, price=3600.0)
    assert limits.tick(1) is None
    time.sleep(0.3)
    assert limits.tick(1) is None
    assert 0.25 < limits.cost < 0.6, "3600 an hour is 1 a second"
    limits.took(0.5)
    assert "budget, 1," in str(limits.tick(2)), "two actors will still need half a second each"


@pytest.fixture
def long_corpus(tmp_path: Path) -> Path:
    """More than this model does in a few seconds."""
    return write(tmp_path / "in" / "a.parquet", [f"text number {row} " * 8 for row in range(30_000)], id=list(range(30_000)), row_group_size=2000)


def test_a_job_stops_at_its_deadline_with_whole_units_and_the_printed_command_finishes_it(long_corpus: Path, tmp_path: Path, model: Path) -> None:
    started = time.time()
    with pytest.raises(RunStopped) as caught:
        embed(long_corpus, tmp_path / "out", model, rows_per_unit=500, deadline="3s", dedup="none")
    assert time.time() - started < 15
    lines = str(caught.value).splitlines()
    done = len(opened(tmp_path / "out").commits)
    assert 0 < done < 60
    assert lines[0].startswith("stopped because the deadline, ")
    assert f" is near: {done} of 60 units are committed, nothing is lost. To continue:" in lines[0]
    command = shlex.split(lines[1])
    assert command[:4] == ["llmemb", "embed", str(long_corpus), str(tmp_path / "out")]
    command[command.index("--deadline") + 1] = "10m"
    finished = subprocess.run([sys.executable, "-m", "llmemb_ray.cli", *command[1:]], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert problems_of(tmp_path / "out", long_corpus) == []


def test_on_ray_begun_units_are_finished_and_no_more_are_begun(long_corpus: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget is spent as soon as the first unit is committed, when others are being worked on or wait."""

    def spent_with_the_first_unit(limits: Limits, _: int) -> str | None:
        limits.reason = "the first unit is committed" if limits.unit_seconds else None
        return limits.reason

    monkeypatch.setattr(Limits, "tick", spent_with_the_first_unit)
    with pytest.raises(RunStopped, match=r"of 60 units are committed, nothing is lost"):
        embed(long_corpus, tmp_path / "out", model, rows_per_unit=500, actors="1", cpus_per_actor=1, max_cost=1.0, price=1.0)
    monkeypatch.undo()
    commits = opened(tmp_path / "out").commits
    assert 0 < len(commits) < 60
    data = {path.name for path in (tmp_path / "out" / "data").iterdir()}
    assert data == {Path(str(commit.shard)).name for commit in commits}, "no attempt was cut off"
    receipt = embed(long_corpus, tmp_path / "out", model, rows_per_unit=500)
    assert receipt.rows_embedded == 30_000


def test_the_command_that_continues_leaves_out_what_must_not_be_repeated() -> None:
    settings = EmbedSettings.make(
        {
            "input": ["s3://user:secret@bucket/a b/"],
            "output": "out",
            "model": "m",
            "prompt": "prompteol-icl",
            "demo": ["A 'quoted' sentence.=>Word"],
            "keep_columns": ["a", "b"],
            "overwrite": True,
            "normalize": False,
            "deadline": "2020-01-01T00:00",
            "storage_options": {"key": "hidden"},
            "actors": "1:8",
            "dtype": "float32",
        }
    )
    words = shlex.split(command_line(settings))
    assert words[:2] == ["llmemb", "embed"]
    assert "secret" not in command_line(settings)
    assert "hidden" not in command_line(settings)
    rest = words[4:]
    assert rest == [
        "--model", "m", "--prompt", "prompteol-icl", "--demo", "A 'quoted' sentence.=>Word", "--no-normalize", "--actors", "1:8", "--keep-columns", "a,b",
    ]  # fmt: skip
