"""An evaluation in the terminal."""

from __future__ import annotations

from llmemb_ray.evaluation.tables import WIDTH, table
from llmemb_ray.evaluation.text import lines
from tests.evaluation.records import STS, made


def test_the_published_row_stands_beneath_ours() -> None:
    suites = {"sts": dict(zip(STS, (10, 20, 30, 40, 50, 60, 70), strict=True))}
    details = {"sts": {task: {"text": "tokenized"} for task in STS}}
    counts = {"texts": 29000, "texts_embedded": 20500, "tokens": 410000}
    shown = lines(made(suites=suites, details=details, counts=counts, seconds={"embed": 12.34, "sts": 0.5}))
    (start,) = [place for place, line in enumerate(shown) if line.startswith("sts, ")]
    assert "lower-cased, tokenised" in shown[start]
    assert shown[start + 1].split() == [*STS, "avg"]
    assert shown[start + 2].split() == ["ours", "10.00", "20.00", "30.00", "40.00", "50.00", "60.00", "70.00", "40.00"]
    assert shown[start + 3].startswith("published: OPT 125M, PromptEOL, zero-shot  ≈59.90  ≈71.55")
    assert shown[start + 3].endswith("67.00")
    assert shown[start + 4].startswith("source: arXiv 2307.16645")
    assert "29,000 texts wanted, 20,500 embedded (each once), 410,000 tokens" in shown
    assert "seconds: embed 12.3, sts 0.5" in shown


def test_an_average_of_some_tasks_has_none_beneath_it() -> None:
    shown = lines(made(suites={"sts": {"STS-B": 60, "SICK-R": 40}}))
    (ours,) = [line for line in shown if line.startswith("ours")]
    (theirs,) = [line for line in shown if line.startswith("published: ")]
    assert ours.split()[1:] == ["60.00", "40.00", "50.00"]
    assert theirs.split()[-3:] == ["≈67.89", "≈65.14", "–"]


def test_many_languages_are_summed_up() -> None:
    shown = "\n".join(lines(made(suites={"bitext": {f"l{number:03}": number / 2 for number in range(112)}})))
    assert "mean of 112: 27.75, median 27.75" in shown
    assert "lowest:  l000 0.00, l001 0.50, l002 1.00" in shown
    assert "highest: l111 55.50, l110 55.00" in shown
    assert "evaluation.json (suites.bitext)" in shown
    assert "l050" not in shown


def test_further_metrics_of_retrieval_are_shown() -> None:
    details = {"retrieval": {"scifact": {"nDCG@10": 70.5, "MAP": 60.25, "queries": 1300, "note": "words"}}}
    shown = lines(made(suites={"retrieval": {"scifact": 70.5}}, details=details))
    assert [line.split() for line in shown if line.startswith("scifact ")] == [["scifact", "70.50", "60.25", "1,300"]]
    assert "note: scifact: words; no published figure is comparable" in shown
    assert not any(line.startswith("published") for line in shown)


def test_what_was_left_out_is_told_once() -> None:
    details = {"passkey": {length: {"left_out": "8k: longer than max_tokens 4096"} for length in ("256", "512")}}
    shown = lines(made(suites={"passkey": {"256": 100, "512": 90}}, details=details))
    assert shown.count("note: passkey: left out 8k: longer than max_tokens 4096") == 1


def test_a_table_that_is_too_wide_goes_on_below() -> None:
    header, row = ["", *(f"Task{number:03}Classification" for number in range(56))], [str(number) for number in range(56)]
    shown = list(table(header, [["a name " * 30, *row]]))
    assert max(map(len, shown)) <= WIDTH
    assert [cell for line in shown[1::2] for cell in line.split("…")[1].split()] == row
    assert [cell for line in shown[::2] for cell in line.split()] == header[1:]
    assert all(line.startswith("a name a name") for line in shown[1::2])


def test_an_empty_table_is_its_heading() -> None:
    assert list(table(["name", "n"], [])) == ["name  n"]
    assert list(table(["name"], [["a"]])) == ["name", "a"]
