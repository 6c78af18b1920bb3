"""The page as a browser sees it: drawn, without a request, and with nothing of the corpus run as code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmemb_ray
from llmemb_ray import cli
from llmemb_ray.reporting.texts import excerpt
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Storage
from tests.reporting.browser import CHROMIUM, Browser, chromium
from tests.reporting.conftest import HOSTILE, facts_of, made_run
from tests.s3_server import S3Server
from tests.small_jobs import embed, write

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium; apt-get install chromium")


def report(run: Path, page: Path, *options: str) -> str:
    assert cli.main(["report", str(run), "--out", str(page), *options]) == 0
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile_page(hostile_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("page") / "hostile.html"
    report(hostile_once / "out", page)
    return page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium") / "profile") as opened:
        yield opened


class Elements(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


# -- the file ----------------------------------------------------------------------------------------


def test_the_page_names_nothing_outside_itself_and_holds_no_element_of_the_corpus(hostile_page: Path) -> None:
    tags = Elements(hostile_page.read_text(encoding="utf-8")).tags
    assert [attributes.get("type") for tag, attributes in tags if tag == "script"] == [None, "application/json", None]
    assert not {"img", "link", "iframe", "object", "i", "b", "base"} & {tag for tag, _ in tags}
    links = [attributes[name] for _, attributes in tags for name in ("href", "src", "action") if name in attributes]
    assert links
    assert all(str(link).startswith("#") for link in links)
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]


def test_figures_hold_no_end_of_their_element(hostile_page: Path) -> None:
    html = hostile_page.read_text(encoding="utf-8")
    (figures,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', html, re.DOTALL)
    assert "<" not in figures
    assert "taken" in json.dumps(json.loads(figures)), "the hostile texts are there, as data"


def test_a_page_without_text_has_none(hostile_once: Path, tmp_path: Path) -> None:
    with_text, without = report(hostile_once / "out", tmp_path / "a.html"), report(hostile_once / "out", tmp_path / "b.html", "--no-text")
    for words in ("quick brown fox", "very long very long", "from right to left"):
        assert words in with_text
        assert words not in without


def test_the_template_is_shown_exactly(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "a.parquet", ["text"])
    embed(tmp_path / "in", tmp_path / "out", model, prompt='<b>"{text}" & {{so}}\n  on</b>')
    html = report(tmp_path / "out", tmp_path / "page.html")
    assert "<pre>&lt;b&gt;&#34;{text}&#34; &amp; {{so}}\n  on&lt;/b&gt;</pre>" in html


def test_secrets_do_not_reach_the_page(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "a.parquet", ["text"])
    embed(tmp_path / "in", tmp_path / "out", model, storage_options={"file": {"token": "hunter2-secret"}})
    assert "hunter2" not in report(tmp_path / "out", tmp_path / "page.html", "--set", "storage_options.file.token=hunter2-secret")


# -- in Chromium -------------------------------------------------------------------------------------


@in_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_charts_are_drawn_without_a_request_or_an_error(browser: Browser, hostile_page: Path, dark: bool) -> None:
    browser.open(hostile_page, dark=dark)
    charts = ["throughput", "tokens", "lengths", "norms", "cosines", "dimensions", "map"]
    drawn = "[...document.querySelectorAll('.chart')].filter((chart) => chart.querySelector('svg .trace')).map((chart) => chart.id)"
    assert sorted(browser.evaluate(drawn)) == sorted(f"chart-{name}" for name in charts)
    assert browser.evaluate("document.querySelectorAll('#chart-map .point').length") == 76
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in re.findall(r"\d+", background)[:3]) < 200) == dark
    assert browser.requests == [hostile_page.as_uri()]
    assert browser.console == browser.dialogs == []


@in_browser
def test_nothing_of_the_corpus_runs_and_each_text_is_shown_as_it_is(browser: Browser, hostile_page: Path) -> None:
    browser.open(hostile_page)
    title = browser.evaluate("document.title")
    for point, text in enumerate(HOSTILE):
        browser.evaluate(f"Plotly.Fx.hover('chart-map', [{{curveNumber: 0, pointNumber: {point}}}])")
        browser.evaluate("new Promise((done) => setTimeout(done, 150))")  # Hovering is throttled.
        lines = browser.evaluate("[...document.querySelectorAll('#chart-map .hoverlayer .hovertext tspan.line')].map((line) => line.textContent)")
        assert lines[0] == f"<i>{point}</i>"
        assert " ".join(lines[3:]).replace("\u00a0", " ") == excerpt(text)
        assert browser.evaluate("document.querySelectorAll('.hoverlayer a, .hoverlayer img, .hoverlayer script').length") == 0
    assert browser.evaluate("document.title") == title
    assert browser.dialogs == browser.console == []
    assert browser.requests == [hostile_page.as_uri()]


@in_browser
def test_a_script_that_is_not_the_page_s_own_is_refused(browser: Browser, hostile_page: Path, tmp_path: Path) -> None:
    """Should an element of a corpus ever slip through: the page's own rule stops it."""
    html = hostile_page.read_text(encoding="utf-8")
    slipped = "<script>document.title = 'taken'</script><img src='http://127.0.0.1:9/x' onerror=\"document.title = 'taken'\">"
    (tmp_path / "page.html").write_text(html.replace("<h1>", f"{slipped}<h1>", 1), encoding="utf-8")
    browser.open(tmp_path / "page.html")
    assert browser.evaluate("document.title").startswith("Report of")
    assert len([text for text in browser.console if "Content Security Policy" in text]) >= 2
    browser.console.clear()


@in_browser
def test_no_button_sends_the_chart_anywhere(browser: Browser, hostile_page: Path) -> None:
    browser.open(hostile_page)
    titles = browser.evaluate("[...document.querySelectorAll('.modebar-btn')].map((button) => button.dataset.title)")
    assert titles == ["Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"]
    assert browser.evaluate("document.querySelectorAll('a[href^=http]').length") == 0


@in_browser
@pytest.mark.parametrize("width", [1280, 800, 420])
def test_no_width_scrolls_sideways(browser: Browser, hostile_page: Path, width: int) -> None:
    browser.open(hostile_page, width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("Math.max(...[...document.querySelectorAll('.chart svg')].map((chart) => chart.getBoundingClientRect().right))") <= width


@in_browser
def test_pages_of_runs_without_vectors_or_units_are_whole(browser: Browser, tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [None, " "])
    embed(tmp_path / "in", tmp_path / "rejects", model, max_reject_rate=1)
    run = made_run(tmp_path / "begun", np.ones((55, 8), np.float32))
    for commit in run.commits:
        (tmp_path / "begun" / "_llmemb" / "commits" / f"{commit.unit}.json").unlink()
    for name, said in (("rejects", "No vectors were written."), ("begun", "0 of 7 units are committed and there is no receipt")):
        report(tmp_path / name, tmp_path / f"{name}.html")
        browser.open(tmp_path / f"{name}.html")
        assert said in browser.evaluate("document.body.innerText")
        assert browser.console == []


# -- the command -------------------------------------------------------------------------------------


def test_the_command_says_where_the_page_is_and_how_the_vectors_are(hostile_once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(hostile_once / "out", tmp_path / "page.html", "--sample", "10")
    out = capsys.readouterr().out
    assert "80 rows read = 76 embedded + 4 rejected (2 empty, 1 null, 1 undecodable)" in out
    assert "Mean cosine of pairs" in out
    assert f"{tmp_path}/page.html is the page" in out


def test_the_figures_as_json(hostile_once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(hostile_once / "out", tmp_path / "page.html", "--json", "--sample", "10", "--no-text")
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == f"{tmp_path}/page.html"
    assert found["health"]["sampled"] == 10
    assert found["accounts"]["rows_read"] == 80


def test_a_collapsed_run_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tmp_path / "run", np.ones((55, 8), np.float32) + np.random.default_rng(0).standard_normal((55, 8)).astype(np.float32) / 100)
    html = report(tmp_path / "run", tmp_path / "page.html")
    assert "look  Mean cosine of pairs: 0.9" in capsys.readouterr().out
    assert "Health: mean cosine of pairs. Collapsed" in html
    assert facts_of(tmp_path / "run").texts_missing != []
    assert "/in/a.parquet is gone since the run was planned" in html


@pytest.mark.parametrize("case", ["no run", "another version", "a directory", "no such setting"])
def test_what_cannot_be_reported_ends_with_exit_code_2(case: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: list[str] = ["--out", str(tmp_path / "page.html")]
    if case != "no run":
        write(tmp_path / "in" / "a.parquet", ["text"])
        embed(tmp_path / "in", tmp_path / "out", model)
    if case == "another version":
        path = tmp_path / "out" / "_llmemb" / "plan" / "plan.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    options = {"a directory": ["--out", str(tmp_path)], "no such setting": ["--sample", "0"]}.get(case, options)
    assert cli.main(["report", str(tmp_path / "out"), *options]) == 2
    said: dict[str, Any] = {
        "no run": "holds no run",
        "another version": "layout 99",
        "a directory": "is a directory; name a file in it",
        "no such setting": "sample",
    }
    assert said[case] in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_run_in_object_storage_has_its_page_there_with_what_was_copied_and_exported(s3: S3Server, model: Path, tmp_path: Path) -> None:
    access: dict[str, Any] = {"endpoint_url": s3.endpoint_url, "storage_options": s3.storage_options}
    storage = Storage(s3.url(), s3.access())
    for name, rows in (("old", range(20)), ("new", range(5, 25))):
        write(tmp_path / f"{name}.parquet", [f"text number {row}" for row in rows], id=list(rows))
        storage.put(f"{name}.parquet", (tmp_path / f"{name}.parquet").read_bytes())
    llmemb_ray.embed(s3.url("old.parquet"), s3.url("first"), model=str(model), actors="0", quiet=True, **access)
    llmemb_ray.embed(s3.url("new.parquet"), s3.url("second"), model=str(model), actors="0", quiet=True, reuse=s3.url("first"), **access)
    options = ("--endpoint-url", s3.endpoint_url, "--storage-options", json.dumps(s3.storage_options))
    assert cli.main(["report", s3.url("second"), "--out", s3.url("pages/report.html"), *options]) == 0
    page = storage.read("pages/report.html").decode()
    assert re.search(r"Reused.{0,200}?15.{0,200}?prompts of an earlier run", page, re.DOTALL)
    assert "text number 24" in page, "texts are read back from the store"
    assert cli.main(["export", s3.url("second"), str(tmp_path / "export"), "--to", "npy", *options]) == 0
    vectors = np.load(tmp_path / "export" / "vectors.npy")
    expected = np.concatenate([table["embedding"].combine_chunks().flatten().to_numpy() for _, table in Run(storage.child("second")).shards()])
    np.testing.assert_array_equal(vectors.reshape(-1), expected)
