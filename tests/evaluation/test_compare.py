"""Several evaluations in one table."""

from __future__ import annotations

import json

import pytest

from llmemb_ray.errors import InputError
from llmemb_ray.evaluation.compare import compare, lines, named
from tests.evaluation.records import STS, made

ENGINE = {"backend": "hf", "compute_dtype": "float32", "quantization": "none"}


def test_rows_are_named_by_what_differs() -> None:
    assert named([made("a/opt-1"), made("b/opt-2")]) == ["a/opt-1", "b/opt-2"]
    assert named([made(), made(method="none")]) == ["PromptEOL, zero-shot", "last token"]
    poolings = [made(), made(method="none"), made(method="none", representation={"pooling": "mean"})]
    assert named(poolings) == ["PromptEOL, zero-shot", "last token", "mean of the states"], "the method tells the pooling"
    assert named([*poolings, made(representation={"pooling": "mean"})])[-1] == "PromptEOL, zero-shot, pooling mean"
    assert named([made(), made(adapter="dir/adapter")]) == ["PromptEOL, zero-shot", "fine-tuned, with dir/adapter"]
    demos = [made(method="prompteol-icl", settings={"demo": [f"A cat.=>{word}"]}) for word in ("Cat", "Animal")]
    assert named(demos) == ["facebook/opt-125m, demo 'A cat.=>Cat'", "facebook/opt-125m, demo 'A cat.=>Animal'"]
    layers = [made(representation={"layer": layer}) for layer in (-1, -2)]
    assert named(layers) == ["facebook/opt-125m, layer -1", "facebook/opt-125m, layer -2"]
    engine = {"backend": "hf", "compute_dtype": "float32"}
    weights = [made(engine=engine | {"quantization": name}) for name in ("none", "nf4")]
    assert named(weights) == ["facebook/opt-125m, quantization none", "facebook/opt-125m, quantization nf4"]
    assert named([made(), made()]) == ["facebook/opt-125m #1", "facebook/opt-125m #2"]
    assert named([made()]) == ["facebook/opt-125m"]


def test_columns_are_the_tasks_of_the_suites_in_common() -> None:
    left = made("a", suites={"transfer": {"MR": 80, "CR": 90}, "sts": {"STS12": 40}, "bitext": {"fra": 1}})
    right = made("b", suites={"sts": {"STS12": 50, "STS13": 60}, "transfer": {"MR": 70, "CR": 60}})
    found = compare([left, right])
    assert found.suites == {"transfer": ["MR", "CR", "avg"], "sts": ["STS12", "STS13", "avg"]}
    shown = lines(found)
    assert [line.split() for line in shown[:8]] == [
        ["transfer,", "accuracy", "×", "100"],
        ["MR", "CR", "avg"],
        ["a", "80.00", "90.00", "85.00"],
        ["b", "70.00", "60.00", "65.00"],
        [],
        ["sts,", "Spearman", "×", "100"],
        ["STS12", "STS13", "avg"],
        ["a", "40.00", "–", "40.00"],
    ]
    assert found.notes == ["sts: the averages are of different tasks (a: 1, b: 2)"]
    written = json.loads(json.dumps(found.to_dict()))
    assert written["rows"][1]["figures"]["sts"] == {"STS12": 50.0, "STS13": 60.0, "avg": 55.0}
    assert "evaluations" not in written


def test_the_dev_set_is_no_part_of_an_average() -> None:
    left, right = made("a", suites={"sts": {"STS12": 40}}), made("b", suites={"sts": {"STS12": 50, "STS-B-dev": 70}})
    assert compare([left, right]).notes == []


def test_nothing_in_common_is_refused_and_both_sides_named() -> None:
    with pytest.raises(InputError, match=r"no suite.*\(a: sts; b: sts-raw\).*same --out"):
        compare([made("a"), made("b", suites={"sts-raw": dict.fromkeys(STS, 50)})])
    with pytest.raises(InputError, match="no evaluation"):
        compare([])


def test_protocols_that_differ_are_told() -> None:
    suites = {"transfer": {"MR": 80}, "sts": {"STS12": 50}}
    protocols = [{"transfer": ENGINE | {"classifier": name, "folds": folds}, "sts": ENGINE} for name, folds in (("senteval", 5), ("sklearn", 10))]
    left = made("a", suites=suites, details={"sts": {"STS12": {"text": "tokenized"}}}, protocol=protocols[0])
    right = made("b", suites=suites, details={"sts": {"STS12": {"text": "raw"}}}, protocol=protocols[1], settings={"folds": 5})
    notes = compare([left, right]).notes
    assert "transfer: folds differs: 5 (a); 10 (b)" in notes
    assert "transfer: classifier differs: senteval (a); sklearn (b)" in notes
    assert [note for note in notes if note.startswith("sts: the text differs: lower-cased")]
    assert len(notes) == 3
    same = compare([made("a", suites=suites, protocol=protocols[0]), made("b", suites=suites), made("c", suites=suites, protocol={"folds": 10})])
    assert same.notes == [], "what a record does not tell is no difference"
    engines = [made(name, suites=suites, protocol={"sts": ENGINE | {"backend": backend}}) for name, backend in (("a", "hf"), ("b", "vllm"))]
    assert compare(engines).notes == ["sts: backend differs: hf (a); vllm (b)"], "a suite's own, where the rows are not named by it"


def test_task_instructions_name_the_rows_and_are_no_matter_of_precision() -> None:
    both = [made(method="e5", space="s", protocol={"sts": ENGINE | {"task_instructions": given}}) for given in (True, False)]
    assert named(both) == ["facebook/opt-125m", "facebook/opt-125m, without task instructions"]
    assert compare(both).notes == ["sts: task_instructions differs: True (facebook/opt-125m); False (facebook/opt-125m, without task instructions)"]
    folds = [made(suites={"transfer": {"MR": 80}}, space="s", protocol={"transfer": ENGINE | {"folds": number}}) for number in (5, 10)]
    assert compare(folds).notes == ["transfer: folds differs: 5 (facebook/opt-125m #1); 10 (facebook/opt-125m #2)"]
    assert named([made(), both[0]]) == ["PromptEOL, zero-shot", "E5"], "a method tells its templates"


def test_contamination_is_shown_once_where_it_is_the_same() -> None:
    checked = {"tasks": {"sts STS12": {"texts": 9, "distinct": 8, "found": 2, "examples": ["A cat."], "share": 0.25}}, "columns": []}
    other = {"tasks": {"sts STS12": {"texts": 9, "distinct": 8, "found": 4, "examples": ["A dog."], "share": 0.5}}, "columns": []}
    shown = lines(compare([made(name, contamination=found) for name, found in (("a", checked), ("b", other), ("c", checked), ("d", {}))]))
    assert [line for line in shown if line in ("a; c:", "b:", "d:")] == ["a; c:", "b:"]
    assert [line.split()[-1] for line in shown if line.startswith("sts STS12 ")] == ["25.00%", "50.00%"]


def test_why_no_published_figure_stands_beside_a_task_is_told() -> None:
    details = {"retrieval": {"nfcorpus": {"split": "test", "note": "without stop words"}}}
    found = compare([made(name, suites={"retrieval": {"nfcorpus": 30}}, details=details) for name in ("a", "b")])
    assert [line for line in lines(found) if "stop words" in line] == ["note: nfcorpus: without stop words; no published figure is comparable"]


def test_spaces_and_commits_are_told() -> None:
    engines = [{"backend": backend, "compute_dtype": "float32", "quantization": "none"} for backend in ("hf", "vllm")]
    (note,) = compare([made(space="s", engine=engine) for engine in engines]).notes
    assert "one vector space and protocol" in note
    assert "backend hf; facebook/opt-125m, backend vllm" in note
    assert any("different commits: aaa, bbb" in note for note in compare([made(commit="aaa"), made(commit="bbb", space="t")]).notes)


def test_many_languages_are_summed_up() -> None:
    shown = lines(compare([made(name, suites={"bitext": {f"l{number}": number for number in range(100)}}) for name in ("a", "b")]))
    assert [line.split() for line in shown if line.startswith("a ")] == [["a", "100", "0.00", "49.50", "99.00", "49.50"]]
    apart = made("a", suites={"bitext": {f"l{number}": number for number in range(100)}})
    apart.suites["bitext"]["avg"] = 12.5
    assert lines(compare([apart]))[2].split()[-1] == "12.50", "the suite's own average, which may leave tasks out"
