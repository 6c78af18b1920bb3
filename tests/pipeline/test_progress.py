"""What a person sees while a job runs, in a log and on a terminal, and the numbers that ``status`` shows."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import time
from typing import Any

import pytest

from llmemb_ray.pipeline.progress import Counts, Reporter, duration


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0s"),
        (0.9, "0s"),
        (59.9, "59s"),
        (60, "1m00s"),
        (95, "1m35s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (86399, "23h59m"),
        (86400, "1d00h"),
        (900000, "10d10h"),
    ],
)
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def wait(seconds: float = 2.4) -> None:
    """Long enough for two looks at the numbers, one second apart."""
    time.sleep(seconds)


def test_a_log_gets_plain_lines_with_the_numbers_that_matter() -> None:
    stream = io.StringIO()
    counts = Counts(units=3, units_total=12, rows=3000, rows_total=12000, rejects=7, failed_units=1, storage_retries=4, actors=2)
    done = [3000]

    def live() -> tuple[int, int, int]:
        done[0] += 500
        return done[0], done[0] * 20, 2

    reporter = Reporter(counts, stream=stream)
    with reporter, reporter.watching(live):
        wait()
        counts.units, counts.rows, counts.failed_units = 12, 12000, 0
    first, *_, last = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue(), "control characters in a log"
    assert first.startswith("units 3/12  rows 3,500/12,000")
    for part in ("rejects 7", "FAILED units 1", "storage retries 4", "actors 2"):
        assert part in first
    assert last.startswith("units 12/12  rows 12,000/12,000"), "a log must end with where the job stands"
    assert "FAILED" not in last
    assert "ETA" not in last


def test_rates_and_eta_follow_the_numbers() -> None:
    """1000 rows a second by construction; the clock of the test machine may be off by a third."""
    began = time.monotonic()
    counts = Counts(units_total=10, rows_total=100_000)
    reporter = Reporter(counts, stream=io.StringIO())

    def live() -> tuple[int, int, int]:
        return (int((time.monotonic() - began) * 1000), int((time.monotonic() - began) * 30000), 4)

    with reporter, reporter.watching(live):
        wait(3.4)
        assert "ETA" not in reporter._text(), "a few seconds tell nothing of hours"
        wait(4.0)
        seen = reporter.snapshot()
        text = reporter._text()
    assert seen["rows_per_s"] == pytest.approx(1000, rel=0.3)
    assert seen["tokens_per_s"] == pytest.approx(30000, rel=0.3)
    assert seen["actors"] == 4
    eta = re.search(r"ETA (\d+)m(\d+)s", text)
    assert eta is not None
    assert int(eta[1]) * 60 + int(eta[2]) == pytest.approx(93, rel=0.4)


def test_the_snapshot_never_shows_less_than_what_is_committed_nor_more_than_there_is() -> None:
    counts = Counts(units=1, units_total=2, rows=50, rows_total=100, tokens=900)
    reporter = Reporter(counts, quiet=True)
    assert (reporter.snapshot()["rows"], reporter.snapshot()["tokens"]) == (50, 900), "before the first look"

    def live() -> tuple[int, int, int]:
        return 5000, 100, 1  # attempts that were lost and made again count twice

    with reporter, reporter.watching(live):
        wait(1.4)
        seen = reporter.snapshot()
    assert (seen["rows"], seen["tokens"], seen["units"], seen["units_total"]) == (100, 900, 1, 2)


def test_quiet_shows_nothing_and_a_job_that_never_began_shows_no_numbers() -> None:
    for quiet, counts in ((True, Counts(units=1, units_total=1)), (False, Counts())):
        stream = io.StringIO()
        with Reporter(counts, quiet=quiet, stream=stream):
            wait(1.2)
        assert stream.getvalue() == ""


def test_what_is_said_is_shown_as_it_is() -> None:
    stream = io.StringIO()
    with Reporter(Counts(), stream=stream) as reporter:
        reporter.say("continuing: [bold]3[/bold] of 9 " + "x" * 300)
    assert stream.getvalue() == "continuing: [bold]3[/bold] of 9 " + "x" * 300 + "\n"


def test_an_error_in_the_block_passes_through() -> None:
    def fail() -> None:
        with Reporter(Counts(units_total=3), stream=io.StringIO()):
            raise ValueError("no")

    with pytest.raises(ValueError, match=r"^no$"):
        fail()


SCRIPT = """
import time
from llmemb_ray.pipeline.progress import Counts, Reporter
counts = Counts()
with Reporter(counts) as reporter:
    reporter.say("a line above the bar")
    time.sleep(1.2)
    counts.units_total, counts.rows_total, counts.units, counts.rows = 4, 400, 1, 100
    time.sleep(3.0)
    counts.units, counts.rows = 4, 400
"""


def test_a_terminal_gets_a_bar_and_is_left_in_order() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm", "COLUMNS": "160"})
    os.close(theirs)
    shown = b""
    while True:
        try:
            part: Any = os.read(ours, 65536)
        except OSError:
            break  # How a pseudo-terminal says that its other end is closed.
        if not part:
            break
        shown += part
    os.close(ours)
    text = shown.decode()
    assert process.wait(timeout=20) == 0, text
    assert "a line above the bar" in text
    assert "units 1/4" in text
    assert "rows 400/400" in text
    assert text.rstrip().endswith("\x1b[?25h") or text.count("\x1b[?25h") == text.count("\x1b[?25l"), "the cursor was left hidden"


def test_nothing_is_asked_of_the_workers_once_their_work_is_over() -> None:
    """A question put to Ray after it is shut down would start another Ray."""
    asked: list[float] = []

    def live() -> tuple[int, int, int]:
        asked.append(time.monotonic())
        return 0, 0, 1

    with Reporter(Counts(units_total=1, rows_total=10), quiet=True) as reporter:
        with reporter.watching(live):
            wait(1.3)
        over = time.monotonic()
        wait(2.3)
    assert asked
    assert max(asked) < over
