"""SIGTERM and Ctrl-C: what is begun is committed, no more is begun, and the printed command finishes the run; a second signal ends at once."""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmemb_ray.cli import main
from llmemb_ray.errors import RunStopped
from llmemb_ray.pipeline import notice
from llmemb_ray.pipeline.notice import Ended, Notice
from tests.small_jobs import embed, opened, problems_of, write


@contextmanager
def signals_when(ready: Callable[[], bool], *numbers: signal.Signals) -> Iterator[None]:
    """Sends this process these signals, a moment apart, once something holds."""
    over = threading.Event()

    def send() -> None:
        while not ready():
            if over.wait(0.02):
                return
        for number in numbers:
            os.kill(os.getpid(), number)
            if over.wait(0.2):
                return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_job_commits_what_it_has_begun_and_the_printed_command_finishes_it(tmp_path: Path, model: Path) -> None:
    source = write(tmp_path / "in" / "a.parquet", [f"text number {row}" for row in range(3_000)], id=list(range(3_000)), row_group_size=1000)
    commits, before = tmp_path / "out" / "_llmemb" / "commits", signal.getsignal(signal.SIGTERM)
    with signals_when(lambda: commits.is_dir() and len(list(commits.glob("*.json"))) >= 2, signal.SIGTERM), pytest.raises(RunStopped) as caught:
        embed(source, tmp_path / "out", model, rows_per_unit=250)
    assert signal.getsignal(signal.SIGTERM) is before
    done = opened(tmp_path / "out").commits
    assert 2 <= len(done) < 12
    words = str(caught.value)
    assert words.startswith(f"stopped because SIGTERM came: {len(done)} of 12 units are")
    data = {path.name for path in (tmp_path / "out" / "data").iterdir()}
    assert data == {Path(str(commit.shard)).name for commit in done}, "no attempt was cut off"
    assert not (tmp_path / "out" / "_llmemb" / "lease.json").exists()
    command = shlex.split(words.splitlines()[1])
    assert command[command.index("--actors") + 1] == "0"
    assert main(command[1:]) == 0
    assert problems_of(tmp_path / "out", source) == []


class Waiting:
    """What a job does: it waits, and can be seen to."""

    begun = False

    def __call__(self, seconds: float = 10.0) -> None:
        self.begun = True
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)
        raise AssertionError("nothing came")


@pytest.fixture
def wait() -> Waiting:
    return Waiting()


def test_after_the_grace_period_the_job_ends_without_what_it_is_at(wait: Waiting) -> None:
    told: list[float] = []
    with Notice().listening() as heard:
        started = time.monotonic()
        with signals_when(lambda: wait.begun, signal.SIGTERM), pytest.raises(Ended), heard.finishing(lambda: told.append(0), lambda: True, grace=1.0):
            wait()
    assert 1.0 <= time.monotonic() - started < 5
    assert len(told) >= 2, "who may have been started anew is told again"
    assert heard.reason == "SIGTERM came"


def test_where_nothing_is_at_work_the_job_does_not_wait_for_a_model_that_loads(wait: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notice, "IDLE_SECONDS", 0.6)
    once = signals_when(lambda: wait.begun, signal.SIGTERM)
    with Notice().listening() as heard, once, pytest.raises(Ended), heard.finishing(lambda: None, lambda: False, grace=100):
        wait()


def test_a_second_signal_ends_at_once_and_so_does_any_where_nothing_is_begun(wait: Waiting) -> None:
    twice = signals_when(lambda: wait.begun, signal.SIGINT, signal.SIGINT)
    with Notice().listening() as heard, twice, pytest.raises(KeyboardInterrupt) as caught, heard.finishing(lambda: None, lambda: True, grace=100):
        wait()
    assert not isinstance(caught.value, Ended)
    again = Waiting()
    with Notice().listening(), signals_when(lambda: again.begun, signal.SIGTERM), pytest.raises(KeyboardInterrupt):
        again()


def test_in_another_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def listen() -> None:
        with Notice().listening():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [before]
