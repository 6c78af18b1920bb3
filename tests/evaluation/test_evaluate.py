"""The evaluation from settings to record, with real models in this process: each text once, figures that follow from the vectors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from llmemb_ray.config import EvaluateSettings
from llmemb_ray.embedders.embedder import Embedder
from llmemb_ray.errors import ConfigError, InputError, RunMismatch
from llmemb_ray.evaluation import evaluate, record
from llmemb_ray.evaluation.suite import Corpus, Texts
from llmemb_ray.evaluation.vectors import Vectors
from llmemb_ray.shards.run import Run
from tests.conftest import Shown
from tests.small_jobs import opened, write
from tests.small_models import SENTENCES

TEXTS = list(dict.fromkeys(" ".join(text.split()) for text in SENTENCES if text.strip()))
PAIRS = [(left, right, (number * 7) % 6) for number, (left, right) in enumerate(zip(TEXTS, TEXTS[1:] + TEXTS[:1], strict=True))]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A data directory with a small STS-B and SICK in SentEval's layout."""
    root = tmp_path / "data"
    for split in ("dev", "test"):
        path = root / "STSBenchmark" / f"sts-{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"g\tf\ty\t{n}\t{gold}\t{left}\t{right}\n" for n, (left, right, gold) in enumerate(PAIRS)))
    (root / "SICK").mkdir()
    lines = "".join(f"{n}\t{right}\t{left}\t{gold}\tNEUTRAL\n" for n, (left, right, gold) in enumerate(PAIRS))
    (root / "SICK" / "SICK_test_annotated.txt").write_text("pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n" + lines)
    return root


def settings(model: Path, place: Path, out: Path, **more: Any) -> EvaluateSettings:
    values = {"model": str(model), "data": str(place), "out": str(out), "actors": "0", "suite": ["sts:STS-B,SICK-R,STS-B-dev"]}
    return EvaluateSettings.make(values | more)


def test_the_figure_is_that_of_the_embedders_own_vectors(tmp_path: Path, model: Path, place: Path) -> None:
    made = evaluate.run(settings(model, place, tmp_path / "out", clean="senteval"))
    embedder = Embedder.load(str(model), clean="senteval")
    left, right = (embedder.encode([pair[side] for pair in PAIRS]) for side in (0, 1))
    wanted = 100 * spearmanr((left * right).sum(axis=1), [gold for _, _, gold in PAIRS]).statistic
    assert made.suites["sts"] == pytest.approx(dict.fromkeys(("STS-B", "SICK-R", "STS-B-dev", "avg"), wanted), abs=1e-6)
    assert made.counts["texts"] == 6 * len(PAIRS)
    assert made.counts["texts_embedded"] == len(TEXTS)
    assert record.load(str(tmp_path / "out")) == made
    assert made.parameters == sum(weight.numel() for name, weight in embedder.backend.model.named_parameters() if "norm" not in name)  # type: ignore[attr-defined]


def test_vectors_that_are_there_are_used_again_and_suites_join_the_record(tmp_path: Path, model: Path, place: Path) -> None:
    first = evaluate.run(settings(model, place, tmp_path / "out", suite=["sts:STS-B"]))
    (run,) = (tmp_path / "out" / "vectors").iterdir()
    shards = {path: path.stat().st_mtime_ns for path in (run / "data").iterdir()}
    again = evaluate.run(settings(model, place, tmp_path / "out", suite=["sts:SICK-R"]))
    assert {path: path.stat().st_mtime_ns for path in (run / "data").iterdir()} == shards
    assert first.suites["sts"].keys() == {"STS-B", "avg"}
    assert again.suites["sts"].keys() == {"STS-B", "SICK-R", "avg"}


def test_figures_of_another_protocol_are_replaced_and_only_those(tmp_path: Path, model: Path, place: Path) -> None:
    said: list[str] = []
    evaluate.run(settings(model, place, tmp_path / "out", suite=["sts:STS-B"]))
    other = evaluate.run(settings(model, place, tmp_path / "out", suite=["sts:SICK-R"], folds=5, top_k=50), say=said.append)
    assert other.suites["sts"].keys() == {"STS-B", "SICK-R", "avg"}, "folds are none of STS's settings"
    third = evaluate.run(settings(model, place, tmp_path / "out", suite=["sts:SICK-R"], compute_dtype="bfloat16"), say=said.append)
    assert third.suites["sts"].keys() == {"SICK-R", "avg"}
    assert any("made otherwise (compute_dtype float32 → bfloat16) and are replaced" in line for line in said)
    assert third.protocol["sts"] == {"backend": "hf", "compute_dtype": "bfloat16", "quantization": "none"}


def test_a_suite_that_fails_costs_no_other_its_figures(tmp_path: Path, model: Path, place: Path) -> None:
    (place / "tatoeba.deu-eng.deu").write_text("ein Mann\n")
    (place / "tatoeba.deu-eng.eng").write_text("a man\n")
    with pytest.raises(InputError, match="not to be had on this machine"):
        evaluate.run(settings(model, place, tmp_path / "out", suite=["bitext:deu", "mteb:CQADupstackAndroidRetrieval"]))
    assert record.load(str(tmp_path / "out")).suites["bitext"]["deu"] == 100


def test_another_representation_is_refused_with_what_differs(tmp_path: Path, model: Path, place: Path) -> None:
    evaluate.run(settings(model, place, tmp_path / "out", suite=["sts:STS-B"]))
    with pytest.raises(RunMismatch, match=r"another vector space[\s\S]*representation\.pooling: there 'last', asked for now 'mean'"):
        evaluate.run(settings(model, place, tmp_path / "out", suite=["sts:STS-B"], pooling="mean"))


def test_an_evaluation_that_was_stopped_goes_on(tmp_path: Path, model: Path, place: Path) -> None:
    out = tmp_path / "out"
    whole = evaluate.run(settings(model, place, out))
    (run,) = (out / "vectors").iterdir()
    (run / "_llmemb" / "receipt.json").unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in (run / "data").iterdir()}
    (out / "evaluation.json").unlink()
    again = evaluate.run(settings(model, place, out))
    assert again.suites == whole.suites
    assert {path.name: path.stat().st_mtime_ns for path in (run / "data").iterdir()} == kept


def test_instructions_of_tasks_make_runs_of_their_own_and_documents_stay_plain(tmp_path: Path, model: Path) -> None:
    chosen = settings(model, tmp_path, tmp_path / "out", prompt="e5", suite=["sts"])
    corpus = write(tmp_path / "docs.parquet", SENTENCES[:3], id=["a", "b", "c"])
    needs = [
        Texts(texts=["one", "two", "one"], instruction="Retrieve semantically similar text."),
        Texts(texts=["one"], role="query", instruction="Find the passage"),
        Texts(texts=["one"]),
    ]
    vectors = Vectors(chosen, evaluate.settle(chosen), str(tmp_path / "out"))
    with vectors.embedded(needs):
        matrices = [vectors.of(need) for need in needs]
        run = vectors.of(Corpus(name="docs", files=[str(corpus)]))
    assert len(list((tmp_path / "out" / "vectors").iterdir())) == 4
    for matrix, need in zip(matrices, needs, strict=True):
        assert isinstance(matrix, np.ndarray)
        alone = Embedder.load(str(model), prompt="e5", role=need.role, normalize=False, **({"instruction": need.instruction} if need.instruction else {}))
        assert np.abs(matrix - alone.encode(list(need.texts), need.role)).max() <= 1e-5
    assert isinstance(run, Run)
    assert run.plan.representation.document.template == "{text}"
    assert run.plan.representation.normalize


def test_an_instruction_of_the_users_is_for_queries_not_for_a_corpus(tmp_path: Path, model: Path) -> None:
    chosen = settings(model, tmp_path, tmp_path / "out", prompt="e5", instruction="Find it", suite=["sts"])
    corpus = write(tmp_path / "docs.parquet", SENTENCES[:3], id=["a", "b", "c"])
    vectors = Vectors(chosen, evaluate.settle(chosen), str(tmp_path / "out"))
    with vectors.embedded([Texts(texts=["a question"], role="query"), Texts(texts=["a document"], plain=True), Texts(texts=["of both kinds"])]):
        vectors.of(Corpus(name="docs", files=[str(corpus)]))
    templates = {}
    for path in (tmp_path / "out" / "vectors").iterdir():
        plan = opened(path).plan
        texts = pq.read_table(plan.files[0].url)["text"].to_pylist()
        templates[texts[0]] = getattr(plan.representation, plan.settings["role"]).template
    instructed = "Instruct: Find it\nQuery: {text}"
    assert templates == {"a question": instructed, "a document": "{text}", "of both kinds": instructed, SENTENCES[0]: "{text}"}


def test_a_text_that_cannot_be_embedded_is_told(tmp_path: Path, model: Path, place: Path) -> None:
    path = place / "STSBenchmark" / "sts-test.csv"
    path.write_text(path.read_text() + "g\tf\ty\t99\t3.0\t" + "\U0001f9ea\U0001f9ea\tb\n")
    with pytest.raises(InputError, match="cannot be embedded, so that its task has no score"):
        evaluate.run(settings(model, place, tmp_path / "out", max_tokens=2, prompt="none", suite=["sts:STS-B"]))


@pytest.mark.parametrize(
    ("suite", "message"),
    [("sst", "nearest: sts"), ("sts:STSB", "nearest: STS-B"), ("transfer:SST", "nearest: SST2"), ("retrieval:scifacts", "scifact")],
)
def test_names_that_do_not_exist_are_told_with_the_nearest(model: Path, data: Path, tmp_path: Path, suite: str, message: str) -> None:
    with pytest.raises((ConfigError, InputError), match=message):
        evaluate.run(settings(model, data, tmp_path / "out", suite=[suite]))
    assert not (tmp_path / "out" / "vectors").exists()


def test_the_command_prints_writes_and_compares(tmp_path: Path, model: Path, place: Path, llmemb: Any) -> None:
    words = ["evaluate", "--model", model, "--data", place, "--actors", "0", "--suite", "sts:STS-B,SICK-R"]
    shown: Shown = llmemb(*words, "--out", tmp_path / "a", "--json")
    assert shown.code == 0, shown.err
    suites = json.loads(shown.out)["suites"]
    assert suites["sts"]["avg"] == pytest.approx((suites["sts"]["STS-B"] + suites["sts"]["SICK-R"]) / 2)
    assert (tmp_path / "a" / "evaluation.html").stat().st_size > 1e6
    assert llmemb(*words, "--out", tmp_path / "b", "--pooling", "mean").code == 0
    compared: Shown = llmemb("evaluate", "--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    assert compared.code == 0, compared.err
    assert f"{suites['sts']['STS-B']:.2f}" in compared.out
    assert (tmp_path / "c" / "evaluation.html").exists()
    shutil.rmtree(tmp_path / "a")
    missing: Shown = llmemb("evaluate", "--compare", tmp_path / "a", tmp_path / "b")
    assert (missing.code, "holds no evaluation" in missing.err) == (2, True)


def test_contamination_alone_needs_no_model(tmp_path: Path, place: Path, llmemb: Any) -> None:
    training = tmp_path / "train.csv"
    training.write_text(f'sent0,sent1\n"{PAIRS[0][0].upper()}",something else entirely\n')
    shown: Shown = llmemb("evaluate", "--suite", "sts:STS-B", "--data", place, "--contamination", training, "--json")
    assert shown.code == 0, shown.err
    assert json.loads(shown.out)["tasks"]["sts STS-B"]["found"] == 1
