"""mteb's tasks on real (small) models: what is embedded how, the search over shards, result files, what cannot work."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from llmemb_ray.config import EvaluateSettings
from llmemb_ray.embedders import Embedder, EmbedderSpec, settle
from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.evaluation.instructions import instruction
from llmemb_ray.evaluation.mteb import Encoder, tasks
from llmemb_ray.evaluation.mteb.search import Searcher
from llmemb_ray.representation import Form, Representation, Role
from llmemb_ray.storage import Storage

mteb = pytest.importorskip("mteb", reason="the extra llmemb-ray[mteb] is not installed")

TEXTS = ["A man is playing a guitar.", "What is this?", "A man is playing a guitar.", "  ", "no final full stop"]

ONE_OF_A_TYPE = (
    "MockBitextMiningTask",
    "MockClassificationTask",
    "MockClusteringTask",
    "MockPairClassificationTask",
    "MockRerankingTask",
    "MockSTSTask",
    "MockSummarizationTask",
    "MockInstructionRetrieval",
    "MockRetrievalDialogTask",
)


class Counting:
    """An embedder in this process that remembers what it was asked."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder, self.asked = embedder, list[list[str]]()

    @property
    def spec(self) -> EmbedderSpec:
        return self.embedder.spec

    def encode(self, texts: Sequence[str], *, role: Role = "document", representation: Representation | None = None) -> Any:
        self.asked.append(list(texts))
        assert representation is not None
        return self.embedder.under(representation).encode(list(texts), role)


@pytest.fixture(scope="module")
def e5(model: Path) -> Embedder:
    return Embedder.load(str(model), prompt="e5", device="cpu", backend="hf")


def task(name: str, kind: str, prompt: Any = None) -> Any:
    """As much of a task's metadata as says how its texts are embedded."""
    return SimpleNamespace(name=name, type=kind, prompt=prompt, dataset={"path": "made/up", "revision": "1"}, get_modalities=lambda _: ["text"])


def encode(encoder: Encoder, metadata: Any, prompt_type: str | None = None, texts: Sequence[str] = TEXTS) -> Any:
    return encoder.encode([{"text": list(texts[:2])}, {"text": list(texts[2:])}], task_metadata=metadata, prompt_type=prompt_type)


def under(e5: Embedder, template: str, texts: Sequence[str] = TEXTS, **changes: Any) -> Any:
    """The same texts by a template written out by hand."""
    other = Embedder.load(e5.spec.model.name, prompt=template, append_eos=True, device="cpu", backend="hf", **changes)
    return np.stack([other.encode([text])[0] if text.strip() else np.zeros(other.dimension, np.float32) for text in texts])


class TestEncoder:
    def test_equal_texts_are_embedded_once_and_blank_ones_are_zero(self, e5: Embedder) -> None:
        counting = Counting(e5)
        encoder = Encoder(counting)
        vectors = encode(encoder, task("STS12", "STS"))
        assert counting.asked == [["A man is playing a guitar.", "What is this?", "no final full stop"]]
        assert vectors.dtype == np.float32
        assert np.array_equal(vectors[0], vectors[2])
        assert not vectors[3].any()
        assert encoder.blank == 1

    def test_queries_of_retrieval_are_instructed_and_documents_are_not(self, e5: Embedder) -> None:
        encoder = Encoder.of(e5)
        instructed = under(e5, f"Instruct: {instruction('SciFact')}\nQuery: {{text}}")
        plain = under(e5, "{text}")
        assert np.abs(encode(encoder, task("SciFact", "Retrieval"), "query") - instructed).max() < 1e-5
        assert np.abs(encode(encoder, task("SciFact", "Retrieval"), "document") - plain).max() < 1e-5
        assert np.abs(instructed - plain).max() > 1e-2

    def test_the_users_instruction_is_for_queries_and_symmetric_tasks(self, e5: Embedder) -> None:
        form = Form(template="Instruct: Do\nQuery: {text}")
        instructed = replace(e5.representation, document=form, query=form)
        encoder, plain, both = Encoder.of(e5.under(instructed)), under(e5, "{text}"), under(e5, form.template)
        for metadata, kind, expected in (
            (task("SciFact", "Retrieval"), "query", both),
            (task("SciFact", "Retrieval"), "document", plain),
            (task("Unheard", "Retrieval", {"document": "Read"}), "document", plain),
            (task("SciDocsRR", "Reranking"), "document", both),
            (task("STS12", "STS"), None, both),
        ):
            assert np.abs(encode(encoder, metadata, kind) - expected).max() < 1e-5
        as_it_is = Encoder.of(e5.under(instructed), plain_documents=False)
        assert as_it_is.representation(task("SciFact", "Retrieval"), "document") == instructed
        assert as_it_is.mteb_model_meta.revision != encoder.mteb_model_meta.revision

    def test_symmetric_tasks_instruct_both_sides(self, e5: Embedder) -> None:
        encoder = Encoder.of(e5)
        for metadata, text, kinds in (
            (task("STS12", "STS"), "Retrieve semantically similar text.", [None]),
            (task("SciDocsRR", "Reranking"), str(instruction("SciDocsRR")), ["query", "document"]),
        ):
            expected = under(e5, f"Instruct: {text}\nQuery: {{text}}")
            for kind in kinds:
                assert np.abs(encode(encoder, metadata, kind) - expected).max() < 1e-5

    def test_a_task_that_the_paper_does_not_name_takes_mtebs_prompt(self, e5: Embedder) -> None:
        found = encode(Encoder.of(e5), task("Unheard", "Retrieval", {"query": "Find {it}"}), "query")
        assert np.abs(found - under(e5, "Instruct: Find {{it}}\nQuery: {text}")).max() < 1e-5
        assert np.abs(encode(Encoder.of(e5), task("Unheard", "Retrieval", {"query": "Find {it}"}), "document") - under(e5, "{text}")).max() < 1e-5

    def test_classification_keeps_lengths(self, e5: Embedder) -> None:
        found = encode(Encoder.of(e5), task("Banking77Classification", "Classification"))
        expected = under(e5, f"Instruct: {instruction('Banking77Classification')}\nQuery: {{text}}", normalize=False)
        assert np.abs(found - expected).max() < 1e-4
        assert abs(np.linalg.norm(found[0]) - 1) > 0.1

    def test_other_prompts_are_left_as_they_are(self, model: Path) -> None:
        embedder = Embedder.load(str(model), device="cpu", backend="hf")
        encoder = Encoder.of(embedder)
        assert encoder.representation(task("SciFact", "Retrieval"), "query") == embedder.representation
        assert not encoder.task_instructions
        assert Encoder.of(embedder).mteb_model_meta.revision != Encoder.of(embedder, task_instructions=True).mteb_model_meta.revision


class TestSearch:
    DOCUMENTS = 25

    @pytest.fixture
    def corpus(self) -> Any:
        from datasets import Dataset

        rows = range(self.DOCUMENTS)
        titles = ["" if row % 3 == 0 else f"Title {row}" for row in rows]
        return Dataset.from_dict({"id": [f"d{row}" for row in rows], "title": titles, "text": [f" body of number {row * 37 % 101} " for row in rows]})

    def test_the_job_and_shards_rank_as_plain_cosines(self, e5: Embedder, corpus: Any, tmp_path: Path) -> None:
        from datasets import Dataset

        queries = Dataset.from_dict({"id": ["q1", "q0"], "text": ["number 5", "Title 8"]})
        settings = EvaluateSettings.make({"model": e5.spec.model.name, "suite": ["mteb:x"], "actors": 0, "backend": "hf", "prompt": "e5"})
        raw = e5.under(replace(e5.representation, normalize=False))
        asked = {
            "task_metadata": task("SciFact", "Retrieval"),
            "hf_split": "test",
            "hf_subset": "default",
            "encode_kwargs": {"batch_size": 8},
            "num_proc": None,
        }
        found = {}
        for job_documents in (self.DOCUMENTS, self.DOCUMENTS + 1):
            searcher = Searcher(Counting(raw), settings, str(tmp_path), job_documents=job_documents)
            searcher.index(corpus, **asked)
            found[job_documents] = searcher.search(queries, top_k=7, **asked)
        by_job, by_mteb = found.values()

        joined = [f"{row['title']} {row['text']}".strip() for row in corpus]
        documents = under(e5, "{text}", joined)
        wanted = under(e5, f"Instruct: {instruction('SciFact')}\nQuery: {{text}}", queries["text"])
        for query, scores in zip(queries["id"], wanted @ documents.T, strict=True):
            best = np.argsort(-scores, kind="stable")[:7]
            assert [*by_job[query]] == [f"d{row}" for row in best]
            assert np.allclose([*by_job[query].values()], scores[best], atol=1e-5)
            assert by_mteb[query].keys() == by_job[query].keys()
        (written,) = tmp_path.glob("corpora/*/*.parquet")
        assert pq.read_table(written)["text"].to_pylist() == joined

    def test_documents_that_cannot_be_embedded_are_counted(self, e5: Embedder, tmp_path: Path) -> None:
        from datasets import Dataset

        settings = EvaluateSettings.make({"model": e5.spec.model.name, "suite": ["mteb:x"], "actors": 0, "backend": "hf"})
        searcher = Searcher(Counting(e5), settings, str(tmp_path), job_documents=1)
        asked = {"task_metadata": task("SciFact", "Retrieval"), "hf_split": "test", "hf_subset": "default"}
        searcher.index(Dataset.from_dict({"id": [*"abcdefghijkl"], "text": ["", "x", *[" "] * 10]}), **asked)
        found = searcher.search(Dataset.from_dict({"id": ["q"], "text": ["x"]}), top_k=3, **asked)
        assert (list(found["q"]), searcher.rejected) == (["b"], 11), "more than the job lets pass unless it is told"

    def test_a_document_without_text_is_named(self, e5: Embedder, tmp_path: Path) -> None:
        from datasets import Dataset

        settings = EvaluateSettings.make({"model": e5.spec.model.name, "suite": ["mteb:x"], "actors": 0})
        searcher = Searcher(Counting(e5), settings, str(tmp_path), job_documents=1)
        asked = {"task_metadata": task("SciFact", "Retrieval"), "hf_split": "test", "hf_subset": "default"}
        searcher.index(Dataset.from_dict({"id": ["a", "b"], "text": ["x", None]}), **asked)
        with pytest.raises(InputError, match="SciFact: document 'b' has no text"):
            searcher.search(Dataset.from_dict({"id": ["q"], "text": ["x"]}), top_k=1, **asked)


class TestTasks:
    def test_a_task_of_each_kind_runs_and_is_not_run_again(self, e5: Embedder, tmp_path: Path) -> None:
        counting = Counting(e5)
        encoder = Encoder(counting)
        mocks = [made for name in ONE_OF_A_TYPE for made in tasks._tasks_of(name)]
        scores = tasks.run_tasks(encoder, mocks, Storage(str(tmp_path)))
        assert list(scores) == list(ONE_OF_A_TYPE)
        meta = encoder.mteb_model_meta
        kept = tmp_path / "results" / meta.name.replace("/", "__") / meta.revision
        stored = json.loads((kept / "MockSTSTask.json").read_text())
        assert scores["MockSTSTask"].main == pytest.approx(100 * stored["scores"]["test"][0]["cosine_spearman"])
        calls = len(counting.asked)
        again = tasks.run_tasks(encoder, [made for name in ONE_OF_A_TYPE for made in tasks._tasks_of(name)], Storage(str(tmp_path)))
        assert len(counting.asked) == calls
        assert {name: score.main for name, score in again.items()} == pytest.approx({name: score.main for name, score in scores.items()})
        assert tasks.by_type(scores)["Retrieval"] == pytest.approx(scores["MockRetrievalDialogTask"].main)

    def test_a_suite_in_this_process_with_the_job_for_its_corpus(self, model: Path, tmp_path: Path) -> None:
        values = {"model": str(model), "suite": ["mteb:MockRetrievalTask"], "actors": 0, "backend": "hf", "prompt": "e5", "mteb_job_documents": 1}
        settings = EvaluateSettings.make(values)
        scores = tasks.run_suite(settings, settle(settings), ["MockRetrievalTask"], str(tmp_path))
        assert scores["MockRetrievalTask"].parts["type"] == "Retrieval"
        assert set(scores["MockRetrievalTask"].parts["subsets"]) == {"val/default", "test/default"}
        assert len(list(tmp_path.glob("mteb/vectors/*/_llmemb/receipt.json"))) == 2
        assert list(tmp_path.glob("mteb/results/*/*-instructed/MockRetrievalTask.json"))

    def test_data_that_are_not_here_are_named_with_the_way_to_get_them(self, e5: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        counting = Counting(e5)
        with pytest.raises(InputError, match=r"mteb task STS12: its data set mteb/sts12-sts at .*load_data.*HF_HUB_OFFLINE.*HF_HOME"):
            tasks.run_tasks(Encoder(counting), [*tasks._tasks_of("MockSTSTask"), mteb.get_task("STS12")], Storage(str(tmp_path)))
        assert counting.asked == [], "nothing runs before all data are there"


class TestNames:
    def test_benchmarks_are_whole_again_and_spelling_is_mtebs(self) -> None:
        assert tasks.check(["MTEB(eng", "v1)", "scifact", "mock", "SciFact"]) == ["MTEB(eng, v1)", "SciFact", "mock"]
        assert len(tasks._tasks_of("MTEB(eng, v1)")) == 56

    def test_a_wrong_name_is_told_with_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match=r"no task 'SciFakt'; nearest: SciFact"):
            tasks.check(["SciFakt"])

    def test_nothing_named_says_what_can_be(self) -> None:
        with pytest.raises(ConfigError, match=r"mteb:SciFact,STS12.*MTEB\(eng, v1\).*mteb:mock"):
            tasks.check([])

    def test_without_mteb_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "mteb", None)
        with pytest.raises(ConfigError, match=r"pip install 'llmemb-ray\[mteb\]'"):
            tasks.check(["SciFact"])
