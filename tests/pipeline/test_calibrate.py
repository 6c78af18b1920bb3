"""A run's calibration: one for all its shards, made of the same sample whoever makes it, or taken from another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmemb_ray.errors import ConfigError, InputError, OutputError, RunMismatch
from llmemb_ray.pipeline import calibrate
from llmemb_ray.pipeline.ledger import Ledger
from llmemb_ray.shards.precision import Calibration
from llmemb_ray.shards.schema import metadata_of
from llmemb_ray.storage import Storage
from tests.small_jobs import decoded, embed, opened, problems_of, settled, write
from tests.small_models import SENTENCES, make_model


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    for number in range(3):
        texts: list[str | None] = [f"{SENTENCES[row % 11]} {number} {row}" for row in range(100)]
        texts[5] = None
        write(tmp_path / "in" / f"{number}.parquet", texts, id=[number * 1000 + row for row in range(100)], row_group_size=30)
    return tmp_path / "in"


def calibration_of(output: Path) -> Calibration:
    found = Calibration.load(Storage(str(output)))
    assert found is not None
    return found


@pytest.mark.parametrize("settings", [{"dtype": "int8"}, {"dtype": "ubinary", "centre": True}, {"dtype": "ubinary"}])
def test_codes_say_nearly_what_the_floats_say(varied: Path, tmp_path: Path, model: Path, settings: dict[str, Any]) -> None:
    embed(varied, tmp_path / "float", model, max_reject_rate=0.1)
    receipt = embed(varied, tmp_path / "codes", model, rows_per_unit=40, max_reject_rate=0.1, **settings)
    assert receipt.rows_embedded == 297
    exact, codes = decoded(tmp_path / "float"), decoded(tmp_path / "codes")
    assert exact.keys() == codes.keys()
    least = min(float(exact[id_] @ codes[id_]) for id_ in exact)
    assert least > (0.999 if settings["dtype"] == "int8" else 0.7)
    assert problems_of(tmp_path / "codes", varied) == []


def test_every_shard_names_the_one_calibration_and_the_share_clipped_is_told(varied: Path, tmp_path: Path, model: Path) -> None:
    receipt = embed(varied, tmp_path / "out", model, dtype="int8", rows_per_unit=40, max_reject_rate=0.1)
    calibration = calibration_of(tmp_path / "out")
    assert calibration.rows == 297, "a small corpus is its own sample"
    assert receipt.clipped_share == 0
    run = opened(tmp_path / "out")
    for _, table in run.shards():
        assert metadata_of(table.schema)["calibration"] == calibration.digest
    narrow = settled(varied, tmp_path / "narrow", model, dtype="int8", rows_per_unit=40)
    few = Calibration.measure(np.stack(list(decoded(tmp_path / "out").values()))[:20], narrow.job.space)
    few.save(Storage(str(tmp_path / "narrow")))
    clipped = embed(varied, tmp_path / "narrow", model, dtype="int8", rows_per_unit=40, max_reject_rate=0.1)
    assert 0.01 < clipped.clipped_share < 0.5, "ranges of 20 vectors leave out a good part of the others'"
    assert clipped.clipped_share == pytest.approx(sum(commit.clipped for commit in opened(tmp_path / "narrow").commits) / (297 * 32))


def test_the_sample_does_not_depend_on_who_takes_it(varied: Path, tmp_path: Path, model: Path) -> None:
    made = [settled(varied, tmp_path / name, model, dtype="int8", rows_per_unit=rows) for name, rows in (("one", 10), ("other", 77))]
    one, other = (calibrate.measure(ready.job, ready.embedder()) for ready in made)
    np.testing.assert_allclose(one.low, other.low, atol=1e-6)
    np.testing.assert_allclose(one.high, other.high, atol=1e-6)


def test_a_run_that_is_stopped_goes_on_with_the_calibration_it_has(varied: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception):
        pass

    from llmemb_ray.shards import commits

    def stop(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(commits, "write", stop)
        with pytest.raises(Stopped):
            embed(varied, tmp_path / "out", model, dtype="int8")
    before = (tmp_path / "out" / "_llmemb" / "calibration.json").read_bytes()
    embed(varied, tmp_path / "out", model, dtype="int8", max_reject_rate=0.1)
    assert (tmp_path / "out" / "_llmemb" / "calibration.json").read_bytes() == before


def test_two_runs_of_one_calibration_have_codes_that_mean_the_same(varied: Path, tmp_path: Path, model: Path) -> None:
    first = tmp_path / "first"
    embed(varied, first, model, dtype="int8", max_reject_rate=0.1)
    other = write(tmp_path / "other.parquet", ["quite another text", f"{SENTENCES[0]} 0 0"], id=[1, 2])
    embed(other, tmp_path / "second", model, dtype="int8", calibration=str(first))
    assert calibration_of(tmp_path / "second").digest == calibration_of(first).digest
    embed(other, tmp_path / "second", model, dtype="int8", calibration=str(first))
    embed(other, tmp_path / "second", model, dtype="int8")
    embed(other, tmp_path / "third", model, dtype="int8")
    with pytest.raises(RunMismatch, match=r"engine\.calibration: the run there has \"[0-9a-f]{64}\", asked for now \"[0-9a-f]{64}\""):
        embed(other, tmp_path / "second", model, dtype="int8", calibration=str(tmp_path / "third"))


def test_another_runs_calibration_must_be_of_this_space_and_be_there(varied: Path, tmp_path: Path, model: Path) -> None:
    embed(varied, tmp_path / "float", model, max_reject_rate=0.1)
    with pytest.raises(OutputError, match=r"calibration: the run in .*float has none \(its dtype is float32\)"):
        embed(varied, tmp_path / "out", model, dtype="int8", calibration=str(tmp_path / "float"))
    with pytest.raises(OutputError, match=r"calibration: .*nowhere holds no run"):
        embed(varied, tmp_path / "out", model, dtype="int8", calibration=str(tmp_path / "nowhere"))
    embed(varied, tmp_path / "other", make_model(tmp_path / "model", seed=3), dtype="int8", max_reject_rate=0.1)
    with pytest.raises(RunMismatch, match=r"calibration: .*another vector space:\n  model: "):
        embed(varied, tmp_path / "out", model, dtype="int8", calibration=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "int8", "centre": True}, "centre: is for dtype ubinary"),
        ({"dtype": "float16", "calibration": "x"}, "calibration: is for dtype int8, or ubinary with centre"),
        ({"dtype": "ubinary", "dimensions": 12}, "ubinary: 12 dimensions are no whole number of bytes"),
    ],
)
def test_settings_that_do_nothing_or_cannot_work_are_refused(varied: Path, tmp_path: Path, model: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        embed(varied, tmp_path / "out", model, **settings)


def test_a_filter_that_keeps_few_rows_finds_them_or_says_what_to_do(tmp_path: Path, model: Path) -> None:
    corpus = write(tmp_path / "a.parquet", [f"text {row}" for row in range(6000)], id=list(range(6000)), row_group_size=6000)
    receipt = embed(corpus, tmp_path / "some", model, dtype="int8", filter="id >= 5500", limit_rows=6000)
    assert (receipt.rows_embedded, calibration_of(tmp_path / "some").rows) == (500, 500)
    few = write(tmp_path / "b.parquet", [f"text {row}" for row in range(40_000)], id=list(range(40_000)), row_group_size=40_000)
    with pytest.raises(InputError, match=r"tells too little of the corpus; take the ranges of another run"):
        embed(few, tmp_path / "few", model, dtype="int8", filter="id % 1000 = 0")


def test_the_sample_is_taken_from_all_over_one_large_row_group(tmp_path: Path, model: Path) -> None:
    """Sorted by kind, so that the first 2,048 rows are all of one."""
    texts = [f"{SENTENCES[row // 1000]} {row}" for row in range(8000)]
    corpus = write(tmp_path / "a.parquet", texts, id=list(range(8000)), row_group_size=8000)
    receipt = embed(corpus, tmp_path / "out", model, dtype="int8")
    assert receipt.clipped_share < 0.005


def test_of_long_texts_a_bounded_number_of_chunks_is_embedded(tmp_path: Path, model: Path) -> None:
    long = " ".join(f"Sentence number {number} is here." for number in range(300))
    ready = settled(write(tmp_path / "a.parquet", [long] * 300), tmp_path / "out", model, dtype="int8", chunk_tokens=24)
    counted: list[int] = []
    calibrate.measure(ready.job, ready.embedder(), lambda rows, _: counted.append(rows))
    assert 2048 <= sum(counted) < 64 * 200 * 2, "of 300 texts with more than 100 chunks each"


def test_pooled_vectors_are_calibrated_as_they_are_written(tmp_path: Path, model: Path) -> None:
    texts = ["".join(f"{SENTENCES[(row + k) % 11]} " for k in range(6)) for row in range(400)]
    corpus = write(tmp_path / "a.parquet", texts, id=list(range(400)))
    pooled: dict[str, Any] = {"chunk_tokens": 24, "chunk_pool": "mean"}
    embed(corpus, tmp_path / "float", model, **pooled)
    embed(corpus, tmp_path / "out", model, dtype="int8", **pooled)
    exact = np.stack(list(decoded(tmp_path / "float").values()))
    calibration = calibration_of(tmp_path / "out")
    np.testing.assert_allclose(calibration.high - calibration.low, exact.max(axis=0) - exact.min(axis=0), atol=1e-4)


def test_what_was_made_first_counts_even_if_a_slower_process_comes_after() -> None:
    """Two processes that both think it is their turn: the ledger's answer is the same for both."""
    ledger = Ledger(max_attempts=3)
    assert ledger.first_calibration("quick") == "quick"
    assert ledger.first_calibration("slow") == "quick"


def test_a_corpus_without_one_usable_text_cannot_be_calibrated(tmp_path: Path, model: Path) -> None:
    corpus = write(tmp_path / "a.parquet", ["", "  ", None])
    with pytest.raises(InputError, match="of 3 rows sampled to calibrate int8 codes 0 can be embedded"):
        embed(corpus, tmp_path / "out", model, dtype="int8")


def test_verify_finds_codes_of_another_calibration_and_one_that_is_gone(varied: Path, tmp_path: Path, model: Path) -> None:
    embed(varied, tmp_path / "out", model, dtype="int8", max_reject_rate=0.1)
    path = tmp_path / "out" / "_llmemb" / "calibration.json"
    data = json.loads(path.read_text())
    data["high"][0] += 0.5
    path.write_text(json.dumps(data))
    assert any("its codes were made with calibration" in problem for problem in problems_of(tmp_path / "out"))
    path.unlink()
    assert any("calibration is not there" in problem for problem in problems_of(tmp_path / "out"))


def test_on_ray_all_actors_wait_for_one_calibration(varied: Path, tmp_path: Path, model: Path) -> None:
    receipt = embed(varied, tmp_path / "ray", model, dtype="int8", actors="2", cpus_per_actor=1, rows_per_unit=20, max_reject_rate=0.1)
    assert (receipt.rows_embedded, receipt.units) == (297, 21)
    embed(varied, tmp_path / "here", model, dtype="int8", max_reject_rate=0.1)
    exact, codes = decoded(tmp_path / "here"), decoded(tmp_path / "ray")
    assert min(float(exact[id_] @ codes[id_]) for id_ in exact) > 0.9999
    assert problems_of(tmp_path / "ray", varied) == []
