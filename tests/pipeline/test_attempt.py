"""One attempt at a unit: what stands in its shard, what becomes a reject, and two attempts at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmemb_ray.embedders.embedder import Embedder
from llmemb_ray.pipeline import attempt, job
from llmemb_ray.pipeline.making import Isolation
from llmemb_ray.pipeline.prepare import Prepared
from llmemb_ray.shards.commits import Commit
from llmemb_ray.shards.schema import metadata_of
from tests.small_jobs import embed, opened, problems_of, rejects_of, rows_of, settled, vectors_by_text_id, vectors_of, write
from tests.small_models import make_damaged_model


def sentences(count: int) -> list[str]:
    return [f"sentence number {row}" for row in range(count)]


class Together:
    """An embedder whose callers wait for each other before they embed: by then each has looked for a commit."""

    def __init__(self, embedder: Embedder, parties: int) -> None:
        self._embedder, self._barrier = embedder, threading.Barrier(parties)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embedder, name)

    def embed_tokens(self, *arguments: Any, **named: Any) -> Any:
        self._barrier.wait(timeout=30)
        return self._embedder.embed_tokens(*arguments, **named)


def test_of_attempts_at_the_same_time_one_commit_stands_and_it_is_whole(tmp_path: Path, model: Path) -> None:
    texts: list[str | None] = [*sentences(19), None]
    corpus = write(tmp_path / "in" / "a.parquet", texts, id=list(range(20)))
    ready = settled(corpus.parent, tmp_path / "out", model, rows_per_unit=20)
    (prepared,) = ready.prepared()
    together: Any = Together(ready.embedder(), 3)
    made: list[Commit] = []
    threads = [threading.Thread(target=lambda: made.append(attempt.run(ready.job, prepared, together, ready.workshop()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({commit.attempt for commit in made}) == 3, "the attempts did not overlap"
    assert len(list((tmp_path / "out" / "data").iterdir())) == 3

    receipt = job.finish(ready.plan, ready.job.output, time.monotonic())
    assert (receipt.rows_embedded, receipt.rows_rejected, receipt.units) == (19, 1, 1)
    (standing,) = opened(tmp_path / "out").commits
    assert standing in made
    assert [path.name for path in (tmp_path / "out" / "data").iterdir()] == [f"{standing.unit}-{standing.attempt}.parquet"]
    assert [path.name for path in (tmp_path / "out" / "rejects").iterdir()] == [f"{standing.unit}-{standing.attempt}.parquet"]
    assert problems_of(tmp_path / "out", corpus.parent) == []


def test_no_attempt_starts_where_a_commit_is_visible(tmp_path: Path, model: Path) -> None:
    corpus = write(tmp_path / "in" / "a.parquet", sentences(5))
    ready = settled(corpus, tmp_path / "out", model)
    (prepared,) = ready.prepared()
    first = attempt.run(ready.job, prepared, ready.embedder(), ready.workshop())
    no_embedder: Any = None
    assert attempt.run(ready.job, prepared, no_embedder, ready.workshop()) == first
    assert len(list((tmp_path / "out" / "data").iterdir())) == 1


def test_a_unit_embedded_range_by_range_has_the_same_vectors_and_rejects_its_poison(tmp_path: Path, model: Path) -> None:
    corpus = write(tmp_path / "in" / "a.parquet", sentences(12), id=list(range(12)))
    embed(corpus, tmp_path / "plain", model, rows_per_unit=12)
    ready = settled(corpus, tmp_path / "out", model, rows_per_unit=12)
    (prepared,) = ready.prepared()
    entered: list[tuple[int, int] | None] = []
    ranges = [(0, 3), (3, 4), (4, 6), (6, 12)]
    commit = attempt.run(
        ready.job, prepared, ready.embedder(), ready.workshop(), isolation=Isolation(ranges=ranges, poison=frozenset({3}), entering=entered.append)
    )
    assert entered == [step for range_ in ranges for step in (range_, None)], "what is entered is left again, so that no later death is put down to it"
    assert (commit.embedded, commit.rejected, commit.reasons) == (11, 1, {"kills_engine": 1})
    job.finish(ready.plan, ready.job.output, time.monotonic())
    (reject,) = rejects_of(tmp_path / "out")
    assert (reject["source_row"], reject["id"]) == (3, "3")
    found, expected = vectors_by_text_id(tmp_path / "out"), vectors_by_text_id(tmp_path / "plain")
    assert found.keys() == expected.keys() - {3}
    assert max(float(np.abs(found[id_] - expected[id_]).max()) for id_ in found) <= 1e-5


def test_of_the_units_of_an_actor_only_the_one_being_computed_is_entered(tmp_path: Path, model: Path) -> None:
    """A unit that waits for its turn while another one kills the engine must not be halved for it."""
    write(tmp_path / "in.parquet", sentences(60), row_group_size=60)
    ready = settled(tmp_path / "in.parquet", tmp_path / "out", model, rows_per_unit=10)
    embedder, workshop = ready.embedder(), ready.workshop()
    told: list[str] = []

    def run(prepared: Prepared) -> Commit:
        def entering(rows: tuple[int, int] | None) -> None:
            told.append(prepared.unit.name if rows else "left")
            time.sleep(0.01)

        isolation = Isolation(ranges=[(row, row + 1) for row in range(10)], entering=entering)
        return attempt.run(ready.job, prepared, embedder, workshop, isolation=isolation)

    with ThreadPoolExecutor(4) as threads:
        commits = list(threads.map(run, ready.prepared()))
    assert [commit.embedded for commit in commits] == [10] * 6
    assert len(set(told[::2])) == 6
    assert set(told[1::2]) == {"left"}, "another unit was entered before this one was left"


# -- rows without a usable vector ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """Makes models in which the token of ``#`` has an embedding of one repeated value."""
    root = tmp_path_factory.mktemp("damaged")

    def make(value: float) -> Path:
        directory = root / str(value)
        return directory if directory.exists() else make_damaged_model(directory, value=value)

    return make


TEXTS = ["one text", "ends with #", "another text", "# begins with it", "last text"]


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "not_finite"), (float("inf"), "not_finite"), (0.0, "zero_vector")])
def test_a_row_whose_vector_is_unusable_becomes_a_reject(damaged: Callable[[float], Path], tmp_path: Path, value: float, reason: str) -> None:
    """Layer 0 with last pooling is the last token's embedding, so only the row that ends with the token is hit."""
    corpus = write(tmp_path / "in" / "a.parquet", TEXTS, id=["a", "b", "c", "d", "e"])
    receipt = embed(corpus, tmp_path / "out", damaged(value), prompt="none", layer=0, normalize=False, max_reject_rate=1, max_nan=1)
    assert (receipt.rows_embedded, receipt.rejects_by_reason) == (4, {reason: 1})
    (reject,) = rejects_of(tmp_path / "out")
    assert (reject["source_row"], reject["id"], reject["reason"]) == (1, "b", reason)
    assert rows_of(tmp_path / "out")["id"].to_pylist() == ["a", "c", "d", "e"]
    assert problems_of(tmp_path / "out", corpus) == []


def test_a_row_that_is_not_finite_leaves_its_neighbours_as_they_are(damaged: Callable[[float], Path], tmp_path: Path) -> None:
    """Through all layers, where rows that share a forward pass could touch each other."""
    everything = write(tmp_path / "all" / "a.parquet", TEXTS, id=list(range(5)))
    without = write(tmp_path / "rest" / "a.parquet", [TEXTS[0], TEXTS[2], TEXTS[4]], id=[0, 2, 4])
    receipt = embed(everything, tmp_path / "out", damaged(float("nan")), prompt="none", pooling="mean", max_nan=2)
    assert receipt.rejects_by_reason == {"not_finite": 2}
    embed(without, tmp_path / "expected", damaged(float("nan")), prompt="none", pooling="mean", max_nan=2)
    found, expected = vectors_by_text_id(tmp_path / "out"), vectors_by_text_id(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert max(float(np.abs(found[id_] - expected[id_]).max()) for id_ in found) <= 1e-5


def test_what_float16_cannot_hold_is_rejected_and_never_written_as_infinity(damaged: Callable[[float], Path], tmp_path: Path) -> None:
    corpus = write(tmp_path / "in" / "a.parquet", TEXTS)
    settings: dict[str, Any] = {"prompt": "none", "layer": 0, "normalize": False}
    assert embed(corpus, tmp_path / "float32", damaged(1e6), **settings).rows_rejected == 0
    receipt = embed(corpus, tmp_path / "float16", damaged(1e6), dtype="float16", max_nan=1, **settings)
    assert receipt.rejects_by_reason == {"not_finite": 1}
    (reject,) = rejects_of(tmp_path / "float16")
    assert reject["source_row"] == 1
    assert "float16" in reject["detail"]
    assert np.isfinite(vectors_of(rows_of(tmp_path / "float16")["embedding"])).all()
    normalized = embed(corpus, tmp_path / "normalized", damaged(1e6), dtype="float16", prompt="none", layer=0)
    assert normalized.rows_rejected == 0, "a normalised vector fits float16"


def test_a_unit_of_which_every_row_is_rejected_has_no_shard(tmp_path: Path, model: Path) -> None:
    corpus = write(tmp_path / "in" / "a.parquet", [None, "", "a text", "another"])
    receipt = embed(corpus, tmp_path / "out", model, rows_per_unit=2)
    assert (receipt.units, receipt.rows_embedded, receipt.rows_rejected) == (2, 2, 2)
    first, second = opened(tmp_path / "out").commits
    assert (first.shard, first.embedded, second.rejects) == (None, 0, None)
    assert problems_of(tmp_path / "out", corpus) == []


# -- the shard ---------------------------------------------------------------------------------------


IDS = {
    "string": (pa.string(), ["z", "a", "ü", "a/b"]),
    "large_string": (pa.large_string(), ["z", "a", "ü", "a/b"]),
    "int64": (pa.int64(), [2**62, -1, 0, 7]),
    "uint8": (pa.uint8(), [255, 0, 3, 4]),
    "binary": (pa.binary(), [b"\xff\x00", b"", b"a", b"b"]),
    "date": (pa.date32(), [0, 1, 2, 3]),
}


@pytest.mark.parametrize("kind", IDS)
def test_ids_keep_type_and_value(tmp_path: Path, model: Path, kind: str) -> None:
    type_, values = IDS[kind]
    ids = pa.array(values, type_)
    corpus = write(tmp_path / "in" / "a.parquet", sentences(4), id=ids)
    embed(corpus, tmp_path / "out", model)
    written = rows_of(tmp_path / "out")["id"]
    assert written.type == type_
    assert written.combine_chunks().equals(ids)


def test_an_id_that_is_not_utf8_is_carried_as_it_is_even_with_a_bad_row_beside_it(tmp_path: Path, model: Path, damaged: Callable[[float], Path]) -> None:
    broken = pa.array([b"a", b"\xff\xfe", b"c", b"d", b"e"]).view(pa.string())
    corpus = write(tmp_path / "in" / "a.parquet", ["fine", None, "ends with #", "more", "most"], id=broken)
    receipt = embed(corpus, tmp_path / "out", damaged(0.0), prompt="none", layer=0)
    assert receipt.rejects_by_reason == {"null": 1, "zero_vector": 1}
    assert [reject["id"] for reject in rejects_of(tmp_path / "out")] == ["\\xff\\xfe", "c"]
    corpus = write(tmp_path / "in" / "a.parquet", ["fine", "also #", "more #", "most", None], id=broken)
    embed(corpus, tmp_path / "again", damaged(0.0), prompt="none", layer=0)
    assert sorted(str(reject["id"]) for reject in rejects_of(tmp_path / "again")) == ["\\xff\\xfe", "c", "e"]


def test_rows_stand_in_source_order_with_kept_columns_and_honest_counts(tmp_path: Path, model: Path) -> None:
    """Lengths vary widely, so that the embedder sorts them for its packs; the shard must not show it."""
    texts: list[str | None] = [("word " * ((row * 7) % 23 + 1)).strip() for row in range(40)]
    texts[5], texts[11] = None, "long " * 400
    columns: dict[str, Any] = {
        "id": [1000 - row for row in range(40)],
        "lang": pa.array(["en", "de"] * 20),
        "score": pa.array([row / 3 for row in range(40)], pa.float32()),
    }
    corpus = write(tmp_path / "in" / "a.parquet", texts, **columns)
    receipt = embed(corpus, tmp_path / "out", model, keep_columns=["score", "lang"], max_tokens=60, rows_per_unit=16, token_budget=128)
    run = opened(tmp_path / "out")
    expected = [row for row in range(40) if row != 5]
    table = rows_of(tmp_path / "out")
    assert table.column_names == ["id", "source_file", "source_row", "embedding", "n_tokens", "truncated", "prompt_hash", "score", "lang"]
    assert table["source_row"].to_pylist() == expected
    assert table["source_row"].type == pa.int64()
    assert table["source_file"].to_pylist() == [0] * 39
    assert table["source_file"].type == pa.int32()
    for name, values in columns.items():
        assert table[name].combine_chunks().equals(pa.array(values).take(pa.array(expected))), name
    prompter = settled(corpus, tmp_path / "other", model, max_tokens=60).spec.prompter("document")
    assert table["truncated"].to_pylist() == [row == 11 for row in expected]
    tokenizer = tokenizer_from(model)
    for row, count in zip(expected, table["n_tokens"].to_pylist(), strict=True):
        whole = len(tokenizer.encode(prompter.prompt(str(texts[row]))).ids)
        assert count == whole if row != 11 else 50 < count <= 60 < whole
    assert receipt.tokens == sum(table["n_tokens"].to_pylist())
    assert receipt.truncated == 1
    for commit in run.commits:
        assert commit.shard is not None
        metadata = metadata_of(pq.read_schema(tmp_path / "out" / commit.shard))
        assert metadata == {"run_key": run.plan.run_key, "space": run.plan.space_digest, "unit": commit.unit, "attempt": commit.attempt, "dtype": "float32"}


def tokenizer_from(model: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model / "tokenizer.json"))


def test_each_vector_is_that_of_its_own_text(tmp_path: Path, model: Path) -> None:
    texts = [("word " * ((row * 7) % 23 + 1)).strip() + f" {row}" for row in range(30)]
    corpus = write(tmp_path / "in" / "a.parquet", texts)
    embed(corpus, tmp_path / "out", model, token_budget=100, rows_per_unit=13)
    ready = settled(corpus, tmp_path / "other", model)
    one_by_one = np.concatenate([ready.embedder().encode([text]) for text in texts])
    assert float(np.abs(vectors_of(rows_of(tmp_path / "out")["embedding"]) - one_by_one).max()) <= 1e-5


def test_float16_output_is_the_float32_output_rounded(tmp_path: Path, model: Path) -> None:
    corpus = write(tmp_path / "in" / "a.parquet", sentences(8))
    embed(corpus, tmp_path / "float32", model, dimensions=10)
    embed(corpus, tmp_path / "float16", model, dimensions=10, dtype="float16")
    exact, rounded = rows_of(tmp_path / "float32")["embedding"], rows_of(tmp_path / "float16")["embedding"]
    assert exact.type == pa.list_(pa.float32(), 10)
    assert rounded.type == pa.list_(pa.float16(), 10)
    assert float(np.abs(vectors_of(rounded) - vectors_of(exact)).max()) <= 2**-11, "half a unit in the last place of numbers below 1"


def test_a_unit_without_rows_left_is_committed_too(tmp_path: Path, model: Path) -> None:
    corpus = write(tmp_path / "in" / "a.parquet", sentences(6), number=list(range(6)))
    receipt = embed(corpus, tmp_path / "out", model, filter="number >= 3", rows_per_unit=3)
    assert (receipt.units, receipt.rows_read, receipt.rows_embedded, receipt.rows_filtered) == (2, 3, 3, 3)
    assert problems_of(tmp_path / "out", corpus) == []


def test_units_that_come_through_an_envelope_give_the_same_shard(tmp_path: Path, model: Path) -> None:
    """As they come to an actor, by way of Ray."""
    corpus = write(tmp_path / "in" / "a.parquet", [*sentences(9), None], id=list(range(10)))
    directly, carried = (settled(corpus, tmp_path / name, model) for name in ("directly", "carried"))
    for ready, way in ((directly, lambda unit: unit), (carried, lambda unit: Prepared.from_envelope(unit.to_envelope()))):
        embedder = ready.embedder()
        for prepared in ready.prepared():
            attempt.run(ready.job, way(prepared), embedder, ready.workshop())
    assert rows_of(tmp_path / "directly").equals(rows_of(tmp_path / "carried"))
    assert rejects_of(tmp_path / "directly") == rejects_of(tmp_path / "carried")
