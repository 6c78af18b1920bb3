"""Mining end to end with a real small model in this process, against brute force in numpy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmemb_ray.config import MineSettings
from llmemb_ray.embedders.embedder import Embedder
from llmemb_ray.errors import InputError, OutputError, RunMismatch
from llmemb_ray.mining import mine as mining
from llmemb_ray.mining.mine import Mined, mine
from tests.conftest import Shown
from tests.small_jobs import embed, write
from tests.small_models import SENTENCES

CORPUS = [f"{sentence.strip()} ({number})" for number in range(3) for sentence in SENTENCES]
QUERIES: list[dict[str, Any]] = [
    {"query": "Who plays the guitar?", "positive": CORPUS[0]},
    {"query": CORPUS[2].upper(), "positive": ["not in the corpus", CORPUS[5].replace(" ", "  ")]},
    {"query": "Who plays the guitar?", "positive": CORPUS[1]},
    {"query": "fox", "positive": CORPUS[13]},
]
"""The second query stands in the corpus itself in other letters, and so does its second positive; the first and the third are the same."""

REMOVED = [{CORPUS[0], CORPUS[1]}, {CORPUS[2], CORPUS[5]}, {CORPUS[0], CORPUS[1]}, {CORPUS[13]}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of a corpus, in the second one doubles of the first's rows, and queries."""
    root = tmp_path_factory.mktemp("mine")
    write(root / "corpus" / "a.parquet", CORPUS, id=list(range(len(CORPUS))))
    write(root / "corpus" / "b.parquet", CORPUS[3:6], id=[100, 101, 102])
    (root / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUERIES))
    return root


@pytest.fixture
def ray_here() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def settings(place: Path, model: Path, out: Path, **more: Any) -> MineSettings:
    values = {"model": str(model), "queries": [str(place / "q.jsonl")], "corpus": [str(place / "corpus")], "out": str(out), "actors": "0"}
    return MineSettings.make({name: value for name, value in (values | more).items() if value is not None})


def triples_of(out: Path) -> list[dict[str, Any]]:
    return [row for file in sorted((out / "triples").iterdir()) for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def mined(place: Path, model: Path) -> Mined:
    """With an instruction for the queries, three negatives each, two queries a block."""
    more: dict[str, Any] = {"prompt": "e5", "instruction": "Find it", "negatives": 3, "block_queries": 2, "top_k": 30}
    return mine(settings(place, model, place / "out", **more))


def test_the_triples_are_those_of_brute_force(place: Path, model: Path, mined: Mined) -> None:
    documents, asked = Embedder.load(str(model), prompt="e5"), Embedder.load(str(model), prompt="e5", instruction="Find it", role="query")
    corpus = documents.encode(CORPUS)
    expected = []
    for query, removed in zip(QUERIES, REMOVED, strict=True):
        vector = asked.encode([query["query"]], role="query")[0]
        scores = corpus @ vector
        best = [place for place in np.argsort(-scores) if CORPUS[place] not in removed][:3]
        for positive in query["positive"] if isinstance(query["positive"], list) else [query["positive"]]:
            expected.append((query["query"], positive, [CORPUS[place] for place in best], float(documents.encode([positive])[0] @ vector), scores[best]))
    found = triples_of(place / "out")
    assert [(row["anchor"], row["positive"], row["negative"]) for row in found] == [one[:3] for one in expected]
    for row, (_, _, negatives, positive_score, scores) in zip(found, expected, strict=True):
        assert row["positive_score"] == pytest.approx(positive_score, abs=1e-5)
        np.testing.assert_allclose(row["negative_scores"], scores, atol=1e-5)
        at = [
            ((CORPUS, CORPUS[3:6])[file][number], id_)
            for file, number, id_ in zip(row["negative_files"], row["negative_rows"], row["negative_ids"], strict=True)
        ]
        assert [text for text, _ in at] == negatives
        assert [{str(CORPUS.index(text)), str(100 + CORPUS.index(text) - 3)} >= {id_} for text, id_ in at] == [True] * 3
    assert [row["query_row"] for row in found] == [0, 1, 1, 2, 3]


def test_the_accounts_balance(place: Path, mined: Mined) -> None:
    counts = mined.counts
    assert (counts["rows"], counts["queries"], counts["positives"], counts["triples"], counts["negatives"]) == (4, 4, 5, 5, 15)
    assert counts["candidates"] == 5 * 30
    of_reasons = {name: count for name, count in counts["removed"].items() if name != "equals another negative"}
    assert sum(of_reasons.values()) + counts["eligible"] == counts["candidates"]
    assert mined.to_dict() == json.loads((place / "out" / "mining.json").read_text())
    assert any("5 triples with 15 negatives" in line for line in mined.lines())


def test_what_is_done_is_not_done_again(place: Path, model: Path, mined: Mined, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block whose triples are gone is mined anew from the vectors that are there, and nothing is embedded."""
    before = triples_of(place / "out")
    (place / "out" / "triples" / "part-000001.parquet").unlink()
    (place / "out" / "mining.json").unlink()
    blocks: list[str] = []
    true = mining._Block.mine

    def noted(self: Any, name: str) -> None:
        blocks.append(name)
        true(self, name)

    monkeypatch.setattr(mining._Block, "mine", noted)
    written = {path: path.stat().st_mtime_ns for path in (place / "out" / "runs").rglob("*.parquet")}
    again = mine(MineSettings.make(mined.settings))
    assert blocks == ["part-000001.parquet"]
    assert triples_of(place / "out") == before
    assert again.counts == mined.counts
    assert written == {path: path.stat().st_mtime_ns for path in (place / "out" / "runs").rglob("*.parquet")}


def test_the_cluster_mines_what_one_process_mines(place: Path, mined: Mined, ray_here: None) -> None:
    """Where texts stand is looked up anew, a task a file, and the blocks are searched by tasks."""
    before, standing = triples_of(place / "out"), (place / "out" / "_mine" / "standing.parquet")
    looked_up = standing.read_bytes()
    shutil.rmtree(place / "out" / "triples")
    standing.unlink()
    mine(MineSettings.make(mined.settings | {"actors": "1"}))
    assert standing.read_bytes() == looked_up
    assert triples_of(place / "out") == before


def test_other_rules_are_refused_or_replace_the_triples(place: Path, model: Path, mined: Mined, tmp_path: Path) -> None:
    """On the corpus' vectors of another mining, which need no instruction of queries; positives by their ids."""
    pq.write_table(pa.table({"query": ["fox", "fox and dog", "guitar"], "positive_id": [13, 999, 0]}), tmp_path / "q.parquet")
    more = {"queries": [str(tmp_path / "q.parquet")], "corpus": None, "corpus_run": str(place / "out" / "runs" / "corpus"), "prompt": "e5", "top_k": 40}
    made = mine(settings(place, model, tmp_path / "out", **more))
    assert [(row["anchor"], row["positive"], row["positive_id"]) for row in triples_of(tmp_path / "out")] == [
        ("fox", CORPUS[13], "13"),
        ("guitar", CORPUS[0], "0"),
    ]
    assert (made.counts["rows"], made.counts["queries"], made.counts["rejected"], made.counts["positives_missing"]) == (3, 2, 1, 1)
    assert made.counts["rejects_by_reason"] == {"positive not in the corpus": 1}
    assert not (tmp_path / "out" / "runs" / "corpus").exists()
    with pytest.raises(RunMismatch, match=r"or replace the triples with overwrite:\n  mining\.margin: there None, asked for now 2"):
        mine(settings(place, model, tmp_path / "out", margin=2, **more))
    made = mine(settings(place, model, tmp_path / "out", margin=2, overwrite=True, **more))
    assert (made.counts["triples"], made.counts["dropped"]) == (0, 2)  # No cosine is more than 2 below another.
    made = mine(settings(place, model, tmp_path / "out", margin=2, keep_short=True, overwrite=True, **more))
    assert [row["negative"] for row in triples_of(tmp_path / "out")] == [[], []]
    assert made.counts["short"] == 2
    with pytest.raises(RunMismatch, match=r"name another out; with corpus_run .*runs/corpus its corpus is not embedded again:\n[^!]*  vectors\.block_queries"):
        mine(settings(place, model, tmp_path / "out", block_queries=7, overwrite=True, **more))


def test_a_draw_is_the_same_in_blocks_of_any_size(place: Path, model: Path, mined: Mined, tmp_path: Path) -> None:
    more = {"corpus": None, "corpus_run": str(place / "out" / "runs" / "corpus"), "prompt": "e5", "sample": "random", "negatives": 2, "seed": 5}
    for out, block in ((tmp_path / "one", 1), (tmp_path / "all", 100)):
        mine(settings(place, model, out, block_queries=block, **more))
    one, together = ([{name: value for name, value in row.items() if "score" not in name} for row in triples_of(tmp_path / out)] for out in ("one", "all"))
    assert one == together
    assert {tuple(row["negative_ranks"]) for row in triples_of(tmp_path / "one")} != {(1, 2)}


def test_a_corpus_in_another_space_is_refused(place: Path, model: Path, tmp_path: Path, mined: Mined, llmemb: Any) -> None:
    more = {"corpus": None, "corpus_run": str(place / "out" / "runs" / "corpus")}
    with pytest.raises(
        RunMismatch, match=r"corpus_run: .* is in another vector space[^!]*representation\.document\.template: that run has '\{text\}', asked for now 'This"
    ):
        mine(settings(place, model, tmp_path / "out", **more))
    embed(place / "corpus", tmp_path / "queries", model, role="query")
    with pytest.raises(RunMismatch, match="role: that run has 'query'"):
        mine(settings(place, model, tmp_path / "out", **more | {"corpus_run": str(tmp_path / "queries")}))
    assert not (tmp_path / "out").exists()
    shown: Shown = llmemb("mine", "--model", model, "--queries", place / "none.jsonl", "--corpus", place / "corpus", "--out", tmp_path / "out")
    assert shown.code == 2
    assert "none.jsonl; check the path" in shown.err


def test_what_stands_in_the_way_is_named(place: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match=r"is not empty \(mine\.txt"):
        mine(settings(place, model, tmp_path / "out"))
    (tmp_path / "q.csv").write_text("query,positive_id\na,77\n")
    with pytest.raises(InputError, match="none of 1 ids of positives is in the corpus"):
        mine(settings(place, model, tmp_path / "new", queries=[str(tmp_path / "q.csv")]))
