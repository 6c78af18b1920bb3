"""The report of a synthesis: its figures against counts made here from the rows, and the page as a browser sees it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmemb_ray.generation.generator import Answer
from llmemb_ray.reporting.synthesis.facts import Facts, collect
from llmemb_ray.reporting.synthesis.page import banners
from llmemb_ray.reporting.synthesis.reading import quantiles
from llmemb_ray.storage import Storage
from llmemb_ray.synthesis.brainstorming import ACCOUNTS
from llmemb_ray.synthesis.drawing import Request
from llmemb_ray.synthesis.families import FAMILIES
from tests.reporting.browser import CHROMIUM, chromium
from tests.synthesis import made_run
from tests.synthesis.made_run import COMPLETION_TOKENS, COUNT, PROMPT_TOKENS, TASK_TOKENS

NAMES = {"en": "English", "de": "German"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthesis") / "out"
    made_run.make(out)
    return out


@pytest.fixture(scope="module")
def facts(out: Path) -> Facts:
    return collected(out)


def collected(out: Path, **options: Any) -> Facts:
    return collect(made_run.opened(out), **options)


def fates() -> dict[int, str]:
    """What becomes of each row, by the rules of ``made_run``."""
    seen: set[bool] = set()
    found = {}
    for row in range(COUNT):
        fate = {3: "not_json", 5: "refused"}.get(row % 10, "accepted")
        if row % 20 == 7:
            fate = "duplicate" if made_run.has_negative(row) in seen else fate
            seen.add(made_run.has_negative(row))
        found[row] = fate
    return found


def test_families_languages_and_tasks_are_counted_of_all_requests(facts: Facts) -> None:
    requests = [made_run.request(row) for row in range(COUNT)]
    for of_facts, of_request in ((facts.families, lambda one: one.family), (facts.languages, lambda one: NAMES[one.language])):
        wanted: dict[str, Counter[str]] = {}
        for request in requests:
            wanted.setdefault(of_request(request), Counter())[fates()[request.row]] += 1
        assert {name: (tally.asked, tally.accepted, tally.rejected, tally.duplicates) for name, tally in of_facts.items()} == {
            name: (counts.total(), counts["accepted"], counts["not_json"] + counts["refused"], counts["duplicate"]) for name, counts in wanted.items()
        }
    assert list(facts.families) == [name for name in FAMILIES if name in facts.families], "in the order of the paper"
    assert list(facts.languages) == ["English", "German"]
    assert sum(facts.weights.values()) == pytest.approx(1)
    assert facts.weights["short-long"] == pytest.approx(167 / 507)
    by_task = Counter((request.family, request.task) for request in requests)
    for use in facts.tasks:
        assert (use.pool, use.own) == ((4, 1) if use.family == "short-long" else (3, 0))
        assert use.requests == facts.families[use.family].asked
        assert use.used == len(use.most) == sum(family == use.family for family, _ in by_task)
        assert [(task, asked) for task, asked, _ in use.most] == sorted(
            ((task, count) for (family, task), count in by_task.items() if family == use.family), key=lambda item: (-item[1], item[0])
        )


def test_reasons_have_examples_of_their_families(facts: Facts) -> None:
    expected = Counter(fates().values())
    assert {reason.reason: reason.count for reason in facts.reasons} == {name: expected[name] for name in ("not_json", "refused", "duplicate")}
    assert facts.accounts["reasons"] == {reason.reason: reason.count for reason in facts.reasons}
    for reason in facts.reasons:
        assert sum(reason.families.values()) == reason.count
        assert len(reason.examples) == min(6, reason.count)
        assert {one.family for one in reason.examples} == set(reason.families) or len(reason.families) > 6
        assert all(fates()[one.row] == reason.reason for one in reason.examples)
    raw = {reason.reason: reason.examples[0] for reason in facts.reasons}
    assert raw["refused"].raw is None
    assert "the content filter" in raw["refused"].detail
    assert json.loads(str(raw["duplicate"].raw))["query"] == "same query"
    assert str(raw["not_json"].raw).startswith("<b>no JSON</b>")


def test_samples_are_the_same_each_time_and_as_many_as_asked_for(out: Path, facts: Facts) -> None:
    assert facts.samples == collected(out).samples
    many = collected(out, samples=10_000).samples
    for family, tally in facts.families.items():
        assert len(facts.samples[family]) == min(3, tally.accepted)
        assert facts.samples[family] == many[family][:3], "the first of all"
        accepted = {row for row, fate in fates().items() if fate == "accepted"}
        assert {sample.row for sample in many[family]} == {row for row in accepted if made_run.request(row).family == family}
    assert all({sample.language, sample.target} == {"English", "German"} for sample in many["bitext"])


def test_lengths_are_words_of_each_text_s_own_language(tmp_path: Path) -> None:
    """A word of Chinese is 1.6 characters: 16 of them are ten words, in German they would be one."""

    def answer(request: Request) -> Answer:
        return Answer(text=json.dumps({key: f"{sign * 13}{request.row:03d}" for key, sign in zip(("S1", "S2", "S3"), "天地人", strict=True)}))

    languages = {"de": 1.0, "zh": 1.0}
    made = made_run.make(tmp_path / "out", segments=[40], weights={"bitext": 1.0}, languages=languages, answer=answer)
    from_chinese = sum(made_run.drawn({"bitext": 1.0}, languages).request(row).language == "zh" for row in range(40))
    assert 10 < from_chinese < 30
    lengths = {one.text: one for one in collect(made).lengths}
    assert {(one.low, one.high, one.longest) for one in lengths.values()} == {(1.0, 10.0, 10.0)}
    assert lengths["query"].median == (10.0 if from_chinese > 20 else 1.0)
    assert lengths["positive"].median == lengths["negative"].median == (1.0 if from_chinese >= 20 else 10.0)


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_quantiles_are_those_of_the_values_one_by_one(size: int) -> None:
    values = np.random.default_rng(size).integers(0, 30, size).astype(float)
    shares = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    assert quantiles(Counter(values.tolist()), shares) == np.quantile(values, shares, method="inverted_cdf").tolist()


def test_one_that_is_not_finished_is_told_as_far_as_it_is(tmp_path: Path, llmemb: Any) -> None:
    made = made_run.make(tmp_path / "out", finished=False)
    facts = collect(made)
    assert (facts.state, facts.units, facts.units_committed) == ("stopped", 5, 4)
    assert (facts.accounts["asked"], facts.accounts["rejected"], facts.accounts["duplicates"]) == (200, 40, 0)
    tokens = 200 * PROMPT_TOKENS + TASK_TOKENS[0], 200 * COMPLETION_TOKENS + TASK_TOKENS[1]
    assert facts.accounts["cost"] == pytest.approx((tokens[0] * 1 + tokens[1] * 2) / 1e6)
    shown = llmemb("report", tmp_path / "out", "--out", tmp_path / "page.html")
    assert "note: The run was stopped; the same synthesize command continues it: 4 of 5 units are committed" in shown.out
    assert "They are looked for when all units are done." in (tmp_path / "page.html").read_text()
    shown = llmemb("status", tmp_path / "out")
    assert re.search(r"units +4 of 5 committed\nto continue +run the same synthesize command again", shown.out)


def test_families_that_mostly_fail_are_told_before_the_figures(tmp_path: Path) -> None:
    def answer(request: Request) -> Answer:
        return Answer(text="no") if request.family == "sts" and request.row % 3 else made_run.answer(request)

    (told,) = banners(collect(made_run.make(tmp_path / "out", answer=answer)))
    assert re.match(r"Less than half of the requests became examples in some families \(sts \d\d%\)", told)


# -- the page ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llmemb_ray import cli

    page = tmp_path_factory.mktemp("page") / "page.html"
    assert cli.main(["report", str(out), "--out", str(page)]) == 0
    return page


def test_texts_stand_on_the_page_as_they_are_and_long_ones_fold(page: Path, facts: Facts) -> None:
    html = page.read_text(encoding="utf-8")
    raw = next(one for one in facts.reasons if one.reason == "not_json").examples[0]
    assert f"&lt;b&gt;no JSON&lt;/b&gt; {raw.row}" in html
    assert "<b>" not in html.replace("<body>", "")
    assert f"all {raw.raw_characters:,} characters" in html
    for family, samples in facts.samples.items():
        assert f"{family} <span" in html
        assert all(sample.query in html and sample.positive in html for sample in samples)


def test_a_page_without_text_has_none(out: Path, tmp_path: Path, llmemb: Any) -> None:
    assert llmemb("report", out, "--out", tmp_path / "page.html", "--no-text").code == 0
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "not_json" in html
    for words in ("no JSON", "same query", "user_query", "content filter", "short-long task", "A task of one"):
        assert words not in html


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium; apt-get install chromium")
def test_a_browser_draws_it_without_a_request_or_an_error(page: Path, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile") as browser:
        browser.open(page, width=420)
        drawn = browser.evaluate("[...document.querySelectorAll('.chart')].filter((one) => one.querySelector('svg .trace')).map((one) => one.id)")
        assert sorted(drawn) == [f"chart-{name}" for name in ("families", "languages", "lengths", "throughput")]
        assert browser.evaluate("document.documentElement.scrollWidth") <= 420
        assert browser.requests == [page.as_uri()]
        assert browser.console == browser.dialogs == []


# -- the command -------------------------------------------------------------------------------------


def test_the_commands_that_read_a_run_know_a_synthesis(out: Path, tmp_path: Path, facts: Facts, llmemb: Any) -> None:
    accounts = f"230 asked = {facts.accounts['accepted']} accepted + 46 rejected + {facts.accounts['duplicates']} duplicates"
    shown = llmemb("status", out)
    assert re.search(rf"state +finished\nmodel +{made_run.GENERATOR}\n", shown.out)
    assert accounts in shown.out
    assert json.loads(llmemb("status", out, "--json").out)["receipt"]["accepted"] == facts.accounts["accepted"]
    shown = llmemb("report", out, "--out", tmp_path / "page.html", "--sample", "1")
    assert shown.out.startswith(f"{accounts}\n")
    told = json.loads(llmemb("report", out, "--out", tmp_path / "page.html", "--json", "--sample", "1").out)
    assert told["page"] == str(tmp_path / "page.html")
    assert told["families"]["sts"]["asked"] == facts.families["sts"].asked
    assert {len(samples) for samples in told["samples"].values()} == {1}


def test_what_cannot_be_reported_ends_with_exit_code_2(out: Path, tmp_path: Path, llmemb: Any) -> None:
    many = llmemb("report", out, "--out", tmp_path / "page.html", "--sample", "101")
    assert (many.code, "examples of each family that are shown, 100 at most" in many.err) == (2, True)
    Storage(str(tmp_path / "tasks")).put(ACCOUNTS, b"{}")
    for command in ("report", "verify", "status"):
        said = llmemb(command, tmp_path / "tasks")
        assert (said.code, "holds tasks of a synthesis and no example is asked for yet" in said.err) == (2, True)
        said = llmemb(command, tmp_path / "nothing")
        assert (said.code, "holds no run of llmemb_ray" in said.err) == (2, True)
