"""Metrics against their definitions in plain Python, and a whole task against a product in numpy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import llmemb_ray
from llmemb_ray.config import EvaluateSettings
from llmemb_ray.embedders.embedder import EmbedderSpec, settle
from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.evaluation import retrieval
from llmemb_ray.evaluation.data import DataPlace
from llmemb_ray.evaluation.instructions import instruction
from llmemb_ray.evaluation.retrieval import SUITE, RetrievalTask, measure, rankings
from llmemb_ray.evaluation.suite import Building, Corpus, Texts
from llmemb_ray.search.exact import embed_queries, load_embedder
from tests.evaluation.test_beir import lay_out
from tests.small_jobs import decoded, opened
from tests.small_models import SENTENCES


def ndcg(gains: dict[str, int], ranked: list[str], depth: int = 10) -> float:
    def total(values: list[int]) -> float:
        return sum(max(value, 0) / math.log2(place + 2) for place, value in enumerate(values[:depth]))

    ideal = total(sorted(gains.values(), reverse=True))
    return total([gains.get(id_, 0) for id_ in ranked]) / ideal if ideal else 0.0


def average_precision(gains: dict[str, int], ranked: list[str], depth: int) -> float:
    relevant = {id_ for id_, gain in gains.items() if gain > 0}
    precisions = [len(relevant & set(ranked[:place])) / place for place in range(1, min(depth, len(ranked)) + 1) if ranked[place - 1] in relevant]
    return sum(precisions) / len(relevant) if relevant else 0.0


def defined(gains: dict[str, int], ranked: list[str], top_k: int) -> dict[str, float]:
    """Every metric by its definition."""
    relevant = {id_ for id_, gain in gains.items() if gain > 0}
    first = next((place for place, id_ in enumerate(ranked[:10], start=1) if id_ in relevant), None)
    recall = {f"Recall@{k}": len(relevant & set(ranked[:k])) / len(relevant) if relevant else 0.0 for k in (1, 5, 10, 100, 1000) if k <= top_k}
    return recall | {
        "nDCG@10": ndcg(gains, ranked),
        f"MAP@{top_k}": average_precision(gains, ranked, top_k),
        "MRR@10": 1 / first if first else 0.0,
        "P@10": len(relevant & set(ranked[:10])) / 10,
    }


def test_metrics_of_a_ranking_worked_out_by_hand() -> None:
    measured = measure({"q": {"a": 1, "c": 2, "z": 0}}, {"q": ["b", "c", "z", "a"]}, 10)["q"]
    gain, ideal = 2 / math.log2(1 + 2) + 1 / math.log2(1 + 4), 2 / math.log2(1 + 1) + 1 / math.log2(1 + 2)
    expected = {"nDCG@10": gain / ideal, "MAP@10": (1 / 2 + 2 / 4) / 2, "MRR@10": 1 / 2, "P@10": 2 / 10, "Recall@1": 0, "Recall@5": 1, "Recall@10": 1}
    assert measured == pytest.approx(expected)


@pytest.mark.parametrize("top_k", [10, 30, 1000])
def test_metrics_are_those_of_their_definitions(top_k: int) -> None:
    """Rankings of all lengths, none too; gains from -2 to 3; queries without a relevant document."""
    random = np.random.default_rng(top_k)
    ids = [f"d{number}" for number in range(60)]
    judgements, ranked = {}, {}
    for number in range(40):
        judged = random.permutation(ids)[: random.integers(1, 40)].tolist()
        judgements[f"q{number}"] = {id_: int(random.integers(-2, 4 if number % 7 else 1)) for id_ in judged}
        ranked[f"q{number}"] = random.permutation(ids)[: min(top_k, number)].tolist()
    del ranked["q3"]
    measured = measure(judgements, ranked, top_k)
    assert measured.keys() == judgements.keys()
    for query, metrics in measured.items():
        assert metrics == pytest.approx(defined(judgements[query], ranked.get(query, []), top_k), abs=1e-9), query


def test_the_ranking_given_counts_whatever_the_names_of_documents() -> None:
    """trec_eval orders equal scores by name: here no two are equal."""
    ids = [f"{number:03d}" for number in range(200)]
    for ranked in (ids, ids[::-1]):
        metrics = measure({"q": {ranked[3]: 1}}, {"q": ranked}, 1000)["q"]
        assert (metrics["MRR@10"], metrics["MAP@1000"], metrics["nDCG@10"]) == pytest.approx((0.25, 0.25, 1 / math.log2(5)))


def test_results_are_told_apart_by_query_where_some_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "QUERY_BLOCK", 2)
    table = pa.table({"query": pa.array([1, 1, 3, 4, 4, 4], pa.int64()), "id": list("abcdef")})
    blocks = list(rankings(table, ["q0", "q1", "q2", "q3", "q4"]))
    assert blocks == [{"q0": [], "q1": ["a", "b"]}, {"q2": [], "q3": ["c"]}, {"q4": ["d", "e", "f"]}]


def building(root: Path, model: Path, *wanted: str, **settings: Any) -> Building:
    made = EvaluateSettings.make({"model": str(model), "suite": ["retrieval"], "actors": "0"} | settings)
    spec: EmbedderSpec = settle(made)
    return Building(settings=made, data=DataPlace.of(str(root)), spec=spec, wanted=wanted, scratch=f"{root}/out/data", on_cluster=False)


@pytest.mark.parametrize("top_k", [10, 1000])
def test_a_task_scores_what_numpy_ranks(tmp_path: Path, model: Path, top_k: int) -> None:
    """25 documents, one empty, one named like a query that it fits; a judged document that is not there; two equal texts."""
    documents = [{"_id": f"d{row}", "title": f"Number {row}" if row % 3 else "", "text": SENTENCES[row % len(SENTENCES)]} for row in range(22)]
    documents += [{"_id": "same-1", "text": "The sea was calm."}, {"_id": "q1", "text": "is the sea calm"}, {"_id": "empty", "title": " ", "text": ""}]
    documents.insert(0, {"_id": "same-2", "title": "", "text": "The sea was calm."})
    queries = [{"_id": "q1", "text": "is the sea calm"}, {"_id": "q2", "text": SENTENCES[3]}, {"_id": "q3", "text": "numbers"}]
    judgements = {"q1": {"q1": 2, "same-1": 2, "d4": 1}, "q2": {"d3": 1, "gone": 1}, "q3": {"d1": 3, "d2": 1, "empty": 1}}
    qrels = "".join(f"{query}\t{document}\t{gain}\n" for query, gains in judgements.items() for document, gain in gains.items())
    lay_out(tmp_path / "sea", documents, queries, qrels)
    (task,) = SUITE.build(building(tmp_path, model, top_k=top_k))
    assert isinstance(task, RetrievalTask)
    texts, corpus = task.needs()
    assert isinstance(texts, Texts)
    assert isinstance(corpus, Corpus)
    assert (list(texts.texts), texts.role, corpus.role) == ([query["text"] for query in queries], "query", "document")

    out = tmp_path / "vectors"
    llmemb_ray.embed(corpus.files, str(out), model=str(model), actors="0", quiet=True, text_column=corpus.text_column, id_column="id", max_reject_rate=1)
    run = opened(out)
    vectors_QD = embed_queries(load_embedder(run), list(texts.texts))
    score = task.score([vectors_QD, run])

    by_id = decoded(out)
    assert set(by_id) == {document["_id"] for document in documents} - {"empty"}
    order = [document["_id"] for document in documents if document["_id"] in by_id]  # Of the corpus: equal texts stand in it.
    products = vectors_QD.astype(np.float64) @ np.stack([by_id[id_] for id_ in order]).astype(np.float64).T
    expected = {}
    for query, scores in zip(judgements, products, strict=True):
        ranked = [order[place] for place in np.argsort(-scores, kind="stable") if order[place] != query][:top_k]
        expected[query] = defined(judgements[query], ranked, top_k)
    for name in expected["q1"]:
        assert score.parts[name] == pytest.approx(100 * np.mean([metrics[name] for metrics in expected.values()]), abs=1e-6), name
    assert score.main == score.parts["nDCG@10"]
    assert task.ndcg_by_query([vectors_QD, run]) == pytest.approx({query: metrics["nDCG@10"] for query, metrics in expected.items()}, abs=1e-9)
    counts = {name: score.parts[name] for name in ("queries", "documents", "rejected_documents", "judgements", "unknown_documents")}
    assert counts == {"queries": 3, "documents": 26, "rejected_documents": 1, "judgements": 8, "unknown_documents": 1}


def test_tasks_are_chosen_by_name_by_path_and_by_split(tmp_path: Path, model: Path) -> None:
    root = tmp_path / "data"
    for name, split in (("scifact", "test"), ("metals", "test"), ("metals", "dev"), ("devonly", "dev")):
        lay_out(root / name, split=split)
    lay_out(tmp_path / "elsewhere" / "own")

    def names(*wanted: str, **settings: Any) -> list[str]:
        return [task.name for task in SUITE.build(building(root, model, *wanted, **settings))]

    assert names() == ["metals", "scifact"]
    assert names(split="dev") == ["devonly", "metals"]
    assert names("SciFact") == ["scifact"]
    assert names(str(tmp_path / "elsewhere" / "own"), "metals") == ["metals", "own"]
    with pytest.raises(ConfigError, match=r"retrieval has no task 'scifcat'; nearest: scifact"):
        names("scifcat")
    with pytest.raises(ConfigError, match=r"retrieval:/nowhere/own: there is no such directory"):
        names("/nowhere/own")
    with pytest.raises(InputError, match=r"devonly has no judgements of the split 'test'; set --split to one of those it has: dev"):
        names("devonly")
    with pytest.raises(InputError, match=r"split 'train'; there are devonly \(dev\), metals \(dev, test\), scifact \(test\): set --split"):
        names(split="train")
    with pytest.raises(InputError, match=r"has no collection with judgements of the split 'test'; looked for corpus\.jsonl"):
        SUITE.build(building(tmp_path / "elsewhere" / "own" / "qrels", model))


def test_a_group_is_taken_as_a_whole_or_one_by_one(tmp_path: Path, model: Path) -> None:
    for name in ("cqadupstack/android", "cqadupstack/english", "scifact"):
        lay_out(tmp_path / "data" / name)
    group = ["cqadupstack/android", "cqadupstack/english"]
    for wanted, names in (
        (["CQADupStack"], group),
        (["cqadupstack/English"], group[1:]),
        ([str(tmp_path / "data" / "cqadupstack")], group),
        ([str(tmp_path / "data" / "cqadupstack" / "android"), "scifact"], ["scifact", *group[:1]]),
    ):
        assert [task.name for task in SUITE.build(building(tmp_path / "data", model, *wanted))] == names
    (task,) = SUITE.build(building(tmp_path / "data", model, "cqadupstack/android"))
    (queries, _) = task.needs()
    assert queries.instruction == instruction("CQADupstackRetrieval") is not None


def test_queries_have_the_paper_s_instruction(tmp_path: Path, model: Path) -> None:
    for name in ("scifact", "metals"):
        lay_out(tmp_path / name)
    wants = {task.name: task.needs() for task in SUITE.build(building(tmp_path, model))}
    instructions = {name: [need.instruction for need in needs] for name, needs in wants.items()}
    assert instructions == {"metals": [None, None], "scifact": ["Given a scientific claim, retrieve documents that support or refute the claim", None]}
