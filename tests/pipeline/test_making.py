"""Copied vectors: identical prompts once, an earlier run's prompts not at all, and every row still gets its vector."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import llmemb_ray
from llmemb_ray.errors import ConfigError, OutputError, RunMismatch
from llmemb_ray.pipeline.making import Remembered
from llmemb_ray.storage import Storage
from tests.s3_server import S3Server
from tests.small_jobs import decoded, embed, opened, problems_of, rejects_of, rows_of, vectors_by_text_id, write
from tests.small_models import SENTENCES, make_damaged_model

# -- identical prompts -------------------------------------------------------------------------------


@pytest.fixture
def doubled(tmp_path: Path) -> Path:
    """Two files of 20 rows with 7 different texts, one row null."""
    for number in range(2):
        texts: list[str | None] = [SENTENCES[row % 7] for row in range(20)]
        texts[13] = None
        write(tmp_path / "in" / f"{number}.parquet", texts, id=[number * 20 + row for row in range(20)])
    return tmp_path / "in"


def test_identical_prompts_are_embedded_once_and_every_row_gets_the_vector(doubled: Path, tmp_path: Path, model: Path) -> None:
    plain = embed(doubled, tmp_path / "plain", model, rows_per_unit=10)
    receipt = embed(doubled, tmp_path / "out", model, dedup="exact", rows_per_unit=10)
    assert receipt.rows_embedded == plain.rows_embedded == 38
    assert receipt.copied == 38 - 7, "one process sees all units, so each text is embedded once in the run"
    assert receipt.tokens == plain.tokens
    assert receipt.tokens_copied > 0
    assert receipt.tokens_computed < plain.tokens_computed / 3
    found, expected = vectors_by_text_id(tmp_path / "out"), vectors_by_text_id(tmp_path / "plain")
    assert found.keys() == expected.keys()
    assert max(float(np.abs(found[id_] - expected[id_]).max()) for id_ in found) <= 1e-5
    assert problems_of(tmp_path / "out", doubled) == []


def test_without_dedup_nothing_is_copied(doubled: Path, tmp_path: Path, model: Path) -> None:
    receipt = embed(doubled, tmp_path / "out", model)
    assert (receipt.copied, receipt.reused, receipt.tokens_copied) == (0, 0, 0)


def test_copies_of_a_row_that_fails_fail_too(tmp_path: Path) -> None:
    directory = make_damaged_model(tmp_path / "model")
    corpus = write(tmp_path / "in.parquet", ["#", "#", "b", "#"])
    receipt = embed(corpus, tmp_path / "out", directory, dedup="exact", prompt="none", max_nan=4, max_reject_rate=1.0)
    assert receipt.rejects_by_reason == {"not_finite": 3}
    assert [reject["source_row"] for reject in rejects_of(tmp_path / "out")] == [0, 1, 3]


def test_what_is_remembered_stays_within_its_bytes_and_forgets_the_oldest() -> None:
    vector = np.ones(10, np.float32)
    remembered = Remembered(limit_bytes=3 * vector.nbytes)
    for key in (b"a", b"b", b"c"):
        remembered.put(key, vector)
    assert remembered.get(b"a") is not None
    remembered.put(b"d", vector * 2)
    assert remembered.get(b"b") is None, "a was used after b"
    assert [remembered.get(key) is not None for key in (b"a", b"c", b"d")] == [True] * 3


# -- an earlier run ----------------------------------------------------------------------------------


@pytest.fixture
def earlier(tmp_path: Path, model: Path) -> Path:
    """A finished run over 30 rows in two files."""
    for number in range(2):
        write(tmp_path / "old" / f"{number}.parquet", [f"text {number} {row}" for row in range(15)], id=[number * 100 + row for row in range(15)])
    embed(tmp_path / "old", tmp_path / "earlier", model, rows_per_unit=6)
    return tmp_path / "earlier"


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """The corpus a day later, in one file and another order: 3 texts changed, 4 rows new, 5 gone."""
    rows = [(number * 100 + row, f"text {number} {row}") for number in (1, 0) for row in range(15)]
    rows = [(id_, "another text" if id_ in (3, 7, 104) else text) for id_, text in rows if id_ not in (0, 1, 2, 113, 114)]
    rows += [(900 + row, f"new {row}") for row in range(4)]
    return write(tmp_path / "new" / "all.parquet", [text for _, text in rows], id=[id_ for id_, _ in rows])


def test_unchanged_texts_are_copied_changed_and_new_ones_embedded_and_deleted_ones_listed(earlier: Path, changed: Path, tmp_path: Path, model: Path) -> None:
    receipt = embed(changed, tmp_path / "out", model, reuse=str(earlier), rows_per_unit=8)
    assert (receipt.rows_embedded, receipt.reused) == (29, 22)
    old, new = vectors_by_text_id(earlier), vectors_by_text_id(tmp_path / "out")
    for id_ in old.keys() & new.keys() - {3, 7, 104}:
        assert old[id_].tobytes() == new[id_].tobytes(), "copied bit by bit"
    embed(changed, tmp_path / "plain", model)
    plain = vectors_by_text_id(tmp_path / "plain")
    assert max(float(np.abs(new[id_] - plain[id_]).max()) for id_ in plain) <= 1e-5
    assert receipt.reuse == {"run": str(earlier), "deleted": 5, "list": "_llmemb/deleted.parquet"}
    deleted = pq.read_table(tmp_path / "out" / "_llmemb" / "deleted.parquet")
    assert sorted(deleted["id"].to_pylist()) == [0, 1, 2, 113, 114]
    assert set(zip(deleted["source_file"].to_pylist(), deleted["source_row"].to_pylist(), strict=True)) == {(0, 0), (0, 1), (0, 2), (1, 13), (1, 14)}
    assert not (tmp_path / "out" / "_llmemb" / "reuse").exists() or not list((tmp_path / "out" / "_llmemb" / "reuse").iterdir())
    assert problems_of(tmp_path / "out", changed) == []


def test_nothing_deleted_leaves_no_list(earlier: Path, tmp_path: Path, model: Path) -> None:
    receipt = embed(tmp_path / "old", tmp_path / "out", model, reuse=str(earlier))
    assert receipt.reuse["deleted"] == 0
    assert (receipt.reused, receipt.tokens_computed) == (30, 0)
    assert not (tmp_path / "out" / "_llmemb" / "deleted.parquet").exists()


def test_runs_without_ids_tell_rows_by_their_prompts(tmp_path: Path, model: Path) -> None:
    embed(write(tmp_path / "a.parquet", ["one", "two", "three"]), tmp_path / "first", model)
    receipt = embed(write(tmp_path / "b.parquet", ["three", "four", "one"]), tmp_path / "second", model, reuse=str(tmp_path / "first"))
    assert (receipt.reused, receipt.reuse["deleted"]) == (2, 1)
    deleted = pq.read_table(tmp_path / "second" / "_llmemb" / "deleted.parquet").to_pylist()
    assert [(row["source_file"], row["source_row"]) for row in deleted] == [(0, 1)]


@pytest.mark.parametrize("pool", ["none", "mean"])
def test_chunks_are_reused_like_texts(tmp_path: Path, model: Path, pool: str) -> None:
    long = "".join(f"This is sentence number {number}. " for number in range(12))
    chunks: dict[str, Any] = {"chunk_tokens": 30, "chunk_pool": pool}
    embed(write(tmp_path / "a.parquet", [long, "short", "gone"], id=[1, 2, 3]), tmp_path / "first", model, **chunks)
    new = write(tmp_path / "b.parquet", ["other", long, "short"], id=[4, 1, 2])
    receipt = embed(new, tmp_path / "second", model, reuse=str(tmp_path / "first"), dedup="exact", **chunks)
    embed(new, tmp_path / "plain", model, **chunks)
    assert receipt.reused == sum(1 for row in rows_of(tmp_path / "first").to_pylist() if row["id"] != 3) if pool == "none" else receipt.reused > 3
    assert receipt.reuse["deleted"] == 1
    found, expected = (np.stack(rows_of(tmp_path / name)["embedding"].to_pylist()) for name in ("second", "plain"))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert problems_of(tmp_path / "second", new) == []


@pytest.mark.parametrize("dtype", ["float16", "int8", "ubinary"])
def test_codes_are_copied_bit_by_bit_under_the_same_calibration(earlier: Path, tmp_path: Path, model: Path, dtype: str) -> None:
    """``earlier`` is float32; a second run of codes made from it, then a third from the second."""
    second = embed(tmp_path / "old", tmp_path / "second", model, reuse=str(earlier), dtype=dtype)
    assert second.reused == 30
    embed(tmp_path / "old", tmp_path / "fresh", model, dtype=dtype)
    write(tmp_path / "old" / "2.parquet", ["brand new"], id=[500])
    third = embed(tmp_path / "old", tmp_path / "third", model, reuse=str(tmp_path / "second"), dtype=dtype)
    assert third.reused == 30
    ours = {row["id"]: row["embedding"] for row in rows_of(tmp_path / "third").to_pylist()}
    for row in rows_of(tmp_path / "second").to_pylist():
        assert ours[row["id"]] == row["embedding"]
    again, exact = decoded(tmp_path / "third"), decoded(tmp_path / "fresh")
    assert min(float(again[id_] @ exact[id_]) for id_ in exact) > (0.99 if dtype != "ubinary" else 0.9)
    assert problems_of(tmp_path / "third") == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": "e5"}, r"space\.representation\.document\.template: .*This sentence"),
        ({"pooling": "mean"}, r"space\.representation\.pooling: that run has 'last', this one 'mean'"),
        ({"compute_dtype": "bfloat16"}, r"engine\.compute_dtype: that run has 'float32', this one 'bfloat16'"),
        ({"chunk_tokens": 20, "chunk_pool": "mean"}, "chunk_pool: that run has 'none', this one 'mean'"),
    ],
)
def test_another_space_is_refused_field_by_field_before_anything_is_embedded(
    earlier: Path, changed: Path, tmp_path: Path, model: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(RunMismatch, match=said):
        embed(changed, tmp_path / "out", model, reuse=str(earlier), **settings)
    assert not list((tmp_path / "out").glob("data/*"))


def test_codes_of_other_ranges_and_lossy_vectors_are_refused(earlier: Path, changed: Path, tmp_path: Path, model: Path) -> None:
    embed(tmp_path / "old", tmp_path / "half", model, dtype="float16")
    with pytest.raises(RunMismatch, match="dtype: that run has 'float16', this one 'float32'; only float32 can become another"):
        embed(changed, tmp_path / "out", model, reuse=str(tmp_path / "half"))
    embed(tmp_path / "old", tmp_path / "int8", model, dtype="int8")
    embed(changed, tmp_path / "other", model, dtype="int8")
    with pytest.raises(RunMismatch, match=r"calibration: that run's codes have other ranges; give --calibration .*int8"):
        embed(changed, tmp_path / "out2", model, dtype="int8", reuse=str(tmp_path / "int8"), calibration=str(tmp_path / "other"))


def test_what_is_no_finished_run_is_refused_by_name(earlier: Path, changed: Path, tmp_path: Path, model: Path) -> None:
    with pytest.raises(OutputError, match=r"reuse: .*nothing-here holds no run of llmemb_ray"):
        embed(changed, tmp_path / "out", model, reuse=str(tmp_path / "nothing-here"))
    shutil.copytree(earlier, tmp_path / "half-done")
    (tmp_path / "half-done" / "_llmemb" / "receipt.json").unlink()
    with pytest.raises(OutputError, match=r"reuse: the run in .*half-done is not finished; finish it first"):
        embed(changed, tmp_path / "out2", model, reuse=str(tmp_path / "half-done"))
    shutil.copytree(earlier, tmp_path / "other-version")
    record = tmp_path / "other-version" / "_llmemb" / "plan" / "plan.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"format": 1}))
    with pytest.raises(OutputError, match=r"reuse: .*was written with layout 1; this version of llmemb_ray reads layout 2"):
        embed(changed, tmp_path / "out3", model, reuse=str(tmp_path / "other-version"))


def test_of_a_damaged_run_what_is_sound_is_copied(earlier: Path, changed: Path, tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, second, *_ = opened(earlier).commits
    Storage(str(earlier)).delete([str(first.shard)])
    (earlier / str(second.shard)).write_bytes(b"no longer Parquet")
    receipt = embed(changed, tmp_path / "out", model, reuse=str(earlier), quiet=False)
    assert 0 < receipt.reused < 22
    assert receipt.rows_embedded == 29
    assert "2 shards of" in capfd.readouterr().err
    assert problems_of(tmp_path / "out", changed) == []
    embed(changed, tmp_path / "plain", model)
    found, plain = vectors_by_text_id(tmp_path / "out"), vectors_by_text_id(tmp_path / "plain")
    assert max(float(np.abs(found[id_] - plain[id_]).max()) for id_ in plain) <= 1e-5


def test_centred_bits_are_never_copied_among_bare_ones(earlier: Path, tmp_path: Path, model: Path) -> None:
    embed(tmp_path / "old", tmp_path / "centred", model, dtype="ubinary", centre=True)
    with pytest.raises(RunMismatch, match="centre: that run has True, this one False"):
        embed(tmp_path / "old", tmp_path / "bare", model, dtype="ubinary", reuse=str(tmp_path / "centred"))
    assert not (tmp_path / "bare" / "_llmemb" / "plan").exists(), "nothing is left that stands in the way of the right command"


def test_reuse_of_the_output_itself_is_refused_before_anything_is_deleted(earlier: Path, changed: Path, model: Path) -> None:
    before = {path.name for path in (earlier / "data").iterdir()}
    with pytest.raises(ConfigError, match="reuse: names the output itself"):
        embed(changed, earlier, model, reuse=str(earlier), overwrite=True)
    assert {path.name for path in (earlier / "data").iterdir()} == before


def test_a_refused_reuse_leaves_the_run_that_was_to_be_overwritten(earlier: Path, changed: Path, tmp_path: Path, model: Path) -> None:
    embed(changed, tmp_path / "out", model)
    before = {path.name for path in (tmp_path / "out" / "data").iterdir()}
    with pytest.raises(RunMismatch):
        embed(changed, tmp_path / "out", model, reuse=str(earlier), pooling="mean", overwrite=True)
    assert {path.name for path in (tmp_path / "out" / "data").iterdir()} == before


def test_rows_without_an_id_and_ids_of_another_type_are_told_by_their_prompts(tmp_path: Path, model: Path) -> None:
    embed(write(tmp_path / "a.parquet", ["one", "two", "three", "four"], id=pa.array([1, None, None, 4])), tmp_path / "first", model)
    some = embed(write(tmp_path / "b.parquet", ["one", "two"], id=pa.array([1, None])), tmp_path / "second", model, reuse=str(tmp_path / "first"))
    assert some.reuse["deleted"] == 2
    deleted = pq.read_table(tmp_path / "second" / "_llmemb" / "deleted.parquet").to_pylist()
    assert sorted((row["source_row"], row["id"]) for row in deleted) == [(2, None), (3, 4)]
    texts = write(tmp_path / "c.parquet", ["one", "two", "three"], id=["1", "2", "3"])
    assert embed(texts, tmp_path / "third", model, reuse=str(tmp_path / "first")).reuse["deleted"] == 1


def test_a_list_of_deletions_does_not_outlive_the_generation_it_was_made_for(tmp_path: Path, model: Path) -> None:
    embed(write(tmp_path / "old" / "a.parquet", ["one", "two"], id=[1, 2]), tmp_path / "first", model)
    write(tmp_path / "new" / "a.parquet", ["one"], id=[1])
    embed(tmp_path / "new", tmp_path / "out", model, reuse=str(tmp_path / "first"))
    assert (tmp_path / "out" / "_llmemb" / "deleted.parquet").exists()
    write(tmp_path / "new" / "b.parquet", ["two"], id=[2])
    receipt = embed(tmp_path / "new", tmp_path / "out", model, append=True)
    assert receipt.reuse == {}
    assert not (tmp_path / "out" / "_llmemb" / "deleted.parquet").exists(), "row 2 is in the run again"


def test_codes_with_ranges_of_a_run_that_is_gone_are_continued_and_appended_to(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [f"text {row}" for row in range(20)], id=list(range(20)))
    embed(tmp_path / "in", tmp_path / "first", model, dtype="int8")
    embed(tmp_path / "in", tmp_path / "out", model, dtype="int8", reuse=str(tmp_path / "first"))
    shutil.rmtree(tmp_path / "first")
    assert embed(tmp_path / "in", tmp_path / "out", model, dtype="int8").reused == 20
    write(tmp_path / "in" / "b.parquet", ["more"], id=[100])
    assert embed(tmp_path / "in", tmp_path / "out", model, dtype="int8", append=True).rows_embedded == 21


def test_copied_rows_are_counted_and_failed_ones_are_not(tmp_path: Path) -> None:
    directory = make_damaged_model(tmp_path / "model")
    corpus = write(tmp_path / "in.parquet", ["#", "#", "b", "b", "b"])
    receipt = embed(corpus, tmp_path / "out", directory, dedup="exact", prompt="none", max_nan=2, max_reject_rate=1.0)
    lengths = {row["source_row"]: row["n_tokens"] for row in rows_of(tmp_path / "out").to_pylist()}
    assert (receipt.copied, receipt.tokens_copied) == (2, lengths[3] + lengths[4])


def test_an_earlier_run_in_object_storage_serves_one_beside_it(s3: S3Server, changed: Path, tmp_path: Path, model: Path) -> None:
    s3.make_bucket("reuse")
    for number in range(2):
        write(tmp_path / "old" / f"{number}.parquet", [f"text {number} {row}" for row in range(15)], id=[number * 100 + row for row in range(15)])
    access: dict[str, Any] = {"endpoint_url": s3.endpoint_url, "storage_options": {"s3": s3.storage_options}}
    llmemb_ray.embed(str(tmp_path / "old"), s3.url("first"), model=str(model), actors="0", quiet=True, **access)
    receipt = llmemb_ray.embed(str(changed), s3.url("second"), model=str(model), actors="0", quiet=True, reuse=s3.url("first"), **access)
    assert (receipt.reused, receipt.reuse["deleted"]) == (22, 5)


def test_on_ray_vectors_are_copied_by_several_actors(earlier: Path, changed: Path, tmp_path: Path, model: Path) -> None:
    receipt = embed(changed, tmp_path / "out", model, reuse=str(earlier), dedup="exact", rows_per_unit=8, actors="2", cpus_per_actor=1)
    assert (receipt.rows_embedded, receipt.reused, receipt.reuse["deleted"]) == (29, 22, 5)
    embed(changed, tmp_path / "plain", model)
    found, plain = vectors_by_text_id(tmp_path / "out"), vectors_by_text_id(tmp_path / "plain")
    assert max(float(np.abs(found[id_] - plain[id_]).max()) for id_ in plain) <= 1e-5
