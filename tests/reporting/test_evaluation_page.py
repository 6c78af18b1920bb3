"""The page about evaluations, as a browser sees it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmemb_ray.evaluation.compare import compare
from llmemb_ray.reporting.evaluation import page
from llmemb_ray.storage import Storage
from tests.evaluation.records import STS, made
from tests.reporting.browser import CHROMIUM, Browser, chromium

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium; apt-get install chromium")

HOSTILE = "<b>m</b></script><script>document.title='taken'</script>"

TRANSFER = ("MR", "CR", "SUBJ", "MPQA", "SST2", "TREC", "MRPC")

LANGUAGES = [f"l{number:02}" for number in range(40)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two evaluations on all kinds of suites."""
    checked = {"tasks": {"STS12": {"texts": 9, "distinct": 8, "found": 2, "examples": [HOSTILE], "share": 0.25}}, "columns": []}
    evaluations = [
        made(
            name,
            parameters=parameters,
            suites={
                "sts": dict.fromkeys(STS, figure),
                "transfer": dict.fromkeys(TRANSFER, 90 - figure),
                "bitext": dict.fromkeys(LANGUAGES, figure),
                "passkey": {"256": 100, "512": figure},
            },
            details={"sts": {"STS12": {"text": "tokenized"}}},
            contamination=contamination,
            command="llmemb evaluate --model x",
        )
        for name, parameters, figure, contamination in ((HOSTILE, 125_000_000, 61, {}), ("facebook/opt-1.3b", 1_300_000_000, 72, checked))
    ]
    directory = tmp_path_factory.mktemp("page")
    page.write(compare(evaluations), Storage(str(directory)))
    page.write(compare([made("facebook/opt-125m", suites={"sts": {"STS12": 40}})]), Storage(str(directory)), "one.html")
    return directory / page.NAME


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium") / "profile") as opened:
        yield opened


def rows(browser: Browser, suite: int) -> list[list[str]]:
    """Cells of the first table of a suite, that were seen."""
    select = f"[...document.querySelector('#suite-{suite} table').rows].map((row) => [...row.cells].map((cell) => cell.innerText))"
    return browser.evaluate(select)  # type: ignore[no-any-return]


@pytest.mark.parametrize("order", [1, -1])
def test_a_published_average_shows_whatever_the_order_of_the_evaluations(order: int) -> None:
    evaluations = [made(name, suites={"sts": dict.fromkeys(tasks, 50)}) for name, tasks in (("a/opt-125m", STS), ("b/opt-125m", STS[:2]))]
    (table,) = page.tables(compare(evaluations[::order]))
    (theirs,) = [line for line in table.lines if not line.ours]
    assert theirs.cells[-1] == "67.00"


def test_what_is_not_comparable_is_told_and_has_no_figure() -> None:
    details = {"retrieval": {"scifact": {"split": "test"}, "nfcorpus": {"split": "test", "note": "without <stop> words"}}}
    comparison = compare([made("x/e5", method="e5", suites={"retrieval": {"scifact": 70, "nfcorpus": 30}}, details=details)])
    (table,) = page.tables(comparison)
    assert table.lines[1].cells == ["76.40", "–", "–"]
    assert "nfcorpus: without &lt;stop&gt; words; no published figure is comparable." in page.render(comparison)


def test_what_a_study_found_of_contamination_has_no_row_to_be_named_by() -> None:
    checked = {"tasks": {"sts STS12": {"texts": 9, "distinct": 8, "found": 2, "examples": ["A cat."], "share": 0.25}}, "columns": []}
    shown = page.render(replace(compare([made()]), contamination=checked))
    assert shown.count("sts STS12") == 1
    assert "<h3></h3>" not in shown


@in_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_charts_are_drawn_without_a_request_or_an_error(browser: Browser, whole: Path, dark: bool) -> None:
    browser.open(whole, dark=dark)
    drawn = "[...document.querySelectorAll('.chart')].filter((chart) => chart.querySelector('svg .trace, svg .hm')).map((chart) => chart.id)"
    assert sorted(browser.evaluate(drawn)) == ["chart-languages", "chart-passkey", "chart-size-sts", "chart-size-transfer"]
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in re.findall(r"\d+", background)[:3]) < 200) == dark
    assert [url for url in browser.requests if not url.startswith("data:")] == [whole.as_uri()]
    assert browser.console == browser.dialogs == []
    assert browser.evaluate("document.title") == "Evaluation: 2 evaluations"


@in_browser
def test_what_it_shows(browser: Browser, whole: Path) -> None:
    browser.open(whole)
    sts = rows(browser, 1)
    assert sts[0] == ["", *STS, "avg"]
    assert sts[1] == [HOSTILE, *["61.00"] * 8]
    assert sts[2] == ["facebook/opt-1.3b", *["72.00"] * 8]
    assert sts[3][0] == "published: OPT 125M, PromptEOL, zero-shot"
    assert sts[3][-2:] == ["≈65.14", "67.00"]
    assert sts[4] == ["published: OPT 1.3B, PromptEOL, zero-shot", *["–"] * 7, "73.18"]
    best = browser.evaluate("[...document.querySelectorAll('#suite-1 strong')].map((cell) => cell.innerText)")
    assert best == ["72.00"] * 8
    text = browser.evaluate("document.body.innerText")
    for words in ("On lower-cased, tokenised text", "≈ is recalled, or read off a figure.", "25.0%", "All 41 columns"):
        assert words in text
    assert rows(browser, 3)[1] == [HOSTILE, "40", "61.00", "61.00", "61.00", "61.00"]
    ours = browser.evaluate(
        "document.getElementById('chart-size-sts').data.filter((trace) => trace.name.startsWith('ours')).map((trace) => [trace.x, trace.y])"
    )
    assert ours == [[[125_000_000, 1_300_000_000], [61, 72]]]
    heat = browser.evaluate("(({ x, text }) => [x, text[0], text[2]])(document.getElementById('chart-passkey').data[0])")
    assert heat == [
        ["256", "512", "1k", "2k", "4k", "8k", "16k", "32k"],
        ["100", "61", *[""] * 6],
        ["≈100", "≈100", "≈100", "≈100", "≈100", "≈70", "≈30", "≈26"],
    ]


@in_browser
def test_no_width_scrolls_sideways_and_names_stay_readable(browser: Browser, whole: Path) -> None:
    browser.open(whole, width=420)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 420
    assert browser.evaluate("Math.max(...[...document.querySelectorAll('.wide tr')].map((row) => row.offsetHeight))") < 150


@in_browser
def test_one_evaluation_of_a_part_of_a_suite(browser: Browser, whole: Path) -> None:
    browser.open(whole.parent / "one.html")
    assert browser.evaluate("document.querySelectorAll('.chart').length") == 0, "an average of one task is drawn against none of seven"
    assert rows(browser, 1)[1:] == [["facebook/opt-125m", "40.00", "40.00"], ["published: OPT 125M, PromptEOL, zero-shot", "≈59.90", "–"]]
    assert browser.evaluate("document.querySelector('details').open")
    assert browser.console == []
