"""The published figures, and which of them stands beside an evaluation."""

from __future__ import annotations

from typing import Any

import pytest

from llmemb_ray.evaluation import published
from llmemb_ray.evaluation.published import AVERAGED, METHODS, nearest
from llmemb_ray.evaluation.text import counterpart
from tests.evaluation.records import STS, made

GAINS = {"125M": 0.46, "350M": 3.99, "1.3B": 4.34, "2.7B": 8.88, "6.7B": 6.98, "13B": 7.18, "30B": 6.51, "66B": 9.35}
"""Of one demonstration, as section 5.2 of arXiv 2307.16645 prints them."""


def test_an_average_is_the_mean_of_its_tasks() -> None:
    """A digit copied wrong would show; the papers round to two."""
    whole = [row for row in published.rows() if row.avg is not None and row.tasks.keys() == set(AVERAGED.get(row.suite, "?"))]
    assert len(whole) == 8 + 4 + 7 + 1 + 10 + 1
    for row in whole:
        assert row.avg == pytest.approx(sum(row.tasks.values()) / 7, abs=0.011), row.title


def test_a_zero_shot_average_is_the_in_context_one_less_the_gain() -> None:
    averages = {(row.model, row.method): row.avg for row in published.of("sts") if row.family == "opt" and not row.settings}
    for size, gain in GAINS.items():
        difference = (averages[f"OPT {size}", "prompteol-icl"] or 0) - (averages[f"OPT {size}", "prompteol"] or 0)
        assert difference == pytest.approx(gain, abs=0.006), size


def test_each_row_is_whole() -> None:
    for row in published.rows():
        assert row.source, row
        assert row.method in METHODS, row
        assert row.tasks or row.avg is not None, row
        assert all(0 <= figure <= 100 for figure in row.tasks.values()), row
        assert 1e8 <= row.parameters < 1e11, row
    titles = [(row.suite, row.title) for row in published.rows()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize(
    ("evaluation", "suite", "title", "figure"),
    [
        (made(), "sts", "OPT 125M, PromptEOL, zero-shot", 67.00),
        (made("facebook/opt-1.3b", parameters=1_310_000_000), "sts", "OPT 1.3B, PromptEOL, zero-shot", 73.18),
        (made("/models/opt-2.7b", parameters=2_650_000_000, method="prompteol-icl"), "sts", "OPT 2.7B, PromptEOL, in-context", 78.18),
        (made("huggyllama/llama-7b", parameters=6_600_000_000), "sts", "LLaMA 2 7B, PromptEOL, zero-shot", 70.03),
        (made("huggyllama/llama-7b", parameters=6_600_000_000, adapter="a"), "sts", "LLaMA 7B, fine-tuned on NLI", 85.70),
        (made("my-model", parameters=20_000_000_000, adapter="a"), "sts", "OPT 13B, fine-tuned on NLI", 85.97),
        (made("huggyllama/llama-7b", method="none", representation={"pooling": "mean"}), "sts", "LLaMA 2 7B, mean of the states", 47.06),
        (made("opt", template='This sentence : "{text}" means', method="template"), "sts", "BERT base, prompt with a mask", 67.85),
        (made("x/e5-mistral-7b", parameters=7_000_000_000, method="e5"), "sts", "E5-mistral 7B, E5, trained on synthetic and public data", None),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
)
def test_the_nearest_row(evaluation: Any, suite: str, title: str, figure: float | None) -> None:
    row = nearest(evaluation, suite)
    assert row is not None
    assert (row.title, row.avg) == (title, figure)


def test_weights_of_4_bits_are_held_against_such() -> None:
    engine = {"backend": "hf", "compute_dtype": "float32", "quantization": "nf4"}
    row = nearest(made("facebook/opt-6.7b", parameters=6_650_000_000, method="prompteol-icl", engine=engine), "sts")
    assert row is not None
    assert row.avg == 79.38


def test_among_models_of_one_size_the_name_decides() -> None:
    suites = {"transfer": dict.fromkeys(AVERAGED["transfer"], 90)}
    names = {"meta-llama/Llama-2-7b-hf": "LLaMA 2 7B", "huggyllama/llama-7b": "LLaMA 7B"}
    for name, model in names.items():
        row = nearest(made(name, parameters=6_600_000_000, suites=suites), "transfer")
        assert row is not None
        assert row.model == model


@pytest.mark.parametrize(
    ("settings", "at_16k"),
    [({}, 30), ({"sliding_window": 0}, 0), ({"sliding_window": 32768, "rope_theta": 1e5}, 88), ({"sliding_window": 32768, "rope_theta": 1e6}, 36)],
)
def test_the_passkey_row_is_that_of_the_same_context(settings: dict[str, Any], at_16k: float) -> None:
    row = nearest(made("intfloat/e5-mistral-7b-instruct", method="e5", suites={"passkey": {"256": 90, "16k": 10}}, settings=settings), "passkey")
    assert row is not None
    assert row.figure("16k") == at_16k
    assert row.is_approximate("16k")


def test_raw_texts_are_held_against_the_same_figures_and_the_unpublished_against_none() -> None:
    assert nearest(made(suites={"sts-raw": dict.fromkeys(STS, 50)}), "sts-raw") == nearest(made(), "sts")
    assert nearest(made(suites={"retrieval": {"cranfield": 30}}), "retrieval") is None
    assert nearest(made(suites={"sts": {"STS-B-dev": 70}}), "sts") is None


def test_an_average_of_some_tasks_has_no_counterpart() -> None:
    one = made("facebook/opt-1.3b", parameters=1_300_000_000, suites={"sts": {"STS-B": 70}})
    row = nearest(one, "sts")
    assert row is not None
    assert row.tasks, "one that has the task, of another size, before one that has the average alone"
    assert not published.is_whole(one, "sts")
    languages = {f"l{number}": 50 for number in range(112)}
    assert published.is_whole(made(suites={"bitext": languages}), "bitext")
    assert nearest(made(suites={"bitext": {"fra": 50}}), "bitext") is None


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"split": "dev"}, "scored on the split 'dev'"),
        ({"split": "test", "note": "lower-cased"}, "lower-cased"),
        ({"split": "dev", "note": "lower-cased"}, "scored on the split 'dev'; lower-cased"),
    ],
)
def test_another_split_and_other_texts_have_no_counterpart(parts: dict[str, Any], why: str) -> None:
    alone = made("x/e5-mistral-7b", method="e5", suites={"retrieval": {"nfcorpus": 38}}, details={"retrieval": {"nfcorpus": parts}})
    assert nearest(alone, "retrieval") is None
    details = {"retrieval": {"nfcorpus": parts, "scifact": {"split": "test"}}}
    both = made("x/e5-mistral-7b", method="e5", suites={"retrieval": {"nfcorpus": 38, "scifact": 70}}, details=details)
    assert published.incomparable(both, "retrieval") == {"nfcorpus": why}
    row = nearest(both, "retrieval")
    assert row is not None
    assert [counterpart(row, task, published.incomparable(both, "retrieval")) for task in ("scifact", "nfcorpus")] == ["76.40", "–"]


@pytest.mark.parametrize(
    ("representation", "settings", "method"),
    [
        ({"query": {"template": "Instruct: Find it\nQuery: {text}"}}, {}, "e5"),
        ({"document": {"template": "Instruct: Find it\nQuery: {text}"}}, {}, "e5"),
        ({}, {"prompt": "e5"}, "e5"),
        ({}, {"prompt": "none", "append_eos": True}, "last"),
        ({"pooling": "mean"}, {}, "avg"),
        ({"document": {"template": "Read: {text}"}}, {}, "template"),
    ],
)
def test_a_bare_text_with_eos_is_no_e5(representation: dict[str, Any], settings: dict[str, Any], method: str) -> None:
    plain = {"template": "{text}", "clean": "none"}
    found = made(method="e5", representation={"document": plain, "query": plain, "append_eos": True} | representation, settings=settings)
    assert published.method_of(found) == method


def test_what_was_recalled_is_marked() -> None:
    row = nearest(made(), "sts")
    assert row is not None
    assert [published.shown(row.figure(task), approximate=row.is_approximate(task)) for task in ("STS12", "avg", "nothing")] == ["≈59.90", "67.00", "–"]


def test_the_family_is_told_by_the_last_name() -> None:
    names = {"facebook/opt-125m": "opt", "/llama/opt_6.7b/": "opt", "x/TinyLlama-1B": "llama", "x/e5-mistral-7b": "mistral", "x/optimus": "", "opt/gpt2": ""}
    assert {name: published.family(name) for name in names} == names
